//! State and counters of a bus, as readiness and metrics read them.

use crate::{store::not_done::NotDone, telemetry::counter::Counter};

/// State of a bus, for readiness and metrics.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Status {
    /// Every connection is up.
    pub connected: bool,
    /// The latest subscription is complete, and a probe over every other connection came back.
    pub subscribed: bool,
    /// The reason why the server takes no writes, though the connections are up.
    pub refusal: Option<NotDone>,
    /// Wanted channels.
    pub channels: usize,
    /// Bytes of messages that wait to be published.
    pub queued_bytes: usize,
    /// The part of a Cluster that is away, while the others work.
    pub away: Option<String>,
    /// The latest trouble of a connection, without secrets; `None` while every connection is up.
    pub last_error: Option<String>,
}

/// Counters of a bus since the start; read by metrics.
#[derive(Debug, Default)]
pub struct BusCounters {
    /// Messages that were read, probes included.
    pub messages_in: Counter,
    /// Publishes that were answered.
    pub published: Counter,
    /// Of these, messages without a receiver that were kept in a stream.
    pub publish_kept: Counter,
    /// Of these, messages that are in a history now.
    pub publish_stored: Counter,
    /// Publishes without an answer when the connection was lost.
    pub publish_lost: Counter,
    /// Publishes that were refused and certainly not done, by [`NotDone`].
    pub publish_refused: [Counter; NotDone::ALL.len()],
    /// Publishes that did not fit into the queue.
    pub publish_full: Counter,
    /// Lost connections.
    pub links_lost: Counter,
    /// Connections that were made, the first ones included.
    pub connects: Counter,
    /// Connection attempts that failed.
    pub connects_failed: Counter,
    /// Probes that did not come back: a connection is deaf, or two connections end at different servers.
    pub probe_failures: Counter,
    /// Channels that the server refused.
    pub subscribe_errors: Counter,
    /// Connections that were refused or closed because the server was no master.
    pub role_refused: Counter,
}
