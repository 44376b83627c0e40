//! Ends of a lane: each with its close frame and its label. Knows no sockets and no streams.

use std::io;

use wsproxy_proto::{
    disconnect::{Disconnect, is_sendable},
    tunnel::{code::Code, lane::LaneError},
};

/// Reason why a lane ended. [`LaneDriver`](super::LaneDriver) decides it, once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum LaneEnd {
    /// This side sent GOAWAY with this code. All streams ended, or the time to drain was over.
    #[error("this side drained the lane: {}", .0.label())]
    Drained(Code),
    /// The peer sent GOAWAY with this code, and later closed the connection.
    #[error("the peer drained the lane: {}", .0.label())]
    GoneAway(Code),
    /// The peer sent a close frame with this code and no GOAWAY; 1005: a close frame without a code.
    #[error("the peer closed the lane with {0}")]
    Closed(u16),
    /// The peer broke a rule of the tunnel.
    #[error("the peer broke the protocol: {0}")]
    Broken(LaneError),
    /// The peer sent a text message.
    #[error("the peer sent a text message")]
    Text,
    /// The peer broke a rule of WebSocket, or sent a message above the bound.
    #[error("the peer broke a rule of WebSocket")]
    WebSocket,
    /// The peer's HELLO did not come in time.
    #[error("no HELLO came in time")]
    HelloTimeout,
    /// Nothing came from the peer for too long.
    #[error("nothing was heard for too long")]
    Silent,
    /// The peer took none of the written bytes for too long.
    #[error("the peer took nothing for too long")]
    Stalled,
    /// The peer ended its connection without a close frame.
    #[error("the peer left")]
    Left,
    /// The socket failed.
    #[error("the socket failed: {0}")]
    Failed(io::ErrorKind),
    /// The driver was dropped.
    #[error("the driver was dropped")]
    Dropped,
}

impl From<LaneError> for LaneEnd {
    fn from(error: LaneError) -> Self {
        match error {
            LaneError::HelloTimeout => Self::HelloTimeout,
            LaneError::Silent => Self::Silent,
            LaneError::Frame(_) | LaneError::Order(_) | LaneError::FlowControl => {
                Self::Broken(error)
            }
        }
    }
}

impl LaneEnd {
    /// Returns the word for logs and metrics.
    #[must_use]
    pub fn label(&self) -> &'static str {
        match self {
            Self::Drained(code) | Self::GoneAway(code) => code.label(),
            Self::Closed(_) => "closed",
            Self::Broken(error) => error.code().unwrap_or(Code::Protocol).label(),
            Self::Text | Self::WebSocket => Code::Protocol.label(),
            Self::HelloTimeout => "hello_timeout",
            Self::Silent => "silent",
            Self::Stalled => "stalled",
            Self::Left => "left",
            Self::Failed(_) => "failed",
            Self::Dropped => "dropped",
        }
    }

    /// Returns the code and reason of the close frame. `None`: the connection is lost, and no frame is sent.
    pub(super) fn close_frame(&self) -> Option<(u16, &'static str)> {
        let entry = match self {
            Self::Drained(Code::Superseded) => Disconnect::REPLACED,
            Self::Drained(Code::Restarting) => Disconnect::RESTART,
            Self::Drained(_) | Self::GoneAway(_) => Disconnect::NORMAL,
            Self::Closed(code) if is_sendable(*code) => return Some((*code, "")),
            Self::Closed(_) => Disconnect::NORMAL,
            Self::Broken(_) | Self::Text | Self::WebSocket | Self::HelloTimeout => {
                return Some((Disconnect::PROTOCOL.code, self.label()));
            }
            Self::Silent | Self::Stalled | Self::Left | Self::Failed(_) | Self::Dropped => {
                return None;
            }
        };
        Some((entry.code, entry.reason))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ends_have_close_frames_unless_the_connection_is_lost() {
        for (end, label, code) in [
            (LaneEnd::Drained(Code::Superseded), "superseded", Some(4001)),
            (LaneEnd::Drained(Code::Restarting), "restarting", Some(1012)),
            (LaneEnd::Drained(Code::Overloaded), "overloaded", Some(1000)),
            (LaneEnd::GoneAway(Code::Restarting), "restarting", Some(1000)),
            (LaneEnd::Closed(1001), "closed", Some(1001)),
            (LaneEnd::Closed(1005), "closed", Some(1000)),
            (LaneError::FlowControl.into(), "flow_control", Some(1002)),
            (LaneError::Order("").into(), "protocol", Some(1002)),
            (LaneEnd::Text, "protocol", Some(1002)),
            (LaneError::HelloTimeout.into(), "hello_timeout", Some(1002)),
            (LaneError::Silent.into(), "silent", None),
            (LaneEnd::Stalled, "stalled", None),
            (LaneEnd::Left, "left", None),
        ] {
            assert_eq!((end.label(), end.close_frame().map(|(code, _)| code)), (label, code));
        }
    }
}
