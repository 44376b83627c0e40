//! `/echo`: answers every message with itself, so that conformance suites judge the production path.

use wsproxy_conn::{End, Event};
use wsproxy_proto::ws::frame::Kind;

use crate::endpoint::{Actions, Logic};

/// The echo of one connection.
#[derive(Debug)]
pub struct Echo;

impl Logic for Echo {
    fn on_open(&mut self, _actions: &mut dyn Actions) {}

    fn on_message(&mut self, kind: Kind, payload: &[u8], actions: &mut dyn Actions) {
        actions.reply(kind, payload);
    }

    fn on_event(&mut self, _event: Event, _actions: &mut dyn Actions) {}

    fn on_end(&mut self, _end: End, _sent: (u64, u64), _actions: &mut dyn Actions) {}
}
