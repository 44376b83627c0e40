//! The options that all scenarios share; knows no scenario.

use std::net::SocketAddr;
use std::time::Duration;

use clap::Args;

use crate::target::Kind;

/// Options of every scenario.
#[derive(Debug, Clone, Args)]
pub struct Common {
    /// Address of the server.
    #[arg(long, default_value = "127.0.0.1:8080")]
    pub server: SocketAddr,
    /// Kind of the server.
    #[arg(long, value_enum, default_value = "wsproxy")]
    pub target: Kind,
    /// The clients speak TLS, and trust every server. Each handshake is a full one.
    #[arg(long)]
    pub tls: bool,
    /// Path of a client's WebSocket, with {id} and {agent}; the kind's own by default.
    #[arg(long, default_value = "")]
    pub path: String,
    /// Address for publishing: Redis, or the HTTP side of a server that has one.
    #[arg(long, default_value = "127.0.0.1:6379")]
    pub publish: SocketAddr,
    /// Processes of the server; their children are included. Needed for CPU and memory.
    #[arg(long, value_delimiter = ',')]
    pub pid: Vec<u32>,
    /// Part of all ids that is this run's own; new for every run by default. Needed where credentials are made before.
    #[arg(long)]
    pub run: Option<String>,
    /// Number of clients.
    #[arg(short = 'n', long, default_value_t = 1_000)]
    pub connections: u32,
    /// Threads that share the clients.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=64))]
    pub threads: u32,
    /// Source addresses, from 127.0.0.1 up.
    #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..=250))]
    pub sources: u32,
    /// Concurrent handshakes per thread.
    #[arg(long, default_value_t = 64)]
    pub in_flight: u32,
    /// Payload bytes of a message.
    #[arg(long, default_value_t = 200)]
    pub size: usize,
    /// Seconds of the measured phase.
    #[arg(long, default_value = "10", value_parser = seconds)]
    pub duration: Duration,
    /// Seconds of the same load before the measured phase.
    #[arg(long, default_value = "2", value_parser = seconds)]
    pub warmup: Duration,
    /// Seconds without any progress after which a phase has failed.
    #[arg(long, default_value = "30", value_parser = seconds)]
    pub timeout: Duration,
    /// Interval at which due messages are sent, in microseconds.
    #[arg(long, default_value_t = 250, value_parser = clap::value_parser!(u64).range(50..=1_000_000))]
    pub tick_us: u64,
    /// Results as JSON instead of a table.
    #[arg(long)]
    pub json: bool,
}

impl Common {
    /// Returns the interval at which due messages are sent.
    #[must_use]
    pub fn tick(&self) -> Duration {
        Duration::from_micros(self.tick_us)
    }
}

/// Parses seconds, with or without a fraction.
///
/// # Errors
/// Not a number, negative, or too large.
pub fn seconds(text: &str) -> Result<Duration, String> {
    let seconds: f64 = text.parse().map_err(|_| format!("{text} is not a number of seconds"))?;
    Duration::try_from_secs_f64(seconds).map_err(|error| error.to_string())
}
