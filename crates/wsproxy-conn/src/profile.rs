//! What the connections of one endpoint have in common: limits, intervals and counters.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use wsproxy_proto::{
    rate::{ByteRate, Rate},
    ws::receiver::Limits,
};

use crate::clock::Micros;

/// Upper bounds of the latency histogram's buckets, in microseconds; a last one has none.
pub const LATENCY_BUCKETS: [u64; 16] = [
    50, 100, 250, 500, 1_000, 2_500, 5_000, 10_000, 25_000, 50_000, 100_000, 250_000, 500_000,
    1_000_000, 2_500_000, 10_000_000,
];

/// The settings of an endpoint's connections, shared by all of them.
#[derive(Debug)]
pub struct Profile {
    /// Bounds of what is received.
    pub receive: Limits,
    /// Most bytes that may wait for one client; beyond it the connection ends as a slow consumer.
    pub send_buffer_bytes: usize,
    /// While more bytes than this wait which the client itself caused, it is not read from.
    pub reply_bytes_max: usize,
    /// Most events that may wait for a connection's handler; beyond it the connection ends as a slow consumer.
    pub events_max: usize,
    /// Most bytes that may wait in them.
    pub event_bytes_max: usize,
    /// Messages per second; `None`: no limit.
    pub rate: Option<Rate>,
    /// Bytes per second, inflated ones included; reading pauses beyond it. `None`: no limit.
    pub byte_rate: Option<ByteRate>,
    /// What is a sign of life.
    pub heartbeat: Heartbeat,
    /// A ping is sent when nothing was heard for this long.
    pub heartbeat_interval: Micros,
    /// A connection from which nothing was heard for this long is dead.
    pub heartbeat_timeout: Micros,
    /// A connection without a data message in either direction for this long ends.
    pub idle_timeout: Micros,
    /// How long the close handshake may take.
    pub close_timeout: Micros,
    /// Messages from this size on are compressed where that was negotiated.
    pub compress_from_bytes: usize,
    /// 1 to 9.
    pub compress_level: u32,
    /// Counters of all these connections.
    pub stats: Stats,
}

/// What is a sign of life of a client.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Heartbeat {
    /// Any bytes; it is asked for one with WebSocket pings.
    #[default]
    Frames,
    /// Data messages only; the handler asks for one, in messages of its own.
    Messages,
}

/// Counters, only ever added to; the metrics read them at scrape.
#[derive(Debug, Default)]
pub struct Stats {
    /// Data messages that arrived complete and valid.
    pub messages_received: AtomicU64,
    /// Bytes read from sockets.
    pub bytes_received: AtomicU64,
    /// Data messages of which the last byte was handed to the kernel.
    pub messages_sent: AtomicU64,
    /// Bytes handed to the kernel.
    pub bytes_sent: AtomicU64,
    /// Messages that waited for a client when its connection ended, or came for it afterwards.
    pub messages_discarded: AtomicU64,
    /// Times that a client's socket took no more.
    pub blocked: AtomicU64,
    /// Times that reading from a client paused.
    pub reads_paused: AtomicU64,
    /// Times that reading from a client paused, since it had sent more bytes than its rate allows.
    pub reads_throttled: AtomicU64,
    /// Time from the bus to the kernel, of messages that came from there.
    pub latency: Latency,
}

/// A histogram with fixed buckets.
#[derive(Debug, Default)]
pub struct Latency {
    /// Counts, not cumulative; the last one is beyond all bounds.
    pub buckets: [AtomicU64; LATENCY_BUCKETS.len() + 1],
    /// Sum of all, in microseconds.
    pub sum_micros: AtomicU64,
}

impl Latency {
    /// Adds `count` messages that took `span` at most.
    pub fn record(&self, span: Micros, count: u32) {
        let bucket = LATENCY_BUCKETS.partition_point(|&bound| bound < span.0);
        self.buckets[bucket].fetch_add(u64::from(count), Relaxed);
        self.sum_micros.fetch_add(span.0.saturating_mul(u64::from(count)), Relaxed);
    }
}
