//! The last calls that ended, as hashes, so that none of them is run again; knows nothing of calls in flight.

use std::collections::VecDeque;

use sha1_smol::Sha1;

use crate::{
    agents::{
        calls::{REMEMBERED_FOR, REMEMBERED_MAX},
        first_half,
    },
    names::Id,
};

/// The last [`REMEMBERED_MAX`] calls, oldest first.
#[derive(Debug, Default)]
pub(super) struct Remembered(VecDeque<EndedCall>);

/// Call that has ended. Hashes take half the room of ids, and none on the heap.
#[derive(Debug)]
pub(super) struct EndedCall {
    request: [u8; 16],
    /// Hash of the call's body.
    pub(super) hash: [u8; 16],
    /// Time of the end, in seconds.
    at: u32,
    /// Whether the agent's response ended the call.
    pub(super) is_response: bool,
}

impl Remembered {
    pub(super) fn add(&mut self, request: &Id, hash: [u8; 16], is_response: bool, now: u64) {
        if self.0.len() == REMEMBERED_MAX {
            self.0.pop_front();
        }
        self.0.push_back(EndedCall { request: key(request), hash, at: seconds(now), is_response });
    }

    /// Returns the call with this id, if it is remembered.
    pub(super) fn find(&mut self, request: &Id, now: u64) -> Option<&EndedCall> {
        self.forget(now);
        if self.0.is_empty() {
            return None;
        }
        let request = key(request);
        self.0.iter().find(|call| call.request == request)
    }

    /// Removes the calls that ended too long ago.
    pub(super) fn forget(&mut self, now: u64) {
        let now = seconds(now);
        let is_old = |call: &EndedCall| now.saturating_sub(call.at) >= seconds(REMEMBERED_FOR);
        while self.0.front().is_some_and(is_old) {
            self.0.pop_front();
        }
        if self.0.is_empty() {
            self.0 = VecDeque::new();
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.0.len()
    }
}

fn key(request: &Id) -> [u8; 16] {
    let mut hash = Sha1::new();
    hash.update(request.as_str().as_bytes());
    first_half(&hash)
}

fn seconds(micros: u64) -> u32 {
    u32::try_from(micros / 1_000_000).unwrap_or(u32::MAX)
}
