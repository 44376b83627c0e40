//! A client of the event endpoint: its heartbeat, its acknowledgements, its messages, its newer tokens.

use std::sync::Arc;

use bytes::Bytes;
use serde_json::json;
use tracing::{debug, info, trace, warn};
use uuid::Uuid;
use wsproxy_conn::{
    End, Event,
    clock::{self, Micros},
    link::TIMER,
};
use wsproxy_proto::{
    disconnect::Disconnect,
    names::{Id, Names},
    ws::frame::Kind,
};

use crate::{
    bus::{BusError, Keep, Publish},
    config::{self, Config, Heartbeat},
    endpoint::{
        Actions, Logic, PUBLISHED, Unpublished,
        caller::Caller,
        events::{
            acks::{AckWindow, Due, Patience, Waiting},
            messages::{FromClient, Verdict},
        },
    },
    hub::WANTS_ACK,
    registry::Transport,
    telemetry::{counter::Counter, log::MESSAGES, throttle::Throttle, time},
};

pub mod acks;
pub mod messages;
#[cfg(test)]
mod tests;

/// [`Event::tag`]: what became of a token for which [`Actions::verify`] was asked; a [`Verdict`].
pub const VERIFIED: u8 = 1;

/// Most bytes of messages that wait for one client's `ack`; events are small.
const ACK_BYTES_MAX: usize = 1024 * 1024;

/// What all clients of the event endpoint have in common.
#[derive(Debug)]
pub struct EventEndpoint {
    /// `[events]`
    pub config: config::Events,
    /// `[heartbeat]`
    pub heartbeat: Heartbeat,
    /// Which instance this is.
    pub server_id: Arc<str>,
    /// Channel from all clients to the workers.
    up: Arc<str>,
    /// Channel that tells workers what was acknowledged.
    reports: Arc<str>,
    patience: Patience,
    /// `jwt.leeway`: for so many seconds after its `exp` a token stays good.
    leeway: u64,
    /// What happened; the metrics read it.
    pub counters: EventCounters,
}

/// What the event endpoint counts beyond what every connection counts.
#[derive(Debug, Default)]
pub struct EventCounters {
    /// Messages from clients that were refused.
    pub invalid: Counter,
    /// Messages from clients that no worker received.
    pub unheard: Counter,
    /// Messages from clients that the bus lost.
    pub lost: Counter,
    /// Messages from clients that the bus did not take.
    pub refused: Counter,
    /// Messages that wanted an `ack`.
    pub ack_wanted: Counter,
    /// Messages that were acknowledged.
    pub acknowledged: Counter,
    /// Messages that were sent again.
    pub resent: Counter,
    /// Messages that were given up, by [`Unacknowledged`].
    pub unacknowledged: [Counter; Unacknowledged::ALL.len()],
    /// Acknowledgements of messages that did not wait for one.
    pub acks_unknown: Counter,
    /// Reports on acknowledgements that the bus did not take.
    pub unreported: Counter,
    /// Of log lines about these.
    pub unreported_lines: Throttle,
    /// Newer tokens that were good.
    pub refreshed: Counter,
    /// Newer tokens that were not.
    pub refresh_refused: Counter,
}

/// Why a message is given up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unacknowledged {
    /// It was sent often enough.
    Tries,
    /// Too many wait.
    Overflow,
    /// The connection is over.
    Closed,
}

impl Unacknowledged {
    /// All of them, in the order of their numbers.
    pub const ALL: [Self; 3] = [Self::Tries, Self::Overflow, Self::Closed];

    /// In reports and metrics.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::Tries => "tries",
            Self::Overflow => "overflow",
            Self::Closed => "closed",
        }
    }
}

impl EventEndpoint {
    /// Under this configuration.
    #[must_use]
    pub fn new(config: &Config, names: &Names, server_id: &Arc<str>) -> Self {
        let leeway = config.jwt.leeway_seconds();
        let (config, heartbeat) = (config.events.clone(), config.heartbeat.clone());
        let patience = Patience {
            interval: config.ack_interval.into(),
            tries_max: config.ack_tries,
            messages_max: config.ack_queue,
            bytes_max: ACK_BYTES_MAX,
        };
        Self {
            patience,
            leeway,
            heartbeat,
            server_id: Arc::clone(server_id),
            up: names.events("up").into(),
            reports: names.events("acks").into(),
            config,
            counters: EventCounters::default(),
        }
    }
}

/// One client.
#[derive(Debug)]
pub struct EventLogic {
    endpoint: Arc<EventEndpoint>,
    user: Id,
    connection: Uuid,
    transport: Transport,
    caller: Arc<Caller>,
    opened: Micros,
    expires_at: Option<u64>,
    next_ping: Micros,
    /// For when we asked to be woken.
    wakes_at: Micros,
    acks: AckWindow,
    strikes: u32,
    messages_in: u32,
    /// A newer token is being looked at.
    is_refreshing: bool,
}

impl EventLogic {
    /// A client that is about to be connected, with a token whose `exp` is `expires_at` (unix seconds).
    #[must_use]
    pub fn new(
        endpoint: Arc<EventEndpoint>,
        user: Id,
        connection: Uuid,
        transport: Transport,
        expires_at: Option<u64>,
        caller: Arc<Caller>,
    ) -> Self {
        Self {
            endpoint,
            user,
            connection,
            transport,
            caller,
            opened: clock::now(),
            expires_at,
            next_ping: Micros::NEVER,
            wakes_at: Micros::NEVER,
            acks: AckWindow::default(),
            strikes: 0,
            messages_in: 0,
            is_refreshing: false,
        }
    }

    fn refuse(&mut self, code: &str, message: &str, actions: &mut dyn Actions) {
        self.endpoint.counters.invalid.add(1);
        self.strikes += 1;
        debug!(connection_id = %self.connection, code, message, "A client's message is invalid.");
        let strikes_max = self.endpoint.config.strikes_max;
        if strikes_max > 0 && self.strikes >= strikes_max {
            actions.disconnect(&Disconnect::STRIKES);
        } else {
            tell(&messages::error(code, message), actions);
        }
    }

    fn send_up(&self, payload: &[u8], actions: &mut dyn Actions) {
        let message = Publish {
            channel: Arc::clone(&self.endpoint.up),
            payload: messages::upstream(self.connection, &self.user, payload),
            keep: Keep::Nothing,
            receipt: Some(actions.receipt()),
        };
        match actions.publish(message) {
            Ok(()) => {}
            Err(BusError::Closed) => actions.disconnect(&Disconnect::RESTART),
            Err(error) => self.on_unpublished((&error).into(), actions),
        }
    }

    fn on_unpublished(&self, unpublished: Unpublished, actions: &mut dyn Actions) {
        let counters = &self.endpoint.counters;
        match unpublished {
            Unpublished::Unheard => counters.unheard.add(1),
            Unpublished::Lost => counters.lost.add(1),
            Unpublished::Refused { .. } => counters.refused.add(1),
        }
        if let Some((code, message)) = unpublished.error() {
            tell(&messages::error(code, message), actions);
        }
    }

    fn refresh(&mut self, token: &str, actions: &mut dyn Actions) {
        if self.is_refreshing {
            // One at a time: whoever sends more has no use for the answers.
            return self.refuse("refresh_pending", "Another token is being looked at.", actions);
        }
        self.is_refreshing = true;
        actions.verify(token);
    }

    /// The token is good until its `exp` and the leeway, here as in the handshake.
    fn close_in_time(&self, actions: &mut dyn Actions) {
        let leeway = self.endpoint.leeway;
        actions.expire_at(self.expires_at.map(|end| end.saturating_add(leeway)));
    }

    fn on_verdict(&mut self, verdict: Option<Verdict>, actions: &mut dyn Actions) {
        self.is_refreshing = false;
        let counters = &self.endpoint.counters;
        match verdict {
            Some(Verdict::Good { user, expires_at }) if user == self.user.as_str() => {
                counters.refreshed.add(1);
                debug!(connection_id = %self.connection, "A newer token was accepted.");
                self.expires_at = expires_at;
                self.close_in_time(actions);
                tell(&messages::refreshed(expires_at), actions);
            }
            Some(Verdict::Good { .. }) => {
                counters.refresh_refused.add(1);
                info!(connection_id = %self.connection, user_id = %self.user, "A token of another user ends the connection.");
                let reason = "token of another user";
                actions.finish(&Disconnect::EXPIRED, Disconnect::EXPIRED.code, reason);
            }
            Some(Verdict::Bad { code, message }) => {
                counters.refresh_refused.add(1);
                debug!(connection_id = %self.connection, code, "A newer token was refused.");
                tell(&messages::error(&code, &message), actions);
            }
            None => tell(&messages::error("internal", "The token was not looked at."), actions),
        }
    }

    /// The first `id_bytes` of `sent` are the id, the rest is what the client gets.
    fn await_ack(&mut self, mut sent: Bytes, id_bytes: u64, actions: &mut dyn Actions) {
        let id_bytes = usize::try_from(id_bytes).unwrap_or(usize::MAX).min(sent.len());
        let event_id = sent.split_to(id_bytes);
        self.endpoint.counters.ack_wanted.add(1);
        let patience = self.endpoint.patience;
        for waiting in self.acks.add(event_id, sent, actions.now(), &patience) {
            self.give_up(&waiting, Unacknowledged::Overflow, actions);
        }
        self.plan(actions);
    }

    fn on_ack(&mut self, event_id: &str, actions: &mut dyn Actions) {
        let Some(waiting) = self.acks.acked(event_id.as_bytes()) else {
            // Too late, twice, or somebody else's.
            self.endpoint.counters.acks_unknown.add(1);
            return;
        };
        self.endpoint.counters.acknowledged.add(1);
        self.report("acknowledged", &waiting, None, actions);
    }

    fn give_up(&self, waiting: &Waiting, why: Unacknowledged, actions: &mut dyn Actions) {
        self.endpoint.counters.unacknowledged[why as usize].add(1);
        self.report("unacknowledged", waiting, Some(why.label()), actions);
    }

    fn report(
        &self,
        event: &str,
        waiting: &Waiting,
        reason: Option<&str>,
        actions: &mut dyn Actions,
    ) {
        let mut report = json!({
            "event": event,
            "event_id": String::from_utf8_lossy(&waiting.event_id),
            "connection_id": self.connection,
            "user_id": self.user.as_str(),
            "tries": waiting.tries,
            "server_id": &*self.endpoint.server_id,
            "timestamp": time::rfc3339(),
        });
        if let Some(reason) = reason {
            report["reason"] = reason.into();
        }
        let report = Publish {
            channel: Arc::clone(&self.endpoint.reports),
            payload: report.to_string().into(),
            keep: Keep::Nothing,
            receipt: None,
        };
        if let Err(error) = actions.publish(report) {
            let counters = &self.endpoint.counters;
            counters.unreported.add(1);
            if let Some(left_out) = counters.unreported_lines.pass() {
                warn!(connection_id = %self.connection, %error, left_out,
                    "A report on an acknowledgement is lost.");
            }
        }
    }

    fn on_timer(&mut self, actions: &mut dyn Actions) {
        self.wakes_at = Micros::NEVER;
        let now = actions.now();
        // Before anything of this turn waits too.
        let is_backed_up = actions.is_backed_up();
        if now >= self.next_ping {
            self.next_ping = now.after(self.endpoint.heartbeat.interval.into());
            actions.send(Kind::Text, messages::beat("ping").as_bytes());
        }
        let patience = self.endpoint.patience;
        if is_backed_up {
            // Sending again what the client has not even read would only bring its end nearer.
            self.acks.postpone(now, &patience);
        }
        while let Some(due) = self.acks.due(now, &patience) {
            match due {
                Due::Resend(message) => {
                    self.endpoint.counters.resent.add(1);
                    actions.resend(Kind::Text, &message);
                }
                Due::GiveUp(waiting) => self.give_up(&waiting, Unacknowledged::Tries, actions),
            }
        }
        self.plan(actions);
    }

    /// Asks to be woken when something is due, unless that is known.
    fn plan(&mut self, actions: &mut dyn Actions) {
        let next = self.acks.next().unwrap_or(Micros::NEVER).min(self.next_ping);
        if next < self.wakes_at {
            self.wakes_at = next;
            actions.wake_at(next);
        }
    }
}

impl Logic for EventLogic {
    fn on_open(&mut self, actions: &mut dyn Actions) {
        let Caller { address, origin, user_agent } = &*self.caller;
        info!(connection_id = %self.connection, user_id = %self.user,
            transport = self.transport.label(), address = address.map(display),
            origin = origin.as_deref(), user_agent = user_agent.as_deref(), "Connection opened.");
        self.close_in_time(actions);
        self.next_ping = actions.now().after(self.endpoint.heartbeat.interval.into());
        self.plan(actions);
    }

    fn on_message(&mut self, _kind: Kind, payload: &[u8], actions: &mut dyn Actions) {
        self.messages_in += 1;
        trace!(target: MESSAGES, user_id = %self.user, connection_id = %self.connection,
            bytes = payload.len(), "A client's message came.");
        match messages::parse(payload) {
            Ok(FromClient::Pong) => {}
            Ok(FromClient::Ping) => tell(&messages::beat("pong"), actions),
            Ok(FromClient::Ack(event_id)) => self.on_ack(&event_id, actions),
            Ok(FromClient::Refresh(token)) => self.refresh(&token, actions),
            Ok(FromClient::Resume) => {
                let message = "Only the first message can resume, and only with ?resume=frame.";
                self.refuse("invalid_message", message, actions);
            }
            Ok(FromClient::Other) => self.send_up(payload, actions),
            Err(invalid) => self.refuse(invalid.code, &invalid.message, actions),
        }
    }

    fn on_event(&mut self, event: Event, actions: &mut dyn Actions) {
        match event.tag {
            TIMER => self.on_timer(actions),
            WANTS_ACK => self.await_ack(event.payload, event.number, actions),
            PUBLISHED => self.on_unpublished(Unpublished::from_number(event.number), actions),
            VERIFIED => self.on_verdict(Verdict::from_bytes(&event.payload), actions),
            _ => {}
        }
    }

    fn on_end(&mut self, end: End, sent: (u64, u64), actions: &mut dyn Actions) {
        for waiting in self.acks.drain() {
            self.give_up(&waiting, Unacknowledged::Closed, actions);
        }
        let duration = std::time::Duration::from(clock::now().since(self.opened));
        let Caller { address, origin, user_agent } = &*self.caller;
        info!(connection_id = %self.connection, user_id = %self.user,
            transport = self.transport.label(), address = address.map(display),
            origin = origin.as_deref(), user_agent = user_agent.as_deref(), reason = end.why.label,
            code = end.code, duration_ms = duration.as_millis() as u64,
            messages_in = self.messages_in, messages_out = sent.0, "Connection closed.");
    }
}

fn tell(message: &str, actions: &mut dyn Actions) {
    actions.reply(Kind::Text, message.as_bytes());
}
