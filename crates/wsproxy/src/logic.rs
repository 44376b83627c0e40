//! The logic of a connection, which each endpoint family implements: events in, actions out. Knows no family.

use std::{convert::Infallible, sync::Arc};

use wsproxy_conn::{End, clock::Micros};
use wsproxy_proto::{disconnect::Disconnect, ws::frame::Kind};

use crate::{
    bus::publish::{BusError, Publish},
    client::{Client, event::Event},
    core::{Core, recent::Who},
};

#[cfg(test)]
pub(crate) mod notes;
pub mod upstream;

/// Logic of one connection: gets messages and events, and answers with [`Actions`].
pub trait Logic: Send + Unpin + 'static {
    /// Request for work that takes time.
    type Request;
    /// Server of the connection's requests.
    type Server: Serve<Self::Request>;

    /// Begins: messages may flow from now on.
    fn on_open(&mut self, actions: &mut dyn Actions<Self::Request>);
    /// Takes a complete, valid data message from the client. Text is UTF-8.
    fn on_message(&mut self, kind: Kind, payload: &[u8], actions: &mut dyn Actions<Self::Request>);
    /// Takes an event from another task.
    fn on_event(&mut self, event: Event, actions: &mut dyn Actions<Self::Request>);
    /// Returns the ids of the client.
    fn who(&self) -> Who<'_>;
    /// Ends. `sent` counts the messages and bytes that went to the client.
    fn on_end(&mut self, end: End, sent: (u64, u64), actions: &mut dyn Actions<Self::Request>);
}

/// Serves the requests of a [`Logic`], which itself does not wait.
pub trait Serve<R>: Send + Unpin + 'static {
    /// Begins to serve a request; [`Event::Done`] brings the result to the logic of `client`.
    fn serve(&self, request: R, client: &Client, core: &Arc<Core>);
}

/// Serves a logic without requests.
impl Serve<Infallible> for () {
    fn serve(&self, request: Infallible, _client: &Client, _core: &Arc<Core>) {
        match request {}
    }
}

/// Actions of a [`Logic`].
pub trait Actions<R> {
    /// Returns the present time.
    fn now(&self) -> Micros;
    /// Sends a reply to the client's own message. While more than `reply_bytes_max` of replies wait, the client is not read.
    fn reply(&mut self, kind: Kind, payload: &[u8]);
    /// Sends a message that is no reply.
    fn send(&mut self, kind: Kind, payload: &[u8]);
    /// Sends a message that already has the connection's form, such as a copy of an earlier one.
    fn send_verbatim(&mut self, kind: Kind, message: &[u8]);
    /// Returns whether messages wait for the client to read.
    fn is_backed_up(&self) -> bool;
    /// Publishes on the bus.
    ///
    /// # Errors
    /// `Full` or `Closed`: the message is not in the queue.
    fn publish(&mut self, publish: Publish) -> Result<(), BusError>;
    /// Publishes a message of the client. [`Event::Unpublished`] follows if no worker got it.
    ///
    /// # Errors
    /// `Full` or `Closed`: the message is not in the queue.
    fn publish_upstream(&mut self, publish: Publish) -> Result<(), BusError>;
    /// Passes a request to the server. [`Event::Done`] brings the result.
    fn request(&mut self, request: R);
    /// Ends the connection at once.
    fn disconnect(&mut self, why: &'static Disconnect);
    /// Ends the connection after all waiting messages are written.
    fn finish(&mut self, why: &'static Disconnect, code: u16, reason: &str);
    /// Sets the time of the next [`Event::Timer`]. Replaces an earlier setting.
    fn wake_at(&mut self, at: Micros);
    /// Sets the unix time at which the connection expires; `None`: never. Replaces an earlier setting.
    fn expire_at(&mut self, at: Option<u64>);
}
