//! Clients' messages to workers: counts invalid messages as strikes, and tells the client which messages no worker got.

use wsproxy_proto::{disconnect::Disconnect, ws::frame::Kind};

use crate::{
    bus::publish::{BusError, Publish},
    client::event::Unpublished,
    logic::Actions,
    telemetry::counter::Counter,
};

/// Counters of the messages of a family's clients.
#[derive(Debug, Default)]
pub struct UpstreamCounters {
    /// Messages that were invalid.
    pub invalid: Counter,
    /// Messages that no worker received.
    pub unheard: Counter,
    /// Messages that the bus lost.
    pub lost: Counter,
    /// Messages that the bus refused.
    pub refused: Counter,
}

impl UpstreamCounters {
    /// Publishes a client's message. If the bus refuses the message, the client is told at once.
    pub fn publish<R>(&self, message: Publish, actions: &mut dyn Actions<R>) {
        match actions.publish_upstream(message) {
            Ok(()) => {}
            Err(BusError::Closed) => actions.disconnect(&Disconnect::RESTART),
            Err(error) => self.tell_unpublished((&error).into(), None, actions),
        }
    }

    /// Tells a client that no worker got its message. `no_receiver` is the error for a message to which no worker
    /// listens.
    pub fn tell_unpublished<R>(
        &self,
        unpublished: Unpublished,
        no_receiver: Option<(&str, &str)>,
        actions: &mut dyn Actions<R>,
    ) {
        match unpublished {
            Unpublished::NoReceiver => self.unheard.add(1),
            Unpublished::Lost => self.lost.add(1),
            Unpublished::Refused { .. } => self.refused.add(1),
        }
        if let Some((code, message)) = unpublished.error().or(no_receiver) {
            tell_error(code, message, actions);
        }
    }
}

/// Invalid messages of one client.
#[derive(Debug, Default)]
pub struct Strikes(u32);

impl Strikes {
    /// Answers an invalid message. The invalid message number `strikes_max` ends the connection; 0: none does.
    pub fn refuse<R>(
        &mut self,
        (code, message): (&str, &str),
        strikes_max: u32,
        counters: &UpstreamCounters,
        actions: &mut dyn Actions<R>,
    ) {
        counters.invalid.add(1);
        self.0 += 1;
        if strikes_max > 0 && self.0 >= strikes_max {
            actions.disconnect(&Disconnect::STRIKES);
        } else {
            tell_error(code, message, actions);
        }
    }
}

/// Sends an error to a client.
pub fn tell_error<R>(code: &str, message: &str, actions: &mut dyn Actions<R>) {
    let body = serde_json::json!({ "type": "error", "code": code, "message": message });
    actions.reply(Kind::Text, body.to_string().as_bytes());
}

/// Upper bound of the nesting of a client's JSON. Python's parser fails near 1,000 levels, most workers' earlier.
pub const JSON_DEPTH_MAX: usize = 128;
