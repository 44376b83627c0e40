//! The demo worker: answers prompts the way a language model does, with the means of any worker on the bus.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use hashbrown::HashMap;
use parking_lot::Mutex;
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::time::{MissedTickBehavior, interval};
use tracing::{debug, warn};
use uuid::Uuid;
use wsproxy_proto::names::Id;

use super::{AGENT, OWN_AGENT};
use crate::{
    bus::publish::{BusError, History, Keep, Publish},
    core::Core,
    http::rejection::Rejection,
    hub::{follower::FollowerQueue, sink::Sink, subscription::Subscription},
};

/// Answers the sessions of agent `demo` that are connected to this instance.
///
/// Invariant: at most [`SESSIONS_MAX`] tasks, one for each known session.
pub(super) struct DemoWorker {
    core: Arc<Core>,
    sessions: Mutex<HashMap<Id, Known>>,
    /// Connections of sessions of other workers, so that the page can cut these too; bounded by the connections of
    /// the instance.
    others: Mutex<HashMap<Uuid, Id>>,
}

/// State of a session.
struct Known {
    /// Connections of the session, from the announcements.
    connections: Vec<Uuid>,
    /// Time of the last request or end of a connection.
    seen: Instant,
}

/// The announcement of an opened or closed connection.
#[derive(Deserialize)]
struct Announcement {
    event: String,
    agent_id: String,
    session_id: String,
    connection_id: Uuid,
    server_id: String,
}

impl DemoWorker {
    /// Starts the worker; it ends with the instance.
    pub(super) fn start(core: &Arc<Core>) -> Arc<Self> {
        let worker = Arc::new(Self {
            core: Arc::clone(core),
            sessions: Mutex::default(),
            others: Mutex::default(),
        });
        for agent in [AGENT, OWN_AGENT] {
            worker.spawn(Arc::clone(&worker).follow_announcements(agent));
        }
        worker
    }

    /// The instance.
    pub(super) const fn core(&self) -> &Arc<Core> {
        &self.core
    }

    /// The connections of a session.
    pub(super) fn connections(&self, session: &Id) -> Vec<Uuid> {
        let mut connections = {
            let sessions = self.sessions.lock();
            sessions.get(session).map(|known| known.connections.clone()).unwrap_or_default()
        };
        let others = self.others.lock();
        connections.extend(others.iter().filter(|(_, of)| *of == session).map(|(id, _)| *id));
        connections
    }

    /// Subscribes to a session. After this has returned, the worker receives every message of a client.
    ///
    /// # Errors
    /// 503 if there are too many sessions, or if the bus refused the subscription.
    pub(super) async fn adopt(self: &Arc<Self>, session: &Id) -> Result<(), Rejection> {
        if let Some(known) = self.sessions.lock().get_mut(session) {
            known.seen = Instant::now();
            return Ok(());
        }
        let (queue, subscription) =
            self.follow(self.core.names.session_up(session), PROMPTS_BYTES_MAX).await?;
        let mut sessions = self.sessions.lock();
        if sessions.contains_key(session) {
            return Ok(()); // Another call has added the session.
        }
        if sessions.len() >= SESSIONS_MAX {
            return Err(Rejection::full("The demo worker can have no further session."));
        }
        sessions.insert(session.clone(), Known { connections: Vec::new(), seen: Instant::now() });
        drop(sessions);
        self.spawn(Arc::clone(self).serve(session.clone(), queue, subscription));
        Ok(())
    }

    fn spawn(self: &Arc<Self>, work: impl Future<Output = ()> + Send + 'static) {
        let end = self.core.followers_end.clone();
        self.core.tasks.spawn(async move {
            end.run_until_cancelled(work).await;
        });
    }

    async fn follow(
        &self,
        channel: String,
        limit: usize,
    ) -> Result<(Arc<FollowerQueue>, Subscription), BusError> {
        let queue = FollowerQueue::new(limit);
        let sink = Sink::Follower(Arc::clone(&queue));
        let subscription = self.core.hub.subscribe([(channel.into(), sink)]).await?;
        Ok((queue, subscription))
    }

    async fn follow_announcements(self: Arc<Self>, agent: &'static str) {
        let Ok(agent) = Id::parse(agent) else { return };
        let channel = self.core.names.agent_sessions(&agent);
        loop {
            let (queue, _subscription) =
                match self.follow(channel.clone(), ANNOUNCEMENTS_BYTES_MAX).await {
                    Ok(followed) => followed,
                    Err(error) => return warn!(%error, "The demo worker cannot follow sessions."),
                };
            while let Some(message) = queue.next_message().await {
                match serde_json::from_slice(&message) {
                    Ok(announcement) => self.hear(announcement).await,
                    Err(error) => debug!(%error, "An announcement could not be read."),
                }
            }
            warn!("The demo worker was too slow for the announcements.");
        }
    }

    async fn hear(self: &Arc<Self>, announcement: Announcement) {
        let Announcement { event, agent_id, session_id, connection_id, server_id } = announcement;
        // Each instance's demo worker has the sessions of its own instance.
        if server_id != *self.core.server_id {
            return;
        }
        let Ok(session) = Id::parse(&session_id) else { return };
        let opened = event == "opened";
        if agent_id != AGENT {
            return self.hear_of_another(connection_id, opened.then_some(session));
        }
        if opened && let Err(error) = self.adopt(&session).await {
            return warn!(%session, %error, "The demo worker cannot take a session.");
        }
        if let Some(known) = self.sessions.lock().get_mut(&session) {
            known.seen = Instant::now();
            if opened {
                known.connections.push(connection_id);
            } else {
                known.connections.retain(|id| *id != connection_id);
            }
        }
    }

    /// Adds or removes a connection of a session of another worker.
    fn hear_of_another(&self, connection: Uuid, opened: Option<Id>) {
        let links = self.core.runtime.links();
        let mut others = self.others.lock();
        others.remove(&connection);
        if let Some(session) = opened {
            // The announcement of an end can be lost.
            others.retain(|id, _| links.iter().any(|link| link.id() == *id));
            others.insert(connection, session);
        }
    }

    /// Answers messages, even without a client. A new message ends the answer to the one before.
    async fn serve(
        self: Arc<Self>,
        session: Id,
        queue: Arc<FollowerQueue>,
        _subscription: Subscription,
    ) {
        let mut waiting = None;
        loop {
            let heard = match waiting.take() {
                Some(heard) => heard,
                None => match tokio::time::timeout(LINGER, queue.next_message()).await {
                    Ok(heard) => heard,
                    Err(_) if self.is_abandoned(&session) => return,
                    Err(_) => continue,
                },
            };
            let Some(message) = heard else {
                self.sessions.lock().remove(&session);
                return warn!(%session, "A client sent more than the demo worker keeps.");
            };
            // The gateway lets only JSON through, but it may be of any form.
            let message: Value = serde_json::from_slice(&message).unwrap_or_default();
            match message["type"].as_str() {
                Some("prompt") => {
                    let prompt = message["text"].as_str().unwrap_or_default();
                    tokio::select! {
                        () = self.answer(&session, prompt) => {}
                        heard = queue.next_message() => waiting = Some(heard),
                    }
                    self.say(&session, json!({ "type": "done" })).await;
                }
                Some("ping") => self.say(&session, json!({ "type": "pong" })).await,
                _ => {
                    let help = r#"The demo worker takes {"type":"prompt","text":"…"}."#;
                    let body = json!({ "type": "error", "code": "unknown_type", "message": help });
                    self.say(&session, body).await;
                }
            }
        }
    }

    /// Returns whether no client has been connected for [`LINGER`]; forgets the session then.
    fn is_abandoned(&self, session: &Id) -> bool {
        let links = self.core.runtime.links();
        let mut sessions = self.sessions.lock();
        let Some(known) = sessions.get_mut(session) else { return true };
        // The announcement of an end can be lost.
        known.connections.retain(|id| links.iter().any(|link| link.id() == *id));
        let abandoned = known.connections.is_empty() && known.seen.elapsed() >= LINGER;
        if abandoned {
            sessions.remove(session);
        }
        abandoned
    }

    async fn answer(&self, session: &Id, prompt: &str) {
        let mut ticks = interval(TOKEN_EVERY);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        for token in answer_to(prompt).split_inclusive(' ') {
            ticks.tick().await;
            self.say(session, json!({ "type": "token", "text": token })).await;
        }
    }

    async fn say(&self, session: &Id, message: Value) {
        let channel = self.core.names.session_down(session);
        let history = History {
            log: self.core.names.log(&channel).into(),
            clock: None,
            event_id: None,
            dedup: None,
            unique: false,
            limits: self.core.config.history.limits(),
        };
        let publish = Publish {
            channel: channel.into(),
            payload: Bytes::from(message.to_string()),
            keep: Keep::History(Box::new(history)),
            receipt: None,
        };
        self.core.bus.publishable().await;
        if let Err(error) = self.core.hub.publish(publish) {
            debug!(%session, %error, "The bus did not take a message.");
        }
    }
}

fn answer_to(prompt: &str) -> String {
    let quoted: String = prompt.chars().take(QUOTED_CHARS_MAX).collect();
    let rest = if quoted.len() < prompt.len() { "…" } else { "" };
    format!("You said “{quoted}{rest}”. {ANSWER}")
}

/// Upper bound of sessions; each has a task.
const SESSIONS_MAX: usize = 1000;

/// Upper bound of a session's queue; a client that sends more without reading loses its worker.
const PROMPTS_BYTES_MAX: usize = 256 * 1024;

/// Upper bound of waiting announcements.
const ANNOUNCEMENTS_BYTES_MAX: usize = 4 * 1024 * 1024;

/// Time for which a session without a client is kept, for a reconnect.
const LINGER: Duration = Duration::from_secs(60);

/// Pause between tokens, that of a slow language model: a person can cut the connection within an answer, and sees that
/// it goes on.
const TOKEN_EVERY: Duration = Duration::from_millis(100);

/// Longest piece of a prompt that is quoted.
const QUOTED_CHARS_MAX: usize = 80;

/// The answer: some 150 words that describe what happens while they are sent.
const ANSWER: &str = "I am the demo worker, and I hold no socket. The core holds your WebSocket. \
    I subscribe to what your session sends, and I publish what it should get, one word at a time.\n\n\
    Stay away for a while now. I will not notice, and I will not stop: the core takes my words \
    whether you are there or not, and keeps them. When you come back, your page shows a fresh token \
    and names the last word that it has seen. The core first sends what you missed, in order and \
    once, and then whatever I am saying by then.\n\n\
    In production I would be a few lines of Python beside a model, and there would be many of me. \
    People would restart and deploy us all day, and nobody would lose a connection. It works the same \
    when the network changes, when a laptop sleeps, and when the core itself is restarted.\n\n\
    That is all there is to it: words in, words out, and the sockets are the gateway's worry.";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_outlast_an_absence_of_five_seconds() {
        let words = answer_to("").split_inclusive(' ').count() as u32;
        let takes = TOKEN_EVERY * words;
        assert!((Duration::from_secs(12)..Duration::from_secs(18)).contains(&takes), "{takes:?}");
    }

    #[test]
    fn answers_never_quote_much() {
        assert!(answer_to(&"ä".repeat(5000)).chars().count() < ANSWER.chars().count() + 120);
    }
}
