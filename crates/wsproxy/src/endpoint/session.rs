//! A client of a session: what its messages, its worker's commands and its end lead to.

use std::sync::Arc;

use bytes::Bytes;
use serde::Deserialize;
use tracing::{debug, info, trace, warn};
use uuid::Uuid;
use wsproxy_conn::{
    End, Event,
    clock::{self, Micros},
};
use wsproxy_proto::{
    disconnect::{self, Disconnect},
    json,
    names::{Id, Names},
    ws::frame::Kind,
};

use crate::{
    bus::{BusError, Keep, Publish},
    config::{NoReceiver, Sessions},
    endpoint::{Actions, Logic, PUBLISHED, Unpublished, caller::Caller},
    registry::{
        Transport,
        sessions::{Record, SessionLog},
    },
    telemetry::{counter::Counter, log::MESSAGES, throttle::Throttle, time},
};

/// [`Event::tag`]: a worker's command.
pub const CONTROL: u8 = 1;

/// Deepest nesting of a client's JSON. Python's parser gives up near 1,000, most workers' earlier.
const JSON_DEPTH_MAX: usize = 128;

/// What all sessions have in common.
pub struct SessionEndpoint {
    /// `[sessions]`
    pub config: Sessions,
    /// How channels are spelled.
    pub names: Names,
    /// Which instance this is.
    pub server_id: Arc<str>,
    /// Where opened and closed sessions are kept; `None`: they are only announced.
    pub log: Option<Arc<SessionLog>>,
    /// What went wrong; the metrics read it.
    pub counters: SessionCounters,
}

/// What sessions count beyond what every connection counts.
#[derive(Debug, Default)]
pub struct SessionCounters {
    /// Messages from clients that were not JSON.
    pub invalid: Counter,
    /// Messages from clients that no worker received.
    pub unheard: Counter,
    /// Messages from clients that the bus lost.
    pub lost: Counter,
    /// Messages from clients that the bus did not take.
    pub refused: Counter,
    /// Commands from workers that made no sense.
    pub bad_commands: Counter,
    /// Announcements of opened and closed sessions that the bus did not take.
    pub unannounced: Counter,
    /// Of log lines about these.
    pub unannounced_lines: Throttle,
    /// Of log lines about commands that made no sense.
    pub bad_command_lines: Throttle,
}

/// One client of a session.
pub struct SessionLogic {
    endpoint: Arc<SessionEndpoint>,
    agent: Id,
    session: Id,
    connection: Uuid,
    transport: Transport,
    caller: Arc<Caller>,
    up: Arc<str>,
    opened: Micros,
    strikes: u32,
    messages_in: u32,
    bytes_in: u64,
}

impl SessionLogic {
    /// A client that is about to be connected.
    #[must_use]
    pub fn new(
        endpoint: Arc<SessionEndpoint>,
        agent: Id,
        session: Id,
        connection: Uuid,
        transport: Transport,
        caller: Arc<Caller>,
    ) -> Self {
        let up = endpoint.names.session_up(&session).into();
        let opened = clock::now();
        Self {
            endpoint,
            agent,
            session,
            connection,
            transport,
            caller,
            up,
            opened,
            strikes: 0,
            messages_in: 0,
            bytes_in: 0,
        }
    }

    fn refuse(&mut self, code: &str, message: &str, actions: &mut dyn Actions) {
        self.endpoint.counters.invalid.add(1);
        self.strikes += 1;
        debug!(session_id = %self.session, connection_id = %self.connection, code, message, "A client's message is invalid.");
        if self.endpoint.config.strikes_max > 0 && self.strikes >= self.endpoint.config.strikes_max
        {
            actions.disconnect(&Disconnect::STRIKES);
        } else {
            error_message(code, message, actions);
        }
    }

    fn keep(&self) -> Keep {
        match self.endpoint.config.no_receiver {
            NoReceiver::Ignore | NoReceiver::Error => Keep::Nothing,
            NoReceiver::Queue => Keep::Unheard {
                log: self.endpoint.names.session_up_log(&self.session).into(),
                entries_max: self.endpoint.config.up_log_entries_max,
                bytes_max: self.endpoint.config.up_log_bytes_max as u64,
                ttl: self.endpoint.config.up_log_ttl,
            },
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
            error_message(code, message, actions);
        } else if self.endpoint.config.no_receiver == NoReceiver::Error {
            error_message("no_receiver", "No worker listens to this session.", actions);
        }
    }

    fn on_command(&self, payload: &[u8], actions: &mut dyn Actions) {
        let command = match serde_json::from_slice::<Command>(payload) {
            Ok(command) => command,
            Err(error) => return self.bad_command(&error.to_string()),
        };
        let Command::Close { code, reason, connection_id } = command;
        if connection_id.is_some_and(|wanted| wanted != self.connection) {
            return;
        }
        let code = code.unwrap_or(Disconnect::BACKEND.code);
        if !disconnect::is_sendable(code) {
            return self.bad_command(&format!("{code} is no close code"));
        }
        let reason = reason.as_deref().unwrap_or(Disconnect::BACKEND.reason);
        actions.finish(&Disconnect::BACKEND, code, reason);
    }

    fn bad_command(&self, error: &str) {
        let counters = &self.endpoint.counters;
        counters.bad_commands.add(1);
        if let Some(left_out) = counters.bad_command_lines.pass() {
            warn!(session_id = %self.session, connection_id = %self.connection, error, left_out,
                "A worker's command makes no sense.");
        }
    }

    fn record(&self, opened: &str) -> Record {
        Record {
            agent: self.agent.clone(),
            session: self.session.clone(),
            transport: self.transport,
            opened: opened.into(),
        }
    }

    /// The members that all announcements of this connection begin with.
    fn announcement(&self, event: &str, now: &str) -> serde_json::Value {
        let server_id = &self.endpoint.server_id;
        self.record(now).announcement(event, self.connection, server_id, now)
    }

    fn announce(&self, event: &serde_json::Value, actions: &mut dyn Actions) {
        let announcement = Publish {
            channel: self.endpoint.names.agent_sessions(&self.agent).into(),
            payload: Bytes::from(event.to_string()),
            keep: Keep::Nothing,
            receipt: None,
        };
        if let Err(error) = actions.publish(announcement) {
            let counters = &self.endpoint.counters;
            counters.unannounced.add(1);
            if let Some(left_out) = counters.unannounced_lines.pass() {
                warn!(session_id = %self.session, connection_id = %self.connection, %error, left_out,
                    "An announcement is lost.");
            }
        }
    }
}

impl Logic for SessionLogic {
    fn on_open(&mut self, actions: &mut dyn Actions) {
        let Caller { address, origin, user_agent } = &*self.caller;
        info!(session_id = %self.session, connection_id = %self.connection, agent_id = %self.agent,
            transport = self.transport.label(), address = address.map(display),
            origin = origin.as_deref(), user_agent = user_agent.as_deref(), "Connection opened.");
        let now = time::rfc3339();
        match &self.endpoint.log {
            Some(log) => log.opened(self.connection, self.record(&now)),
            None => self.announce(&self.announcement("opened", &now), actions),
        }
    }

    fn on_message(&mut self, _kind: Kind, payload: &[u8], actions: &mut dyn Actions) {
        self.messages_in += 1;
        self.bytes_in += payload.len() as u64;
        trace!(target: MESSAGES, session_id = %self.session, connection_id = %self.connection,
            bytes = payload.len(), "A client's message came.");
        if let Err(error) = json::validate(payload, JSON_DEPTH_MAX) {
            return self.refuse("invalid_json", &error.to_string(), actions);
        }
        let message = Publish {
            channel: Arc::clone(&self.up),
            payload: Bytes::copy_from_slice(payload),
            keep: self.keep(),
            receipt: Some(actions.receipt()),
        };
        match actions.publish(message) {
            Ok(()) => {}
            Err(BusError::Closed) => actions.disconnect(&Disconnect::RESTART),
            Err(error) => self.on_unpublished((&error).into(), actions),
        }
    }

    fn on_event(&mut self, event: Event, actions: &mut dyn Actions) {
        match event.tag {
            PUBLISHED => self.on_unpublished(Unpublished::from_number(event.number), actions),
            CONTROL => self.on_command(&event.payload, actions),
            _ => {}
        }
    }

    fn on_end(&mut self, end: End, sent: (u64, u64), actions: &mut dyn Actions) {
        let duration = std::time::Duration::from(clock::now().since(self.opened));
        let Caller { address, origin, user_agent } = &*self.caller;
        info!(session_id = %self.session, connection_id = %self.connection, agent_id = %self.agent,
            transport = self.transport.label(), address = address.map(display),
            origin = origin.as_deref(), user_agent = user_agent.as_deref(),
            reason = end.why.label, code = end.code, duration_ms = duration.as_millis() as u64,
            messages_in = self.messages_in, messages_out = sent.0, "Connection closed.");
        let mut event = self.announcement("closed", &time::rfc3339());
        event["reason"] = end.why.label.into();
        event["code"] = end.code.into();
        event["duration_ms"] = (duration.as_millis() as u64).into();
        event["messages_in"] = self.messages_in.into();
        event["messages_out"] = sent.0.into();
        event["bytes_in"] = self.bytes_in.into();
        event["bytes_out"] = sent.1.into();
        match &self.endpoint.log {
            Some(log) => log.closed(self.connection, event.to_string().into()),
            None => self.announce(&event, actions),
        }
    }
}

/// What a worker may command on `session:{id}:control`.
#[derive(Debug, Deserialize)]
#[serde(tag = "op", rename_all = "snake_case", deny_unknown_fields)]
enum Command {
    /// End the session's connections, or one of them.
    Close { code: Option<u16>, reason: Option<String>, connection_id: Option<Uuid> },
}

fn error_message(code: &str, message: &str, actions: &mut dyn Actions) {
    let body = serde_json::json!({ "type": "error", "code": code, "message": message });
    actions.reply(Kind::Text, body.to_string().as_bytes());
}
