//! One WebSocket connection on tokio: what happens between a socket and whoever handles its messages.
//!
//! Knows nothing of topics, endpoints or the bus. A [`Handler`] gets messages, a [`Link`] is how
//! everybody else reaches the connection, the [`Driver`] is the task in between.

pub mod budget;
pub mod clock;
pub mod driver;
pub mod link;
pub mod outbox;
pub mod outgoing;
pub mod profile;
pub mod runtime;
pub mod socket;
pub mod wheel;

pub use driver::{Driver, End, Handler};
pub use link::{Event, Link};
pub use outgoing::Outgoing;
pub use profile::{Heartbeat, Profile, Stats};
pub use runtime::Runtime;
pub use socket::Socket;
