//! The callers' end of a connection for requests: a bounded queue, and an outlet that overtakes it.

use bytes::Bytes;
use tokio::sync::{Notify, oneshot};

use crate::{
    bus::publish::Publish,
    queue::Queue,
    redis::{outlet::Outlet, resp::Reply},
    store::command::StoreError,
};

pub(super) mod task;

/// The callers' end of a pipeline.
pub(super) struct Pipeline {
    /// Requests that wait to be written.
    pub(super) queue: Queue<PipelineRequest>,
    /// Messages that overtake the queue, and the proof that the connection ends at the same server as others.
    pub(super) outlet: Outlet,
    condemned: Notify,
}

/// Replies to several commands, in their order.
pub(crate) type Replies = Vec<Result<Reply, StoreError>>;

/// A request of a caller.
pub(super) enum PipelineRequest {
    /// A message for a channel.
    Publish(Publish),
    /// A spelled-out command, and the caller that waits for the reply.
    Command(Bytes, oneshot::Sender<Result<Reply, StoreError>>),
    /// Several spelled-out commands, their number, and the caller that waits for all replies.
    Commands(Bytes, usize, oneshot::Sender<Replies>),
}

impl Pipeline {
    /// Creates a pipeline with a queue of `queue_bytes`.
    pub(super) fn new(queue_bytes: usize) -> Self {
        Self { queue: Queue::new(queue_bytes), outlet: Outlet::default(), condemned: Notify::new() }
    }

    /// Closes the connection, if there is one, so that it is made again.
    pub(super) fn condemn(&self) {
        self.condemned.notify_one();
    }
}

impl From<Publish> for PipelineRequest {
    fn from(publish: Publish) -> Self {
        Self::Publish(publish)
    }
}
