//! Status and numbers of a lane, as other tasks see them; knows no streams.

use std::sync::Arc;

use wsproxy_proto::tunnel::{
    event::{AgentHealth, Peer},
    frame::GoAway,
};

use super::LaneEnd;
use crate::clock::Micros;

/// Status of a lane.
#[derive(Debug, Clone, Default)]
pub struct LaneStatus {
    /// Number of the status: each change but that of [`Self::round_trip`] adds one.
    pub version: u64,
    /// Peer, once its HELLO came. A gateway may then open streams.
    pub peer: Option<Arc<Peer>>,
    /// Health that the agent told last.
    pub health: Option<Arc<AgentHealth>>,
    /// GOAWAY of the peer.
    pub go_away: Option<GoAway>,
    /// Whether this side drains the lane.
    pub is_draining: bool,
    /// Duration of the last ping, without the time in the peer's writer.
    pub round_trip: Option<Micros>,
    /// End of the lane.
    pub end: Option<LaneEnd>,
}

/// Numbers of a lane, for metrics.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LaneNumbers {
    /// Streams that are open, or whose last bytes or frames wait still.
    pub streams: usize,
    /// Memory of all that waits in the lane's streams, in bytes.
    pub buffered_bytes: usize,
    /// Bytes that came from the socket.
    pub bytes_received: u64,
    /// Bytes that the socket took.
    pub bytes_sent: u64,
}
