//! What an operator sees of a running instance.

pub mod counter;
pub mod log;
pub mod metrics;
pub mod throttle;
pub mod time;
