//! Resuming: reads the position from a client's request, and replays the histories from there.

use std::sync::Arc;

use http::HeaderMap;
use percent_encoding::percent_decode_str;
use tokio::sync::oneshot;
use tracing::debug;
use wsproxy_conn::{Link, clock};
use wsproxy_proto::{
    disconnect::Disconnect,
    history::{After, Lost, Position},
    names::Id,
};

use crate::{
    core::Core,
    http::rejection::Rejection,
    hub::{
        replay::{self, Replay, ResumeOutcome, Wish},
        sink::Sink,
        subscription::Subscription,
        track::Histories,
    },
};

/// The resume that a client's request asks for.
#[derive(Debug, Default)]
pub struct ResumeRequest {
    /// Position or event behind which the client wants to continue.
    pub after: Option<After>,
    /// The client sent the parameter or the header, even an empty one, so it wants to know its position.
    pub asked: bool,
    /// The client sends the position in its first message.
    pub in_frame: bool,
}

impl ResumeRequest {
    /// Reads the parameters `last_event_id` and `resume`, and the header `Last-Event-ID`. The header
    /// wins: an `EventSource` reconnects with its old URL and a new header.
    ///
    /// # Errors
    /// 400: a parameter or the header is malformed.
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
}

fn parse(text: &str) -> Result<Option<After>, Rejection> {
    After::parse(text).map_err(|error| bad_event_id(&error.to_string()))
}

fn bad_event_id(why: &str) -> Rejection {
    Rejection::bad_request(format!("last_event_id {why}."))
}

/// A subscribed client.
pub struct Subscribed {
    subscription: Subscription,
    pending: Option<PendingReplay>,
}

/// Replay that waits for the position in the client's first message.
pub struct PendingReplay {
    replay: Replay,
    streams_of: Option<Id>,
    hello: Box<dyn FnOnce(ResumeOutcome, Option<Position>) -> Option<String> + Send>,
}

impl Subscribed {
    /// Splits the client's parts into the guard of the subscription and the pending replay.
    pub(super) fn parts(self) -> (Option<Subscription>, Option<PendingReplay>) {
        (Some(self.subscription), self.pending)
    }
}

/// The topics of a client.
pub struct ClientTopics {
    /// Sink of the topics' messages.
    pub sink: Sink,
    /// Names of the topics.
    pub names: Vec<Arc<str>>,
    /// Subscription that was reserved for the client.
    pub reserved: Option<Subscription>,
    /// Session whose token streams the client gets.
    pub streams_of: Option<Id>,
    /// Name under which the client's resumes are limited.
    pub counted_as: String,
}

/// Subscribes a client and replays the messages that it missed. `hello` makes the first message from the outcome of the
/// resume and, unless the client resumes, its position.
///
/// # Errors
/// 429: the client resumes too often. 503, 504: the bus or the store is away or slow.
pub async fn subscribe(
    core: &Core,
    histories: Option<&Arc<Histories>>,
    topics: ClientTopics,
    resume: &ResumeRequest,
    hello: impl FnOnce(ResumeOutcome, Option<Position>) -> Option<String> + Send + 'static,
) -> Result<Subscribed, Rejection> {
    let ClientTopics { sink, names, reserved, streams_of, counted_as } = topics;
    let hub = &core.hub;
    let Some(histories) = histories else {
        let sinks = names.into_iter().map(|name| (name, sink.clone()));
        let subscription = hub.subscribe_beside(reserved, sinks).await?;
        let lost = resume.after.is_some().then_some(Lost::Disabled);
        replay::send_hello(hub, &sink, hello(ResumeOutcome::Fresh, None), lost);
        return Ok(Subscribed { subscription, pending: None });
    };
    if resume.after.is_some() || resume.in_frame {
        core.resumes.take(&counted_as, clock::now()).map_err(Rejection::too_often)?;
    }
    let held = replay::subscribe_behind_fence(hub, sink, names, Arc::clone(histories), reserved);
    let (subscription, replay) = held.await?;
    if resume.in_frame {
        let pending = PendingReplay { replay, streams_of, hello: Box::new(hello) };
        return Ok(Subscribed { subscription, pending: Some(pending) });
    }
    let wish = Wish { after: resume.after.clone(), streams_of };
    replay.run(&core.store, wish, hello).await?;
    Ok(Subscribed { subscription, pending: None })
}

/// Spawns a task that waits for the position in the client's first message and then runs the replay. The handler gets
/// the first message, and tells the position through the returned sender.
pub(super) fn in_frame(
    core: &Arc<Core>,
    pending: PendingReplay,
    link: &Arc<Link>,
) -> oneshot::Sender<Option<After>> {
    let (tell, told) = oneshot::channel();
    let (owner, link) = (Arc::clone(core), Arc::clone(link));
    core.tasks.spawn(async move {
        let timeout = owner.config.server.handshake_timeout;
        let after = tokio::time::timeout(timeout, told).await.ok().and_then(Result::ok).flatten();
        if link.is_closing() {
            return;
        }
        let PendingReplay { replay, streams_of, hello } = pending;
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
