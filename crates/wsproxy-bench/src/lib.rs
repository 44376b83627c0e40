//! The load generator: many clients on few threads, scenarios around them, and the raw limit to compare with.
//!
//! It knows servers only from outside: sockets, Redis' protocol and `/proc`.

pub mod bench;
pub mod callers;
pub mod cli;
pub mod clock;
pub mod crowd;
pub mod echo_worker;
pub mod fleet;
pub mod frame;
pub mod handshake;
pub mod history;
pub mod issuer;
pub mod limit;
pub mod load;
pub mod options;
pub mod persistent;
pub mod procfs;
pub mod progress;
pub mod publisher;
pub mod redis_memory;
pub mod remote;
pub mod report;
pub mod resp;
pub mod rooms;
pub mod scenario;
pub mod stamp;
pub mod target;
pub mod tunnel;
