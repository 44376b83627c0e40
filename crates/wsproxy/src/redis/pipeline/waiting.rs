//! The receivers of replies: what was sent and waits for its answer.

use std::sync::Arc;

use tokio::sync::oneshot;

use crate::{
    bus::publish::{Outcome, Publish, Receipt},
    redis::{pipeline::Replies, resp::Reply},
    store::command::StoreError,
};

/// The receiver of the next reply.
pub(super) enum Waiting {
    Publish(Option<Arc<dyn Receipt>>),
    /// A publish that is repeated if the server has forgotten its script.
    Scripted(Box<Publish>, IsAsked),
    /// A message of the instance's own, which is not counted.
    Urgent(Option<Arc<dyn Receipt>>),
    Command(oneshot::Sender<Result<Reply, StoreError>>),
    /// Several commands: the replies so far, the number of all, and the caller.
    Commands(Replies, usize, oneshot::Sender<Replies>),
    Watchdog,
    /// The test whether the server takes writes.
    Write,
    /// The loading of the script.
    Script,
    /// The word before a publish whose slot is on its way to this node.
    Asking,
}

/// Set for a publish whose slot is on its way to this node.
pub(super) type IsAsked = bool;

/// Gives a caller its outcome.
pub(super) fn answer(receipt: Option<Arc<dyn Receipt>>, outcome: Outcome) {
    if let Some(receipt) = receipt {
        receipt.published(outcome);
    }
}
