//! Telemetry for operators: logs, metrics and the counters behind them.

pub mod counter;
pub mod family;
pub mod histogram;
pub mod log;
pub mod metrics;
pub mod report;
pub mod scrape;
pub mod throttle;
pub mod time;
