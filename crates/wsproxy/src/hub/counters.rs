//! Counters of deliveries and histories, which the metrics read.

use wsproxy_proto::history::Lost;

use crate::telemetry::counter::Counter;

/// Counters of the hub.
#[derive(Debug, Default)]
pub struct HubCounters {
    /// Messages of topics that no longer have a sink here.
    pub unwanted: Counter,
    /// Messages that are not UTF-8, for clients that get text only.
    pub unframeable: Counter,
    /// Connections that were told of a loss of the bus, or closed for it.
    pub bus_loss_notices: Counter,
    /// Clients that resumed and missed no message.
    pub resumed: Counter,
    /// Messages that these clients got from histories.
    pub replayed: Counter,
    /// Clients that were told of a lost history, indexed by [`Lost`].
    pub history_lost: [Counter; Lost::ALL.len()],
    /// Messages of histories that came again and were not delivered again.
    pub duplicates: Counter,
    /// Logs that were read again and are whole.
    pub healed: Counter,
    /// Missed messages that were found in these logs.
    pub healed_messages: Counter,
    /// Plain messages that were adopted into a history.
    pub captured: Counter,
    /// Plain messages that could not be adopted.
    pub uncaptured: Counter,
}
