//! The logic of a session's client: passes its messages to the worker, obeys the worker's commands, and announces it.

use std::{convert::Infallible, sync::Arc};

use bytes::Bytes;
use serde::Deserialize;
use tracing::{debug, info, trace, warn};
use uuid::Uuid;
use wsproxy_conn::{
    End,
    clock::{self, Micros},
};
use wsproxy_proto::{
    disconnect::{self, Disconnect},
    json,
    names::Id,
    ws::frame::Kind,
};

use crate::{
    bus::publish::{Keep, Publish},
    client::event::{Event, Unpublished},
    config::NoReceiver,
    core::{caller::Caller, recent::Who},
    endpoint::session::Sessions,
    logic::{
        Actions, Logic,
        upstream::{JSON_DEPTH_MAX, Strikes},
    },
    registry::{Transport, sessions::SessionRecord},
    telemetry::{log::MESSAGES, time},
    traces::Handover,
};

#[cfg(test)]
mod tests;

/// Logic of one client of a session.
pub struct SessionLogic {
    sessions: Arc<Sessions>,
    agent: Id,
    session: Id,
    connection: Uuid,
    transport: Transport,
    caller: Arc<Caller>,
    up: Arc<str>,
    opened: Micros,
    strikes: Strikes,
    messages_in: u32,
    bytes_in: u64,
    /// Trace of the handshake, for the announcements.
    trace: Option<Box<Handover>>,
}

impl SessionLogic {
    /// Makes the logic of a client that is about to be connected.
    #[must_use]
    pub fn new(
        sessions: Arc<Sessions>,
        (agent, session): (Id, Id),
        connection: Uuid,
        transport: Transport,
        caller: Arc<Caller>,
        trace: Option<Box<Handover>>,
    ) -> Self {
        let up = sessions.names.session_up(&session).into();
        let opened = clock::now();
        Self {
            sessions,
            agent,
            session,
            connection,
            transport,
            caller,
            up,
            opened,
            strikes: Strikes::default(),
            messages_in: 0,
            bytes_in: 0,
            trace,
        }
    }

    fn refuse(&mut self, code: &str, message: &str, actions: &mut dyn Actions<Infallible>) {
        debug!(session_id = %self.session, connection_id = %self.connection, code, message, "A client's message is invalid.");
        let Sessions { config, counters, .. } = &*self.sessions;
        let error = (code, message);
        self.strikes.refuse(error, config.strikes_max, &counters.upstream, actions);
    }

    fn keep(&self) -> Keep {
        match self.sessions.config.no_receiver {
            NoReceiver::Ignore | NoReceiver::Error => Keep::Nothing,
            NoReceiver::Queue => Keep::IfNoReceiver {
                log: self.sessions.names.session_up_log(&self.session).into(),
                entries_max: self.sessions.config.up_log_entries_max,
                bytes_max: self.sessions.config.up_log_bytes_max as u64,
                ttl: self.sessions.config.up_log_ttl,
            },
        }
    }

    fn on_unpublished(&self, unpublished: Unpublished, actions: &mut dyn Actions<Infallible>) {
        let is_error = self.sessions.config.no_receiver == NoReceiver::Error;
        let no_receiver = is_error.then_some(NO_RECEIVER);
        self.sessions.counters.upstream.tell_unpublished(unpublished, no_receiver, actions);
    }

    fn on_command(&self, payload: &[u8], actions: &mut dyn Actions<Infallible>) {
        let command = match serde_json::from_slice::<SessionCommand>(payload) {
            Ok(command) => command,
            Err(error) => return self.bad_command(&error.to_string()),
        };
        let SessionCommand::Close { code, reason, connection_id } = command;
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
        let counters = &self.sessions.counters;
        counters.bad_commands.add(1);
        if let Some(left_out) = counters.bad_command_lines.pass() {
            warn!(session_id = %self.session, connection_id = %self.connection, error, left_out,
                "A worker's command makes no sense.");
        }
    }

    fn record(&self, opened: &str) -> SessionRecord {
        SessionRecord {
            agent: self.agent.clone(),
            session: self.session.clone(),
            transport: self.transport,
            opened: opened.into(),
            trace: self.trace.clone(),
        }
    }

    /// Makes an announcement with the members that all announcements of this connection have.
    fn announcement(&self, event: &str, now: &str) -> serde_json::Value {
        let server_id = &self.sessions.server_id;
        self.record(now).announcement(event, self.connection, server_id, now)
    }

    fn announce(&self, event: &serde_json::Value, actions: &mut dyn Actions<Infallible>) {
        let announcement = Publish {
            channel: self.sessions.names.agent_sessions(&self.agent).into(),
            payload: Bytes::from(event.to_string()),
            keep: Keep::Nothing,
            receipt: None,
        };
        if let Err(error) = actions.publish(announcement) {
            let counters = &self.sessions.counters;
            counters.unannounced.add(1);
            if let Some(left_out) = counters.unannounced_lines.pass() {
                warn!(session_id = %self.session, connection_id = %self.connection, %error, left_out,
                    "An announcement is lost.");
            }
        }
    }
}

impl Logic for SessionLogic {
    type Request = Infallible;
    type Server = ();

    fn on_open(&mut self, actions: &mut dyn Actions<Infallible>) {
        let Caller { address, origin, user_agent } = &*self.caller;
        info!(session_id = %self.session, connection_id = %self.connection, agent_id = %self.agent,
            transport = self.transport.label(), address = address.map(display),
            origin = origin.as_deref(), user_agent = user_agent.as_deref(), "Connection opened.");
        let now = time::rfc3339();
        match &self.sessions.log {
            Some(log) => log.opened(self.connection, self.record(&now)),
            None => self.announce(&self.announcement("opened", &now), actions),
        }
    }

    fn on_message(&mut self, _kind: Kind, payload: &[u8], actions: &mut dyn Actions<Infallible>) {
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
            receipt: None,
        };
        self.sessions.counters.upstream.publish(message, actions);
    }

    fn on_event(&mut self, event: Event, actions: &mut dyn Actions<Infallible>) {
        match event {
            Event::Unpublished(unpublished) => self.on_unpublished(unpublished, actions),
            // The logic subscribes to commands only.
            Event::Message { payload, .. } => self.on_command(&payload, actions),
            Event::Timer
            | Event::AckWanted { .. }
            | Event::Done(_)
            | Event::ShareFree
            | Event::Inbox
            | Event::Writable => {}
        }
    }

    fn who(&self) -> Who<'_> {
        let address = self.caller.address;
        let (session, agent) = (Some(self.session.as_str()), Some(self.agent.as_str()));
        Who { session, agent, address, ..Who::default() }
    }

    fn on_end(&mut self, end: End, sent: (u64, u64), actions: &mut dyn Actions<Infallible>) {
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
        match &self.sessions.log {
            Some(log) => log.closed(self.connection, event.to_string().into()),
            None => self.announce(&event, actions),
        }
    }
}

/// Commands of workers on `session:{id}:control`.
#[derive(Debug, Deserialize)]
#[serde(
    tag = "op",
    rename_all = "snake_case",
    deny_unknown_fields,
    expecting = "an object with the member op"
)]
enum SessionCommand {
    /// Closes the session's connections, or the one with `connection_id`.
    Close { code: Option<u16>, reason: Option<String>, connection_id: Option<Uuid> },
}

/// Tag of the events that bring a worker's commands.
pub(super) const COMMANDS: u8 = 0;

/// Error for a client while no worker listens to its session.
const NO_RECEIVER: (&str, &str) = ("no_receiver", "No worker listens to this session.");
