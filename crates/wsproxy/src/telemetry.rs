//! What an operator sees of a running instance.

pub mod log;
pub mod metrics;
pub mod time;
