//! Reasons why a stream gets no whole answer; knows no HTTP library.

use wsproxy_proto::tunnel::{code::Code, frame::Reset};

/// End of a stream that is not complete.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Failure {
    /// The stream has ended already: its client left, or its lane is lost.
    Gone,
    /// The agent resets the stream.
    Reset {
        /// Reason.
        code: Code,
        /// Whether not one byte of the request reached the upstream.
        not_dispatched: bool,
        /// Sentence for the logs of both sides, without a value of the client.
        message: String,
    },
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Gone => f.write_str("the stream has ended"),
            Self::Reset { message, .. } => f.write_str(message),
        }
    }
}

impl Failure {
    /// Returns a failure of a request of which the upstream may have seen a part.
    pub(crate) fn new(code: Code, message: impl Into<String>) -> Self {
        Self::Reset { code, not_dispatched: false, message: message.into() }
    }

    /// Returns a failure of a request of which the upstream has seen nothing.
    pub(crate) fn undispatched(code: Code, message: impl Into<String>) -> Self {
        Self::Reset { code, not_dispatched: true, message: message.into() }
    }

    /// Returns the code for logs.
    pub(crate) const fn code(&self) -> Code {
        match self {
            Self::Gone => Code::Cancelled,
            Self::Reset { code, .. } => *code,
        }
    }

    /// Returns the frame that tells the gateway; `None` where the stream has ended.
    pub(crate) fn reset(&self, head_sent: bool) -> Option<Reset<'_>> {
        match self {
            Self::Gone => None,
            Self::Reset { code, not_dispatched, message } => Some(Reset {
                not_dispatched: *not_dispatched && !head_sent,
                head_sent,
                message,
                ..Reset::new(*code)
            }),
        }
    }
}
