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
    /// Returns a failure with its reason.
    pub(crate) fn new(code: Code, message: impl Into<String>) -> Self {
        Self::Reset { code, message: message.into() }
    }

    /// Returns the code for logs.
    pub(crate) const fn code(&self) -> Code {
        match self {
            Self::Gone => Code::Cancelled,
            Self::Reset { code, .. } => *code,
        }
    }

    /// Returns the frame that tells the gateway; `None` where the stream has ended. NOT_DISPATCHED is never set: a gateway
    /// sends such a request again at once, which is of no use while the upstream cannot be reached.
    pub(crate) fn reset(&self, head_sent: bool) -> Option<Reset<'_>> {
        match self {
            Self::Gone => None,
            Self::Reset { code, message } => {
                Some(Reset { head_sent, message, ..Reset::new(*code) })
            }
        }
    }
}
