//! The table of relayed calls: who waits for which call. Knows no bus.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};

use bytes::Bytes;
use hashbrown::{HashMap, hash_map::Entry};
use parking_lot::Mutex;
use tokio_util::sync::CancellationToken;
use wsproxy_proto::names::Id;

use crate::endpoint::agents::caller::{CallerHandle, CallerId};

/// Calls by user and request id.
///
/// Invariant: of each user and request id one call is on its way from this process. Further callers with the same body
/// join it, up to [`CALLERS_MAX`] in all.
#[derive(Default)]
pub(super) struct Table {
    /// Guards the calls. The task that removes a call tells its callers the end.
    calls: Mutex<HashMap<CallKey, Relayed>>,
    numbers: AtomicU64,
}

/// A call's task, which has to send it. A later call of the same name has another number.
pub(super) struct Errand {
    pub(super) key: CallKey,
    number: u64,
    /// Cancelled when the call was removed.
    pub(super) ended: CancellationToken,
    /// The call may have reached an instance.
    is_sent: AtomicBool,
}

/// Name of a call.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(in crate::endpoint::agents) struct CallKey {
    /// User of the agent.
    pub(in crate::endpoint::agents) user: Id,
    /// Id of the call.
    pub(in crate::endpoint::agents) request: Id,
}

/// Answer to a caller that joins a call.
pub(super) enum Joined {
    /// The caller is the first one, and its call has to be sent.
    First(Errand),
    /// The call is on its way.
    Another,
    /// Another call has this name.
    Conflict(CallerHandle),
    /// Too many callers wait for the call.
    Full(CallerHandle),
}

/// Consequence of a caller's leaving.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Left {
    /// The call goes on for other callers, or there is no such caller.
    Nothing,
    /// The call was not sent, and is not going to be.
    Unsent,
    /// The last caller has left a call that may have been sent.
    Sent,
}

/// Consequence of a cancel.
pub(super) enum Cancelled {
    /// The call was not sent, and is gone.
    Removed(Vec<CallerHandle>),
    /// The call may have reached an instance, which has to be told.
    Marked,
}

struct Relayed {
    hash: [u8; 16],
    callers: Vec<CallerHandle>,
    /// The call may have reached an instance.
    is_sent: bool,
    /// The call is to be cancelled if it turns out that no instance received it.
    is_cancelled: bool,
    number: u64,
    /// Ends the call's task when the call is removed.
    ended: CancellationToken,
}

impl Table {
    /// Adds a caller to its call.
    pub(super) fn join(&self, key: &CallKey, hash: [u8; 16], caller: CallerHandle) -> Joined {
        match self.calls.lock().entry(key.clone()) {
            Entry::Vacant(entry) => {
                let (key, number) = (key.clone(), self.numbers.fetch_add(1, Relaxed));
                let (ended, is_sent) = Default::default();
                let errand = Errand { key, number, ended, is_sent };
                let (callers, ended) = (vec![caller], errand.ended.clone());
                let (is_sent, is_cancelled) = (false, false);
                entry.insert(Relayed { hash, callers, is_sent, is_cancelled, number, ended });
                Joined::First(errand)
            }
            Entry::Occupied(entry) if entry.get().hash != hash => Joined::Conflict(caller),
            Entry::Occupied(entry) if entry.get().callers.len() >= CALLERS_MAX => {
                Joined::Full(caller)
            }
            Entry::Occupied(mut entry) => {
                entry.get_mut().callers.push(caller);
                Joined::Another
            }
        }
    }

    /// Notes whether a call may have reached an instance. Returns whether the call is still wanted.
    pub(super) fn set_sent(&self, errand: &Errand, is_sent: bool) -> bool {
        let mut calls = self.calls.lock();
        let call = calls.get_mut(&errand.key).filter(|call| call.number == errand.number);
        let Some(call) = call else { return false };
        call.is_sent = is_sent;
        errand.is_sent.store(is_sent, Relaxed);
        is_sent || !call.is_cancelled
    }

    /// Removes a caller, and its call with the last one.
    pub(super) fn leave(&self, key: &CallKey, caller: CallerId) -> Left {
        let mut calls = self.calls.lock();
        let Some(call) = calls.get_mut(key) else { return Left::Nothing };
        let Some(at) = call.callers.iter().position(|known| known.id() == caller) else {
            return Left::Nothing;
        };
        let gone = call.callers.swap_remove(at);
        if !call.callers.is_empty() {
            return Left::Nothing;
        }
        let call = calls.remove(key);
        drop(calls);
        drop(gone);
        call.map_or(Left::Nothing, |call| {
            call.ended.cancel();
            if call.is_sent { Left::Sent } else { Left::Unsent }
        })
    }

    /// Passes progress to all callers of a call.
    pub(super) fn progress(&self, key: &CallKey, data: &Bytes) {
        for caller in self.calls.lock().get(key).into_iter().flat_map(|call| &call.callers) {
            caller.progress(data.clone());
        }
    }

    /// Removes a call. Returns its callers, of which each has to be told the end.
    pub(super) fn take(&self, key: &CallKey) -> Vec<CallerHandle> {
        let call = self.calls.lock().remove(key);
        call.map(Relayed::end).unwrap_or_default()
    }

    /// As [`Self::take`], for the call's own task.
    pub(super) fn take_own(&self, errand: &Errand) -> Vec<CallerHandle> {
        let mut calls = self.calls.lock();
        let is_own = calls.get(&errand.key).is_some_and(|call| call.number == errand.number);
        let call = is_own.then(|| calls.remove(&errand.key)).flatten();
        call.map(Relayed::end).unwrap_or_default()
    }

    /// Removes a call that was not sent, and marks one that may be. Returns the callers of the removed one; `None` if
    /// there is no such call.
    pub(super) fn cancel(&self, key: &CallKey) -> Option<Cancelled> {
        let mut calls = self.calls.lock();
        let call = calls.get_mut(key)?;
        if call.is_sent {
            call.is_cancelled = true;
            return Some(Cancelled::Marked);
        }
        calls.remove(key).map(|call| Cancelled::Removed(call.end()))
    }

    /// Removes all calls that may have been sent. Returns their callers.
    pub(super) fn take_sent(&self) -> Vec<CallerHandle> {
        let sent = self.calls.lock().extract_if(|_, call| call.is_sent).collect::<Vec<_>>();
        sent.into_iter().flat_map(|(_, call)| call.end()).collect()
    }
}

impl Errand {
    /// Returns whether the call may have reached an instance.
    pub(super) fn is_sent(&self) -> bool {
        self.is_sent.load(Relaxed)
    }
}

impl Relayed {
    fn end(self) -> Vec<CallerHandle> {
        self.ended.cancel();
        self.callers
    }
}

/// Upper bound of the callers of one call.
const CALLERS_MAX: usize = 8;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::endpoint::agents::caller;

    #[test]
    fn a_call_cancelled_while_it_is_sent_is_not_sent_again() {
        let (table, id) = (Table::default(), Id::parse("x").unwrap());
        let key = CallKey { user: id.clone(), request: id };
        let begin = || match table.join(&key, [0; 16], caller::call().0) {
            Joined::First(errand) => errand,
            _ => unreachable!("the table is empty"),
        };
        let errand = begin();
        assert!(table.set_sent(&errand, true) && table.set_sent(&errand, false));
        assert!(table.set_sent(&errand, true));
        assert!(matches!(table.cancel(&key), Some(Cancelled::Marked)));
        assert!(!table.set_sent(&errand, false));
        assert_eq!(table.take_own(&errand).len(), 1);
        // One that is not sent is gone at once.
        let errand = begin();
        assert!(
            matches!(table.cancel(&key), Some(Cancelled::Removed(callers)) if callers.len() == 1)
        );
        assert!(errand.ended.is_cancelled() && !table.set_sent(&errand, true));
    }
}
