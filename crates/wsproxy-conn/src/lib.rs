//! One WebSocket connection on tokio: from the socket to the handler of its messages.
//!
//! Knows nothing of topics, endpoints or the bus. A [`Handler`] gets the messages, a [`Link`] lets other tasks reach
//! the connection, and the [`Driver`] is the connection's own task.

pub mod budget;
pub mod clock;
pub mod dial;
pub mod driver;
pub mod lane;
pub mod link;
pub mod outbox;
pub mod outgoing;
pub mod profile;
pub mod runtime;
pub mod socket;
pub mod wheel;

pub use driver::{Driver, End, Handler};
pub use link::{HandlerEvent, Link};
pub use outgoing::Outgoing;
pub use profile::{Heartbeat, Profile, Stats};
pub use runtime::Runtime;
pub use socket::Socket;
