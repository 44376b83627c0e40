//! The callers' end of a connection for requests: a bounded queue, and an outlet that overtakes it.

use std::sync::atomic::{AtomicBool, Ordering};

use bytes::{Bytes, BytesMut};
use tokio::sync::{Notify, oneshot};

use crate::{
    bus::publish::Publish,
    queue::{Back, Queue},
    redis::{
        health::{Link, Purpose},
        outlet::Outlet,
        resp::{self, Reply},
    },
    store::command::StoreError,
};

pub(super) mod task;
mod waiting;

/// The callers' end of a pipeline.
pub(super) struct Pipeline {
    /// Requests that wait to be written.
    pub(super) queue: Queue<PipelineRequest>,
    /// Messages that overtake the queue, and the proof that the connection ends at the same server as others.
    pub(super) outlet: Outlet,
    /// State of the connection.
    pub(super) link: Link,
    condemned: Notify,
    rerouted: Notify,
    is_started: AtomicBool,
}

/// Replies to several commands, in their order.
pub(crate) type Replies = Vec<Result<Reply, StoreError>>;

/// A request of a caller.
pub(super) enum PipelineRequest {
    /// A message for a channel.
    Publish(Publish),
    /// A message whose slot is on its way to this node.
    Asking(Publish),
    /// A spelled-out command, and the caller that waits for the reply.
    Command(Bytes, oneshot::Sender<Result<Reply, StoreError>>),
    /// Several spelled-out commands, their number, and the caller that waits for all replies.
    Commands(Bytes, usize, oneshot::Sender<Replies>),
}

impl Pipeline {
    /// Creates a pipeline with a queue of `queue_bytes`.
    pub(super) fn new(purpose: Purpose, queue_bytes: usize) -> Self {
        Self {
            queue: Queue::new(queue_bytes),
            outlet: Outlet::default(),
            link: Link::new(purpose),
            condemned: Notify::new(),
            rerouted: Notify::new(),
            is_started: AtomicBool::new(false),
        }
    }

    /// Closes the connection, if there is one, so that it is made again.
    pub(super) fn condemn(&self) {
        self.condemned.notify_one();
    }

    /// Signals that another node serves slots of queued requests.
    pub(super) fn reroute(&self) {
        self.rerouted.notify_one();
    }

    /// Returns whether the task of the pipeline is to be started, which counts as done then.
    pub(super) fn start(&self) -> bool {
        !self.is_started.swap(true, Ordering::AcqRel)
    }

    /// Sends a command and waits for its reply.
    ///
    /// # Errors
    /// [`StoreError::Full`] and [`StoreError::Closed`]: the command was not sent. Others: see [`StoreError`].
    pub(super) async fn command(&self, words: &[&[u8]]) -> Result<Reply, StoreError> {
        let mut command = BytesMut::new();
        resp::words(&mut command, words);
        self.send(command.freeze()).await
    }

    /// Sends a spelled command; see [`Self::command`].
    pub(super) async fn send(&self, command: Bytes) -> Result<Reply, StoreError> {
        let (caller, reply) = oneshot::channel();
        let bytes = command.len() + COMMAND_OVERHEAD_BYTES;
        self.enqueue(PipelineRequest::Command(command, caller), bytes)?;
        reply.await.unwrap_or(Err(StoreError::Closed))
    }

    /// Sends a spelled command whose key is on its way to this node; see [`Self::command`].
    pub(super) async fn send_asking(&self, command: Bytes) -> Result<Reply, StoreError> {
        let mut both = BytesMut::with_capacity(command.len() + ASKING.len());
        both.extend_from_slice(ASKING);
        both.extend_from_slice(&command);
        let mut replies = self.send_each(both.freeze(), 2).await;
        replies.pop().unwrap_or(Err(StoreError::Closed))
    }

    /// Sends `count` spelled commands together, and waits for all their replies. Returns a reply for each; see
    /// [`Self::command`].
    pub(super) async fn send_each(&self, commands: Bytes, count: usize) -> Replies {
        let (caller, replies) = oneshot::channel();
        let bytes = commands.len() + count * COMMAND_OVERHEAD_BYTES;
        match self.enqueue(PipelineRequest::Commands(commands, count, caller), bytes) {
            Ok(()) => replies.await.unwrap_or_else(|_| vec![Err(StoreError::Closed); count]),
            Err(error) => vec![Err(error); count],
        }
    }

    fn enqueue(&self, request: PipelineRequest, bytes: usize) -> Result<(), StoreError> {
        match self.queue.push(request, bytes) {
            Ok(()) => Ok(()),
            Err((Back::Closed, _)) => Err(StoreError::Closed),
            Err((Back::Full, request)) => {
                // In an outage the callers of most waiting commands have given up.
                self.queue.retain(|request| match request {
                    PipelineRequest::Command(_, caller) => !caller.is_closed(),
                    PipelineRequest::Commands(_, _, caller) => !caller.is_closed(),
                    PipelineRequest::Publish(_) | PipelineRequest::Asking(_) => true,
                });
                self.queue.push(request, bytes).map_err(|_| StoreError::Full)
            }
        }
    }
}

impl PipelineRequest {
    /// Returns the publish of a request that is one.
    pub(super) fn into_publish(self) -> Option<Publish> {
        match self {
            Self::Publish(publish) | Self::Asking(publish) => Some(publish),
            Self::Command(..) | Self::Commands(..) => None,
        }
    }
}

impl From<Publish> for PipelineRequest {
    fn from(publish: Publish) -> Self {
        Self::Publish(publish)
    }
}

/// Command before one whose key is on its way to the node (<https://redis.io/docs/reference/cluster-spec>).
const ASKING: &[u8] = b"*1\r\n$6\r\nASKING\r\n";

/// Estimate of a queued command's cost beside its bytes.
const COMMAND_OVERHEAD_BYTES: usize = 128;
