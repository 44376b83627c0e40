//! What a client says about where it was, and how its connection begins there.

use std::sync::Arc;

use http::HeaderMap;
use percent_encoding::percent_decode_str;
use serde_json::json;
use tokio::sync::oneshot;
use tracing::debug;
use uuid::Uuid;
use wsproxy_conn::{Link, clock};
use wsproxy_proto::{
    disconnect::Disconnect,
    history::{After, Lost, Position},
    names::Id,
};

use crate::{
    gateway::Gateway,
    http::rejection::Rejection,
    hub::{
        Histories, Sink, Subscription,
        replay::{Outcome, Replay, Wish},
    },
};

/// What a request says about where its client was.
#[derive(Debug, Default)]
pub struct Resume {
    /// Behind what it wants to continue.
    pub after: Option<After>,
    /// It named the parameter or the header, be it empty: it wants to know its position.
    pub asked: bool,
    /// It says so in its first message.
    pub in_frame: bool,
}

impl Resume {
    /// Reads the parameters `last_event_id` and `resume`, and the header `Last-Event-ID`, which an
    /// `EventSource` sends when it reconnects and which therefore is the newer one.
    ///
    /// # Errors
    /// One of them is malformed.
    pub fn read(headers: &HeaderMap, query: Option<&str>) -> Result<Self, Rejection> {
        let mut resume = Self::default();
        for pair in query.unwrap_or_default().split('&') {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            match (name, value) {
                ("last_event_id", value) => {
                    let text = percent_decode_str(value).decode_utf8();
                    let text = text.map_err(|_| bad_event_id("is not UTF-8"))?;
                    resume.after = parse(&text)?;
                    resume.asked = true;
                }
                ("resume", "frame") => resume.in_frame = true,
                ("resume", _) => {
                    return Err(Rejection::bad_request("resume can only be: frame."));
                }
                _ => {}
            }
        }
        if let Some(value) = headers.get("last-event-id") {
            let text = std::str::from_utf8(value.as_bytes());
            resume.after = parse(text.map_err(|_| bad_event_id("is not UTF-8"))?)?;
            resume.asked = true;
        }
        resume.asked |= resume.in_frame;
        Ok(resume)
    }

    /// The first notice of a session's client that asked for its position.
    pub fn hello(
        &self,
        connection: Uuid,
    ) -> impl FnOnce(Outcome, Option<Position>) -> Option<String> + use<> {
        let asked = self.asked;
        move |outcome, position| {
            let position = position.filter(|_| asked && outcome == Outcome::Fresh)?.to_string();
            let hello =
                json!({ "type": "opened", "connection_id": connection, "event_id": position });
            Some(hello.to_string())
        }
    }
}

fn parse(text: &str) -> Result<Option<After>, Rejection> {
    After::parse(text).map_err(|error| bad_event_id(&error.to_string()))
}

fn bad_event_id(why: &str) -> Rejection {
    Rejection::bad_request(format!("last_event_id {why}."))
}

/// A client that is subscribed.
pub struct Opened {
    subscription: Subscription,
    /// What is still to be read, where the client says in its first message behind what.
    unread: Option<Unread>,
}

/// A replay that waits for the client's first message.
pub struct Unread {
    replay: Replay,
    streams_of: Option<Id>,
    hello: Box<dyn FnOnce(Outcome, Option<Position>) -> Option<String> + Send>,
}

impl Opened {
    /// What lasts as long as the connection, and what is still to be read.
    #[must_use]
    pub fn parts(self) -> (Option<Subscription>, Option<Unread>) {
        (Some(self.subscription), self.unread)
    }
}

/// What a client is subscribed to.
pub struct Wanted {
    /// The client.
    pub client: Sink,
    /// Its topics, which have histories where the endpoint has.
    pub topics: Vec<Arc<str>>,
    /// What was reserved for it.
    pub reserved: Option<Subscription>,
    /// The session whose token streams it is shown.
    pub streams_of: Option<Id>,
    /// The name by which its resumes are counted.
    pub counted_as: String,
}

/// Subscribes a client, and brings it to where its topics are.
///
/// # Errors
/// It resumes too often, or the bus or the store did not do its part.
pub async fn open(
    gateway: &Gateway,
    histories: Option<&Arc<Histories>>,
    wanted: Wanted,
    resume: &Resume,
    hello: impl FnOnce(Outcome, Option<Position>) -> Option<String> + Send + 'static,
) -> Result<Opened, Rejection> {
    let Wanted { client, topics, reserved, streams_of, counted_as } = wanted;
    let hub = &gateway.hub;
    let Some(histories) = histories else {
        let sinks = topics.into_iter().map(|topic| (topic, client.clone()));
        let subscription = hub.subscribe_beside(reserved, sinks).await?;
        hub.greet(
            &client,
            hello(Outcome::Fresh, None),
            resume.after.is_some().then_some(Lost::Disabled),
        );
        return Ok(Opened { subscription, unread: None });
    };
    if resume.after.is_some() || resume.in_frame {
        gateway.resumes.take(&counted_as, clock::now()).map_err(Rejection::too_often)?;
    }
    let held = hub.hold(client, topics, Arc::clone(histories), reserved);
    let (subscription, replay) = held.await?;
    if resume.in_frame {
        let unread = Unread { replay, streams_of, hello: Box::new(hello) };
        return Ok(Opened { subscription, unread: Some(unread) });
    }
    let wish = Wish { after: resume.after.clone(), streams_of };
    replay.run(&gateway.store, wish, hello).await?;
    Ok(Opened { subscription, unread: None })
}

/// Waits for what the client's first message says, and then lets its messages flow. The sender belongs to
/// whoever gets that message.
pub fn in_frame(
    gateway: &Arc<Gateway>,
    unread: Unread,
    link: &Arc<Link>,
) -> oneshot::Sender<Option<After>> {
    let (tell, told) = oneshot::channel();
    let (owner, link) = (Arc::clone(gateway), Arc::clone(link));
    gateway.tasks.spawn(async move {
        let timeout = owner.config.server.handshake_timeout;
        let after = tokio::time::timeout(timeout, told).await.ok().and_then(Result::ok).flatten();
        if link.is_closing() {
            return;
        }
        let Unread { replay, streams_of, hello } = unread;
        let reading = replay.run(&owner.store, Wish { after, streams_of }, hello);
        match tokio::time::timeout(timeout, reading).await {
            Ok(Ok(_)) => {}
            Ok(Err(error)) => {
                debug!(connection_id = %link.id(), %error, "A client's history cannot be read.");
                link.disconnect(&Disconnect::TRY_LATER, clock::now());
            }
            Err(_) => link.disconnect(&Disconnect::TRY_LATER, clock::now()),
        }
    });
    tell
}
