//! Requests to the one reader of the embedded bus.

use tokio::sync::oneshot;

use crate::{
    bus::publish::Publish,
    store::token_streams::{StreamCommand, StreamError, StreamHead},
};

/// A request to the reader.
pub(super) enum EmbeddedRequest {
    /// Delivers a message.
    Publish(Publish),
    /// Changes a token stream and delivers the messages about the change.
    Stream(Box<StreamCommand>, oneshot::Sender<Result<StreamHead, StreamError>>),
}

impl From<Publish> for EmbeddedRequest {
    fn from(publish: Publish) -> Self {
        Self::Publish(publish)
    }
}
