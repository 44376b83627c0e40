//! State that the connections of one endpoint share: limits, intervals and counters.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use wsproxy_proto::{
    rate::shared::{SharedByteRate, SharedRate},
    ws::{frame::Role, receiver::Limits},
};

use crate::clock::Micros;

/// Settings and counters that the connections of one endpoint share.
#[derive(Debug)]
pub struct Profile {
    /// Our end of the connections. A client masks its frames, a server does not.
    pub role: Role,
    /// Bounds of received messages.
    pub receive: Limits,
    /// Upper bound of the bytes that wait for one client. Beyond it the connection ends as a slow consumer.
    pub send_buffer_bytes: usize,
    /// Low-water mark: number of waiting bytes at which a handler is told that it may push more; see
    /// [`Link::is_writable`](crate::Link::is_writable).
    pub low_water_bytes: usize,
    /// Upper bound of the waiting bytes that the client's own messages caused. Beyond it the client is not read.
    pub reply_bytes_max: usize,
    /// Upper bound of the events that wait for a handler. Beyond it the connection ends as a slow consumer.
    pub events_max: usize,
    /// Upper bound of the bytes of these events.
    pub event_bytes_max: usize,
    /// Limit of messages per second. It can change while connections are open.
    pub rate: SharedRate,
    /// Limit of bytes per second, after inflating. Beyond it reading pauses. It can change while connections are open.
    pub byte_rate: SharedByteRate,
    /// Bytes that a message counts in `byte_rate` beside its own, so that reading pauses for many small ones too.
    pub message_bytes: usize,
    /// Sign of life of the client.
    pub heartbeat: Heartbeat,
    /// Time without a sign of life after which a ping is sent.
    pub heartbeat_interval: Micros,
    /// Time without a sign of life after which the connection ends.
    pub heartbeat_timeout: Micros,
    /// Time without a data message in either direction after which the connection ends.
    pub idle_timeout: Micros,
    /// Upper bound of the time that the close handshake takes.
    pub close_timeout: Micros,
    /// Size from which messages are compressed, where compression was negotiated.
    pub compress_from_bytes: usize,
    /// Level of compression, 1 to 9.
    pub compress_level: u32,
    /// Counters of all these connections.
    pub stats: Stats,
}

/// Sign of life of a client.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Heartbeat {
    /// Any bytes. The driver asks for them with WebSocket pings.
    #[default]
    Frames,
    /// Data messages only. The handler asks for them with messages of its own.
    Messages,
}

/// Counters that only grow. Metrics read them.
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
    /// Messages that were not sent: they waited when the connection ended, or came for it afterwards.
    pub messages_discarded: AtomicU64,
    /// Messages that were not sent, since a newer one with the same key took their place.
    pub messages_replaced: AtomicU64,
    /// Number of times that a client's socket took no more.
    pub blocked: AtomicU64,
    /// Number of times that reading from a client paused.
    pub reads_paused: AtomicU64,
    /// Number of times that reading from a client paused, since the client was over its byte rate.
    pub reads_throttled: AtomicU64,
    /// Time from the bus to the kernel, of messages that came from the bus.
    pub latency: Latency,
}

/// Histogram with fixed buckets.
#[derive(Debug, Default)]
pub struct Latency {
    /// Counts, not cumulative. The last one is beyond all bounds.
    pub buckets: [AtomicU64; LATENCY_BUCKETS.len() + 1],
    /// Sum of all times, in microseconds.
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

/// Upper bounds of the latency histogram's buckets, in microseconds. One more bucket has no bound.
pub const LATENCY_BUCKETS: [u64; 16] = [
    50, 100, 250, 500, 1_000, 2_500, 5_000, 10_000, 25_000, 50_000, 100_000, 250_000, 500_000,
    1_000_000, 2_500_000, 10_000_000,
];
