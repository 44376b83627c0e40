//! Reliable messages to one member: numbered, and sent again until the member acknowledges them.

use bytes::Bytes;
use wsproxy_conn::clock::Micros;
use wsproxy_proto::rooms::{check::Acked, stamp};

use crate::{
    config::rooms::{Overflow, RoomsConfig},
    core::acks::{AckWindow, Due, Patience},
};

/// The reliable messages of a member. Numbers count per connection, from 1.
#[derive(Debug, Default)]
pub(super) struct Reliable {
    window: AckWindow,
    last: u64,
}

/// Outcome of adding a reliable message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Added {
    /// It waits for an `ack`; this number of older ones was given up for it.
    Waits(usize),
    /// It is sent once, since too many wait.
    Once,
    /// The connection is to be closed.
    Overflow,
}

/// Returns the limits of a configuration.
pub(super) fn patience(config: &RoomsConfig) -> Patience {
    Patience {
        interval: config.ack_interval.into(),
        tries_max: config.ack_tries,
        messages_max: config.ack_queue,
        bytes_max: BYTES_MAX,
    }
}

impl Reliable {
    /// Returns an envelope with the number of the next message.
    pub(super) fn number(&mut self, envelope: &[u8]) -> Vec<u8> {
        self.last += 1;
        let mut numbered = Vec::with_capacity(envelope.len() + NUMBER_BYTES);
        numbered.extend_from_slice(envelope);
        stamp::append_seq(self.last, &mut numbered);
        numbered
    }

    /// Adds the message that was numbered last, which is sent as `frame`.
    pub(super) fn add(
        &mut self,
        frame: Bytes,
        now: Micros,
        overflow: Overflow,
        patience: &Patience,
    ) -> Added {
        let is_full = self.window.len() >= patience.messages_max;
        match overflow {
            Overflow::DropNewest if is_full => return Added::Once,
            Overflow::Disconnect if is_full => return Added::Overflow,
            _ => {}
        }
        let number = Bytes::copy_from_slice(&self.last.to_be_bytes());
        Added::Waits(self.window.add(number, frame, now, patience).len())
    }

    /// Ends the wait for acknowledged messages. Returns their number.
    pub(super) fn acked(&mut self, acked: &Acked<'_>) -> usize {
        // In one walk: a client chooses how many numbers it names, and the lock of its room is held.
        let mut more: Vec<u64> = acked.more().take(MORE_MAX).collect();
        more.sort_unstable();
        let is_acked = |number| number <= acked.seq || more.binary_search(&number).is_ok();
        self.window.acked_together(|number| is_acked(number_of(number)))
    }

    /// Returns the next step that is due.
    pub(super) fn due(&mut self, now: Micros, patience: &Patience) -> Option<Due> {
        self.window.due(now, patience)
    }

    /// Gives due messages another interval, since the member has not read their first copies.
    pub(super) fn postpone(&mut self, now: Micros, patience: &Patience) {
        self.window.postpone(now, patience);
    }

    /// Returns the time of the next step.
    pub(super) fn next(&self) -> Option<Micros> {
        self.window.next()
    }

    /// Returns the number of messages that wait.
    pub(super) fn len(&self) -> usize {
        self.window.len()
    }
}

fn number_of(number: &[u8]) -> u64 {
    number.try_into().map_or(u64::MAX, u64::from_be_bytes)
}

/// Upper bound of the bytes that wait for one member's `ack`.
const BYTES_MAX: usize = 1024 * 1024;

/// Most numbers that one `Ack` may name beside the cumulative one.
const MORE_MAX: usize = 1000;

/// Room for the number of a message.
const NUMBER_BYTES: usize = 12;

#[cfg(test)]
mod tests {
    use super::*;

    fn config(overflow: Overflow) -> RoomsConfig {
        RoomsConfig { ack_queue: 2, overflow, ..RoomsConfig::default() }
    }

    fn add(reliable: &mut Reliable, config: &RoomsConfig) -> Added {
        let frame = reliable.number(b"").into();
        reliable.add(frame, Micros(0), config.overflow, &patience(config))
    }

    #[test]
    fn overflow_is_what_the_operator_chose() {
        for (overflow, expected) in [
            (Overflow::DropOldest, Added::Waits(1)),
            (Overflow::DropNewest, Added::Once),
            (Overflow::Disconnect, Added::Overflow),
        ] {
            let (mut reliable, config) = (Reliable::default(), config(overflow));
            assert_eq!(add(&mut reliable, &config), Added::Waits(0));
            assert_eq!(add(&mut reliable, &config), Added::Waits(0));
            assert_eq!(add(&mut reliable, &config), expected);
        }
    }
}
