//! Gates of new clients: live messages wait behind a fence while the client's logs are read.

use std::sync::Arc;

use bytes::Bytes;
use parking_lot::Mutex;
use wsproxy_proto::history::{Fence, Position};

use crate::hub::sink::Sink;

/// A client and its fence. All topics of the client share the gate.
#[derive(Debug)]
pub struct Gate {
    /// The client.
    pub(super) target: Sink,
    /// Fence with the waiting messages, which are encoded for the client.
    pub(super) fence: Mutex<Fence<Bytes>>,
}

impl Gate {
    /// Makes a closed gate.
    pub(super) fn new(target: Sink) -> Arc<Self> {
        let bytes_max = target.buffer_bytes();
        Arc::new(Self { target, fence: Mutex::new(Fence::new(bytes_max)) })
    }

    /// Makes an open gate, for a client that has all messages up to `seen` of all its topics.
    pub(super) fn open(target: Sink, seen: Position) -> Arc<Self> {
        Arc::new(Self { target, fence: Mutex::new(Fence::opened(seen)) })
    }
}
