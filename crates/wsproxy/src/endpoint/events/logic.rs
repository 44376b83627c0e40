//! The logic of an event client: heartbeats, acknowledgements, messages to workers, and newer tokens.

use std::sync::Arc;

use bytes::Bytes;
use serde_json::json;
use tracing::{debug, info, trace, warn};
use uuid::Uuid;
use wsproxy_conn::{
    End,
    clock::{self, Micros},
};
use wsproxy_proto::{disconnect::Disconnect, names::Id, ws::frame::Kind};

use crate::{
    bus::publish::{Keep, Publish},
    client::event::Event,
    core::{
        acks::{AckWindow, Due, UnackedMessage},
        caller::Caller,
        recent::Who,
    },
    endpoint::events::{
        Events, Unacknowledged,
        messages::{self, FromClient, TokenVerdict},
        refresh::{CheckToken, TokenChecks},
    },
    logic::{
        Actions, Logic,
        upstream::{Strikes, tell_error},
    },
    registry::Transport,
    telemetry::{log::MESSAGES, time},
};

#[cfg(test)]
mod tests;

/// Logic of one event client.
pub struct EventLogic {
    events: Arc<Events>,
    user: Id,
    connection: Uuid,
    transport: Transport,
    caller: Arc<Caller>,
    opened: Micros,
    expires_at: Option<u64>,
    next_ping: Micros,
    /// Time of the timer that the logic asked for.
    wakes_at: Micros,
    acks: AckWindow,
    strikes: Strikes,
    messages_in: u32,
    /// The client has answered a ping.
    has_ponged: bool,
    /// A newer token is being checked.
    is_refreshing: bool,
}

impl EventLogic {
    /// Makes the logic of a client that is about to be connected. `expires_at` is its token's `exp` in unix seconds.
    #[must_use]
    pub fn new(
        events: Arc<Events>,
        user: Id,
        connection: Uuid,
        transport: Transport,
        expires_at: Option<u64>,
        caller: Arc<Caller>,
    ) -> Self {
        Self {
            events,
            user,
            connection,
            transport,
            caller,
            opened: clock::now(),
            expires_at,
            next_ping: Micros::NEVER,
            wakes_at: Micros::NEVER,
            acks: AckWindow::default(),
            strikes: Strikes::default(),
            messages_in: 0,
            has_ponged: false,
            is_refreshing: false,
        }
    }

    fn refuse(&mut self, code: &str, message: &str, actions: &mut dyn Actions<CheckToken>) {
        debug!(connection_id = %self.connection, code, message, "A client's message is invalid.");
        let Events { config, counters, .. } = &*self.events;
        let error = (code, message);
        self.strikes.refuse(error, config.strikes_max, &counters.upstream, actions);
    }

    fn send_up(&self, payload: &[u8], actions: &mut dyn Actions<CheckToken>) {
        let message = Publish {
            channel: Arc::clone(&self.events.up),
            payload: messages::upstream(self.connection, &self.user, payload),
            keep: Keep::Nothing,
            receipt: None,
        };
        self.events.counters.upstream.publish(message, actions);
    }

    fn refresh(&mut self, token: &str, actions: &mut dyn Actions<CheckToken>) {
        if self.is_refreshing {
            // One check at a time bounds the work that a client can cause.
            return self.refuse("refresh_pending", "Another token is being checked.", actions);
        }
        self.is_refreshing = true;
        actions.request(CheckToken(token.into()));
    }

    /// Sets the end of the connection to the token's `exp` plus the leeway, as in the handshake.
    fn close_in_time(&self, actions: &mut dyn Actions<CheckToken>) {
        let leeway = self.events.leeway;
        actions.expire_at(self.expires_at.map(|end| end.saturating_add(leeway)));
    }

    fn on_verdict(
        &mut self,
        verdict: Option<Box<TokenVerdict>>,
        actions: &mut dyn Actions<CheckToken>,
    ) {
        self.is_refreshing = false;
        let counters = &self.events.counters;
        match verdict.map(|verdict| *verdict) {
            Some(TokenVerdict::Good { user, expires_at }) if user == self.user.as_str() => {
                counters.refreshed.add(1);
                debug!(connection_id = %self.connection, "A newer token was accepted.");
                self.expires_at = expires_at;
                self.close_in_time(actions);
                tell(&messages::refreshed(expires_at), actions);
            }
            Some(TokenVerdict::Good { .. }) => {
                counters.refresh_refused.add(1);
                info!(connection_id = %self.connection, user_id = %self.user, "A token of another user ends the connection.");
                let reason = "token of another user";
                actions.finish(&Disconnect::EXPIRED, Disconnect::EXPIRED.code, reason);
            }
            Some(TokenVerdict::Bad { code, message }) => {
                counters.refresh_refused.add(1);
                debug!(connection_id = %self.connection, code, "A newer token was refused.");
                tell_error(&code, &message, actions);
            }
            None => tell_error("internal", "The token was not checked.", actions),
        }
    }

    fn await_ack(
        &mut self,
        event_id: Bytes,
        message: Bytes,
        actions: &mut dyn Actions<CheckToken>,
    ) {
        self.events.counters.ack_wanted.add(1);
        let patience = self.events.patience;
        for waiting in self.acks.add(event_id, message, actions.now(), &patience) {
            self.give_up(&waiting, Unacknowledged::Overflow, actions);
        }
        self.plan(actions);
    }

    fn on_ack(&mut self, event_id: &str, actions: &mut dyn Actions<CheckToken>) {
        let Some(waiting) = self.acks.acked(event_id.as_bytes()) else {
            // The `ack` is late or repeated, or for a message of another connection.
            self.events.counters.acks_unknown.add(1);
            return;
        };
        self.events.counters.acknowledged.add(1);
        self.report("acknowledged", &waiting, None, actions);
    }

    fn give_up(
        &self,
        waiting: &UnackedMessage,
        why: Unacknowledged,
        actions: &mut dyn Actions<CheckToken>,
    ) {
        self.events.counters.unacknowledged[why as usize].add(1);
        self.report("unacknowledged", waiting, Some(why.label()), actions);
    }

    fn report(
        &self,
        event: &str,
        waiting: &UnackedMessage,
        reason: Option<&str>,
        actions: &mut dyn Actions<CheckToken>,
    ) {
        let mut report = json!({
            "event": event,
            "event_id": String::from_utf8_lossy(&waiting.event_id),
            "connection_id": self.connection,
            "user_id": self.user.as_str(),
            "tries": waiting.tries,
            "server_id": &*self.events.server_id,
            "timestamp": time::rfc3339(),
        });
        if let Some(reason) = reason {
            report["reason"] = reason.into();
        }
        let report = Publish {
            channel: Arc::clone(&self.events.reports),
            payload: report.to_string().into(),
            keep: Keep::Nothing,
            receipt: None,
        };
        if let Err(error) = actions.publish(report) {
            let counters = &self.events.counters;
            counters.unreported.add(1);
            if let Some(left_out) = counters.unreported_lines.pass() {
                warn!(connection_id = %self.connection, %error, left_out,
                    "A report on an acknowledgement is lost.");
            }
        }
    }

    fn on_timer(&mut self, actions: &mut dyn Actions<CheckToken>) {
        self.wakes_at = Micros::NEVER;
        let now = actions.now();
        // Ask before this turn queues messages of its own.
        let is_backed_up = actions.is_backed_up();
        if now >= self.next_ping {
            self.next_ping = now.after(self.events.heartbeat.interval.into());
            actions.send(Kind::Text, messages::beat("ping").as_bytes());
        }
        let patience = self.events.patience;
        if is_backed_up {
            // The client has not read the first copies yet: more copies would only fill its queue.
            self.acks.postpone(now, &patience);
        }
        while let Some(due) = self.acks.due(now, &patience) {
            match due {
                Due::Resend(message) => {
                    self.events.counters.resent.add(1);
                    actions.send_verbatim(Kind::Text, &message);
                }
                Due::GiveUp(waiting) => self.give_up(&waiting, Unacknowledged::Tries, actions),
            }
        }
        self.plan(actions);
    }

    /// Asks for a timer at the next due time, unless an earlier timer is set.
    fn plan(&mut self, actions: &mut dyn Actions<CheckToken>) {
        let next = self.acks.next().unwrap_or(Micros::NEVER).min(self.next_ping);
        if next < self.wakes_at {
            self.wakes_at = next;
            actions.wake_at(next);
        }
    }
}

impl Logic for EventLogic {
    type Request = CheckToken;
    type Server = TokenChecks;

    fn on_open(&mut self, actions: &mut dyn Actions<CheckToken>) {
        let Caller { address, origin, user_agent } = &*self.caller;
        info!(connection_id = %self.connection, user_id = %self.user,
            transport = self.transport.label(), address = address.map(display),
            origin = origin.as_deref(), user_agent = user_agent.as_deref(), "Connection opened.");
        self.close_in_time(actions);
        self.next_ping = actions.now().after(self.events.heartbeat.interval.into());
        self.plan(actions);
    }

    fn on_message(&mut self, _kind: Kind, payload: &[u8], actions: &mut dyn Actions<CheckToken>) {
        self.messages_in += 1;
        trace!(target: MESSAGES, user_id = %self.user, connection_id = %self.connection,
            bytes = payload.len(), "A client's message came.");
        match messages::parse(payload) {
            Ok(FromClient::Pong) => self.has_ponged = true,
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

    fn on_event(&mut self, event: Event, actions: &mut dyn Actions<CheckToken>) {
        match event {
            Event::Timer => self.on_timer(actions),
            Event::AckWanted { event_id, message } => self.await_ack(event_id, message, actions),
            Event::Unpublished(unpublished) => {
                let counters = &self.events.counters.upstream;
                counters.tell_unpublished(unpublished, None, actions);
            }
            Event::Done(result) => self.on_verdict(result.downcast().ok(), actions),
            Event::Message { .. } | Event::ShareFree | Event::Inbox | Event::Writable => {}
        }
    }

    fn who(&self) -> Who<'_> {
        let address = self.caller.address;
        Who { user: Some(self.user.as_str()), address, ..Who::default() }
    }

    fn on_end(&mut self, end: End, sent: (u64, u64), actions: &mut dyn Actions<CheckToken>) {
        for waiting in self.acks.drain() {
            self.give_up(&waiting, Unacknowledged::Closed, actions);
        }
        let duration = std::time::Duration::from(clock::now().since(self.opened));
        // A client that never answers pings looks like a dead network: tell the operator the difference.
        let is_unanswered = end.why.label == Disconnect::HEARTBEAT.label && !self.has_ponged;
        let error = is_unanswered.then_some(UNANSWERED);
        let Caller { address, origin, user_agent } = &*self.caller;
        info!(connection_id = %self.connection, user_id = %self.user,
            transport = self.transport.label(), address = address.map(display),
            origin = origin.as_deref(), user_agent = user_agent.as_deref(), reason = end.why.label,
            code = end.code, duration_ms = duration.as_millis() as u64,
            messages_in = self.messages_in, messages_out = sent.0, error, "Connection closed.");
    }
}

fn tell(message: &str, actions: &mut dyn Actions<CheckToken>) {
    actions.reply(Kind::Text, message.as_bytes());
}

/// Error in the log for a silent client that never answered a ping.
const UNANSWERED: &str =
    r#"no ping was answered: the client must answer {"type":"ping"} with {"type":"pong"}"#;
