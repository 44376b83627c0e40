//! Recorder of actions, for the tests of logics.

use wsproxy_conn::clock::Micros;
use wsproxy_proto::{disconnect::Disconnect, ws::frame::Kind};

use crate::{
    bus::publish::{BusError, Keep, Publish},
    logic::Actions,
};

/// Recorded actions of a logic, at a time that the test sets.
pub(crate) struct Notes<R> {
    pub(crate) now: Micros,
    /// Messages to the client.
    pub(crate) told: Vec<String>,
    /// Messages to the client that already had their form.
    pub(crate) verbatim: Vec<String>,
    /// Channels and payloads of published messages.
    pub(crate) published: Vec<(String, String)>,
    /// Keeping of the latest published message.
    pub(crate) keep: Option<Keep>,
    pub(crate) ended: Option<(u16, String)>,
    pub(crate) wakes_at: Option<Micros>,
    pub(crate) expires_at: Vec<Option<u64>>,
    pub(crate) requests: Vec<R>,
    /// Messages wait for the client to read.
    pub(crate) backed_up: bool,
    /// Error of every publish; `None`: each succeeds.
    pub(crate) bus: Option<BusError>,
}

impl<R> Notes<R> {
    pub(crate) const fn at(now: Micros) -> Self {
        Self {
            now,
            told: Vec::new(),
            verbatim: Vec::new(),
            published: Vec::new(),
            keep: None,
            ended: None,
            wakes_at: None,
            expires_at: Vec::new(),
            requests: Vec::new(),
            backed_up: false,
            bus: None,
        }
    }

    /// Messages to the client since the last call.
    pub(crate) fn take_told(&mut self) -> Vec<serde_json::Value> {
        self.told.drain(..).map(|text| serde_json::from_str(&text).unwrap()).collect()
    }

    /// The only message to the client since the last call.
    pub(crate) fn take_answer(&mut self) -> serde_json::Value {
        let mut told = self.take_told();
        assert_eq!(told.len(), 1, "{told:?}");
        told.remove(0)
    }
}

impl<R> Actions<R> for Notes<R> {
    fn now(&self) -> Micros {
        self.now
    }

    fn reply(&mut self, kind: Kind, payload: &[u8]) {
        self.send(kind, payload);
    }

    fn send(&mut self, kind: Kind, payload: &[u8]) {
        assert_eq!(kind, Kind::Text);
        self.told.push(String::from_utf8(payload.to_vec()).unwrap());
    }

    fn send_verbatim(&mut self, kind: Kind, message: &[u8]) {
        assert_eq!(kind, Kind::Text);
        self.verbatim.push(String::from_utf8(message.to_vec()).unwrap());
    }

    fn is_backed_up(&self) -> bool {
        // As in a connection, messages of this turn wait until the turn is over.
        self.backed_up || !self.told.is_empty()
    }

    fn publish(&mut self, publish: Publish) -> Result<(), BusError> {
        if let Some(error) = &self.bus {
            return Err(error.clone());
        }
        let payload = String::from_utf8(publish.payload.to_vec()).unwrap();
        self.published.push((publish.channel.to_string(), payload));
        self.keep = Some(publish.keep);
        Ok(())
    }

    fn publish_upstream(&mut self, publish: Publish) -> Result<(), BusError> {
        self.publish(publish)
    }

    fn request(&mut self, request: R) {
        self.requests.push(request);
    }

    fn disconnect(&mut self, why: &'static Disconnect) {
        self.ended = Some((why.code, why.reason.into()));
    }

    fn finish(&mut self, _why: &'static Disconnect, code: u16, reason: &str) {
        self.ended = Some((code, reason.into()));
    }

    fn wake_at(&mut self, at: Micros) {
        self.wakes_at = Some(at);
    }

    fn expire_at(&mut self, at: Option<u64>) {
        self.expires_at.push(at);
    }
}
