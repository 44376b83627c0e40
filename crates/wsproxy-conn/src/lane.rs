//! One lane of the tunnel on tokio, in either role: its task, and the handles of its streams. Knows no HTTP library, no
//! registry of lanes, and no dialling.
//!
//! # Parts
//! - [`LaneDriver`] is the lane's task: the only code that reads and writes the socket. It decides the end of the lane.
//! - [`LaneHandle`] opens streams (gateway), drains the lane, and tells its status.
//! - [`StreamAcceptor`] gives the streams that the gateway opened (agent).
//! - [`StreamReader`] and [`StreamWriter`] are the two directions of one stream. Each belongs to one task at a time.
//!
//! ```
//! use wsproxy_conn::lane::{self, LaneSettings, Received};
//! use wsproxy_proto::tunnel::{
//!     frame::{Head, Open, Source},
//!     headers::Headers,
//!     memory::{Memory, MemoryLimits},
//! };
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let (settings, limits) = (LaneSettings::default(), MemoryLimits::default());
//! let (ours, theirs) = tokio::net::UnixStream::pair()?;
//!
//! let (driver, _agent, mut acceptor) =
//!     lane::agent(theirs.into(), &[], settings.clone(), Memory::new(limits))?;
//! tokio::spawn(driver);
//! tokio::spawn(async move {
//!     while let Some(mut stream) = acceptor.accept().await {
//!         let (source, headers) = (Source::Agent, Headers::EMPTY);
//!         stream.answer.send_head(&Head { end: false, status: 200, source, headers })?;
//!         stream.answer.write(stream.request.path).await?;
//!         stream.answer.finish()?;
//!     }
//!     Ok::<_, lane::WriteError>(())
//! });
//!
//! let (driver, gateway) = lane::gateway(ours.into(), &[], settings, Memory::new(limits))?;
//! tokio::spawn(driver);
//! gateway.ready().await?;
//! let open = Open { end: true, ..Open::new(b"GET", b"/hello") };
//! let mut stream = gateway.open(&open)?;
//! let head = stream.answer.head().await.expect("the stream is whole");
//! assert_eq!(head.status, 200);
//! assert_eq!(stream.answer.read().await, Ok(Received::Data("/hello".into())));
//! assert_eq!(stream.answer.read().await, Ok(Received::End));
//! # Ok(())
//! # }
//! ```
//!
//! The rules of streams, credit and turns are those of [`wsproxy_proto::tunnel::lane`]. Here are only the lock around
//! them, the wakers of the tasks, and the socket.

use std::{io, sync::Arc, time::Duration};

use wsproxy_proto::tunnel::{
    lane::{LaneConfig, Role},
    memory::Memory,
};

use crate::socket::Socket;

mod batch;
mod driver;
mod end;
mod handle;
mod reader;
mod shared;
mod status;
mod writer;

pub use driver::LaneDriver;
pub use end::LaneEnd;
pub use handle::{AcceptedStream, LaneHandle, OpenedStream, StreamAcceptor};
pub use reader::{Received, StreamReader};
pub use status::{LaneNumbers, LaneStatus};
pub use writer::{StreamWriter, WriteError};

use shared::Shared;

/// Settings of one side of a lane.
#[derive(Debug, Clone)]
pub struct LaneSettings {
    /// Settings of the protocol, with the intervals of pings and the time without a byte after which the lane is dead.
    pub protocol: LaneConfig,
    /// Time without progress after which a write ends the lane.
    pub write_timeout: Duration,
    /// Time for the peer's close frame.
    pub close_timeout: Duration,
}

impl Default for LaneSettings {
    fn default() -> Self {
        Self {
            protocol: LaneConfig::default(),
            write_timeout: Duration::from_secs(25),
            close_timeout: Duration::from_secs(5),
        }
    }
}

/// Returns the gateway's side of a lane, whose WebSocket handshake is done. `leftover` are the bytes that were read
/// behind the head of the request. The caller spawns the driver.
///
/// # Errors
/// The kernel refused an option of the socket.
///
/// # Panics
/// Outside of a tokio runtime.
pub fn gateway(
    socket: Socket,
    leftover: &[u8],
    settings: LaneSettings,
    memory: Arc<Memory>,
) -> io::Result<(LaneDriver, LaneHandle)> {
    let shared = Shared::new(Role::Gateway, settings.protocol.clone(), memory);
    let driver = LaneDriver::new(Arc::clone(&shared), socket, leftover, Role::Gateway, &settings)?;
    Ok((driver, LaneHandle::new(shared, Role::Gateway)))
}

/// Returns the agent's side of a lane, as [`gateway`] does. `leftover` are the bytes that were read behind the head of
/// the answer.
///
/// # Errors
/// The kernel refused an option of the socket.
///
/// # Panics
/// Outside of a tokio runtime.
pub fn agent(
    socket: Socket,
    leftover: &[u8],
    settings: LaneSettings,
    memory: Arc<Memory>,
) -> io::Result<(LaneDriver, LaneHandle, StreamAcceptor)> {
    let shared = Shared::new(Role::Agent, settings.protocol.clone(), memory);
    let driver = LaneDriver::new(Arc::clone(&shared), socket, leftover, Role::Agent, &settings)?;
    let acceptor = StreamAcceptor::new(Arc::clone(&shared));
    Ok((driver, LaneHandle::new(shared, Role::Agent), acceptor))
}
