//! The table of wanted channels, and the server's confirmations. Sends no command itself.
//!
//! Callers on any thread want and unwant channels. The one task of the connection turns the difference into commands
//! ([`Subscriptions::take_changes`]) and reports the server's answers.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use hashbrown::HashMap;
use parking_lot::Mutex;
use tokio::sync::{Notify, oneshot};

use crate::bus::publish::BusError;

/// The table of channels.
#[derive(Default)]
pub(super) struct Subscriptions {
    /// Guards the table; never held while a caller is woken.
    table: Mutex<Table>,
    changed: Notify,
}

/// A `SUBSCRIBE` command; later commands have larger numbers, modulo 2^32.
pub(super) type CommandId = u32;

/// A caller that waits for channels, and its result.
pub(super) type Settled = (oneshot::Sender<Result<(), BusError>>, Result<(), BusError>);

/// Changes of subscriptions that the server does not have yet.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Changes {
    /// Channels to subscribe, with the command id that was given.
    pub(super) subscribe: Vec<Arc<str>>,
    /// Channels to unsubscribe.
    pub(super) unsubscribe: Vec<Arc<str>>,
}

#[derive(Default)]
struct Table {
    slots: HashMap<Arc<str>, Slot>,
    /// Channels whose state at the server may differ. Empty while there is no connection.
    dirty: Vec<Arc<str>>,
    /// Waiting callers by channel, for channels that are not confirmed.
    waiting: HashMap<Arc<str>, Vec<Arc<Waiter>>>,
    refused: usize,
    connected: bool,
    closed: bool,
}

struct Slot {
    stage: Stage,
    wanted: bool,
    /// Set while the channel is in `dirty`.
    queued: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// The server was not asked for the channel on this connection.
    New,
    /// The server was asked with this command. Confirmations of older commands do not count, since an `UNSUBSCRIBE`
    /// may have followed them.
    Asked(CommandId),
    Confirmed,
    /// The server denied the channel; it is asked again now and then while the channel is wanted.
    Refused,
}

struct Waiter {
    missing: AtomicUsize,
    caller: Mutex<Option<oneshot::Sender<Result<(), BusError>>>>,
}

impl Subscriptions {
    /// Adds wanted channels; returns `None` if all are confirmed already.
    pub(super) fn want(
        &self,
        channels: Vec<Arc<str>>,
    ) -> Result<Option<oneshot::Receiver<Result<(), BusError>>>, BusError> {
        let (sender, receiver) = oneshot::channel();
        let waiter =
            Arc::new(Waiter { missing: AtomicUsize::new(0), caller: Mutex::new(Some(sender)) });
        let (missing, changed) = {
            let mut table = self.table.lock();
            if table.closed {
                return Err(BusError::Closed);
            }
            for channel in channels {
                table.want(channel, &waiter);
            }
            (waiter.missing.load(Ordering::Relaxed), !table.dirty.is_empty())
        };
        if changed {
            self.changed.notify_one();
        }
        Ok((missing > 0).then_some(receiver))
    }

    /// Removes wanted channels.
    pub(super) fn unwant(&self, channels: Vec<Arc<str>>) {
        // Waiters are dropped outside the lock, since that wakes their callers.
        let mut orphans = Vec::new();
        {
            let mut table = self.table.lock();
            for channel in channels {
                orphans.extend(table.waiting.remove(&channel));
                table.unwant(channel);
            }
        }
        drop(orphans);
        self.changed.notify_one();
    }

    /// Resolves once after the table may have changed.
    pub(super) async fn changed(&self) {
        self.changed.notified().await;
    }

    /// Takes changes of at most `count` channels; they are asked for under `id`.
    pub(super) fn take_changes(&self, id: CommandId, count: usize) -> Changes {
        let mut changes = Changes::default();
        let mut table = self.table.lock();
        while changes.subscribe.len() < count && changes.unsubscribe.len() < count {
            let Some(channel) = table.dirty.pop() else { break };
            let Some(slot) = table.slots.get_mut(&channel) else { continue };
            slot.queued = false;
            match (slot.wanted, slot.stage) {
                (true, Stage::New) => {
                    slot.stage = Stage::Asked(id);
                    changes.subscribe.push(channel);
                }
                (false, Stage::Asked(_) | Stage::Confirmed) => {
                    table.slots.remove(&channel);
                    changes.unsubscribe.push(channel);
                }
                (false, Stage::New) => drop(table.slots.remove(&channel)),
                (false, Stage::Refused) => {
                    table.slots.remove(&channel);
                    table.refused -= 1;
                }
                (true, _) => {}
            }
        }
        if table.dirty.is_empty() && table.dirty.capacity() > DIRTY_KEPT {
            table.dirty = Vec::new();
        }
        changes
    }

    /// Notes that the server confirmed a channel that was asked for with this command.
    pub(super) fn confirmed(&self, channel: &str, id: CommandId, settled: &mut Vec<Settled>) {
        let mut table = self.table.lock();
        let Some(slot) = table.slots.get_mut(channel) else { return };
        if slot.stage != Stage::Asked(id) {
            return;
        }
        slot.stage = Stage::Confirmed;
        for waiter in table.waiting.remove(channel).unwrap_or_default() {
            if waiter.missing.fetch_sub(1, Ordering::Relaxed) == 1
                && let Some(caller) = waiter.caller.lock().take()
            {
                settled.push((caller, Ok(())));
            }
        }
    }

    /// Notes that the server denied this one channel; returns whether the channel is still wanted.
    pub(super) fn refused(
        &self,
        channel: &str,
        id: CommandId,
        why: &str,
        settled: &mut Vec<Settled>,
    ) -> bool {
        let mut table = self.table.lock();
        let Some(slot) = table.slots.get_mut(channel) else { return false };
        if slot.stage != Stage::Asked(id) {
            return false;
        }
        slot.stage = Stage::Refused;
        table.refused += 1;
        for waiter in table.waiting.remove(channel).unwrap_or_default() {
            if let Some(caller) = waiter.caller.lock().take() {
                settled.push((caller, Err(BusError::Refused(why.into()))));
            }
        }
        true
    }

    /// Prepares a second request after a command was denied as a whole: its channels that still wait for that command
    /// are asked for under `new`, and are left in `channels`.
    pub(super) fn ask_again(&self, channels: &mut Vec<Arc<str>>, old: CommandId, new: CommandId) {
        let mut table = self.table.lock();
        channels.retain(|channel| match table.slots.get_mut(channel) {
            Some(slot) if slot.stage == Stage::Asked(old) => {
                slot.stage = Stage::Asked(new);
                true
            }
            _ => false,
        });
    }

    /// Marks denied channels to be asked for again; returns their number.
    pub(super) fn retry_refused(&self) -> usize {
        let mut table = self.table.lock();
        if table.refused == 0 {
            return 0;
        }
        let Table { slots, dirty, refused, .. } = &mut *table;
        for (channel, slot) in slots.iter_mut().filter(|(_, slot)| slot.stage == Stage::Refused) {
            slot.stage = Stage::New;
            if !slot.queued {
                slot.queued = true;
                dirty.push(channel.clone());
            }
        }
        std::mem::take(refused)
    }

    /// Marks all wanted channels to be asked for on a new connection; returns their number.
    pub(super) fn connected(&self) -> usize {
        let mut table = self.table.lock();
        table.connected = true;
        let Table { slots, dirty, .. } = &mut *table;
        dirty.clear();
        dirty.extend(slots.iter_mut().map(|(channel, slot)| {
            slot.queued = true;
            channel.clone()
        }));
        dirty.len()
    }

    /// Forgets all confirmations, since the connection is gone.
    pub(super) fn disconnected(&self) {
        let mut table = self.table.lock();
        table.connected = false;
        table.dirty = Vec::new();
        table.refused = 0;
        table.slots.retain(|_, slot| slot.wanted);
        for slot in table.slots.values_mut() {
            slot.stage = Stage::New;
            slot.queued = false;
        }
    }

    /// Fails every waiting caller, now and later.
    pub(super) fn close(&self) {
        let waiting = {
            let mut table = self.table.lock();
            table.closed = true;
            std::mem::take(&mut table.waiting)
        };
        for waiter in waiting.into_values().flatten() {
            if let Some(caller) = waiter.caller.lock().take() {
                let _ = caller.send(Err(BusError::Closed));
            }
        }
    }

    /// Returns whether the server has confirmed a channel.
    pub(super) fn is_confirmed(&self, channel: &str) -> bool {
        self.table.lock().slots.get(channel).is_some_and(|slot| slot.stage == Stage::Confirmed)
    }

    /// Returns the number of channels that are wanted or about to be unsubscribed.
    pub(super) fn len(&self) -> usize {
        self.table.lock().slots.len()
    }
}

impl Table {
    fn want(&mut self, channel: Arc<str>, waiter: &Arc<Waiter>) {
        let slot = self.slots.entry(channel.clone()).or_insert(Slot {
            stage: Stage::New,
            wanted: true,
            queued: false,
        });
        slot.wanted = true;
        if slot.stage == Stage::Confirmed {
            return;
        }
        if slot.stage == Stage::Refused {
            slot.stage = Stage::New;
            self.refused -= 1;
        }
        if slot.stage == Stage::New && self.connected && !slot.queued {
            slot.queued = true;
            self.dirty.push(channel.clone());
        }
        waiter.missing.fetch_add(1, Ordering::Relaxed);
        let waiting = self.waiting.entry(channel).or_default();
        // Callers leave their entry when their deadline passes; in an outage many would pile up.
        waiting.retain(|other| other.is_alive());
        waiting.push(waiter.clone());
    }

    fn unwant(&mut self, channel: Arc<str>) {
        let Some(slot) = self.slots.get_mut(&channel) else { return };
        slot.wanted = false;
        match slot.stage {
            Stage::New => drop(self.slots.remove(&channel)),
            Stage::Refused => {
                self.refused -= 1;
                self.slots.remove(&channel);
            }
            Stage::Asked(_) | Stage::Confirmed if !slot.queued => {
                slot.queued = true;
                self.dirty.push(channel);
            }
            Stage::Asked(_) | Stage::Confirmed => {}
        }
    }
}

impl Waiter {
    fn is_alive(&self) -> bool {
        self.caller.lock().as_ref().is_some_and(|caller| !caller.is_closed())
    }
}

/// Changes for which memory is kept after a burst.
const DIRTY_KEPT: usize = 4096;

#[cfg(test)]
mod tests {
    use super::*;

    fn channels(names: &[&str]) -> Vec<Arc<str>> {
        names.iter().map(|name| Arc::from(*name)).collect()
    }

    fn connected() -> Subscriptions {
        let table = Subscriptions::default();
        assert_eq!(table.connected(), 0);
        table
    }

    #[track_caller]
    fn changes(table: &Subscriptions, id: CommandId, subscribe: &[&str], unsubscribe: &[&str]) {
        let expected =
            Changes { subscribe: channels(subscribe), unsubscribe: channels(unsubscribe) };
        assert_eq!(table.take_changes(id, 100), expected);
    }

    fn confirm(table: &Subscriptions, channel: &str, id: CommandId) -> usize {
        let mut settled = Vec::new();
        table.confirmed(channel, id, &mut settled);
        let count = settled.len();
        settled.into_iter().for_each(|(caller, result)| drop(caller.send(result)));
        count
    }

    #[test]
    fn a_caller_is_told_when_its_last_channel_is_confirmed() {
        let table = connected();
        let mut caller = table.want(channels(&["a", "b"])).unwrap().unwrap();
        changes(&table, 1, &["b", "a"], &[]);
        assert_eq!(confirm(&table, "a", 1), 0);
        assert!(caller.try_recv().is_err());
        assert_eq!(confirm(&table, "b", 1), 1);
        assert_eq!(caller.try_recv(), Ok(Ok(())));
        assert!(table.want(channels(&["a", "b"])).unwrap().is_none());
        changes(&table, 2, &[], &[]);
    }

    #[test]
    fn a_confirmation_from_before_an_unsubscribe_does_not_count() {
        let table = connected();
        drop(table.want(channels(&["a"])));
        changes(&table, 1, &["a"], &[]);
        table.unwant(channels(&["a"]));
        changes(&table, 2, &[], &["a"]);
        let caller = table.want(channels(&["a"])).unwrap();
        changes(&table, 2, &["a"], &[]);
        assert_eq!(confirm(&table, "a", 1), 0);
        assert!(!table.is_confirmed("a"));
        assert_eq!(confirm(&table, "a", 2), 1);
        drop(caller);
    }

    #[test]
    fn an_unsubscribe_that_is_taken_back_in_time_is_never_sent() {
        let table = connected();
        drop(table.want(channels(&["a"])));
        changes(&table, 1, &["a"], &[]);
        confirm(&table, "a", 1);
        table.unwant(channels(&["a"]));
        assert!(table.want(channels(&["a"])).unwrap().is_none());
        changes(&table, 2, &[], &[]);
        assert!(table.is_confirmed("a"));
    }

    #[test]
    fn refusals_hit_only_those_who_wait_for_that_channel() {
        let table = connected();
        let mut bad = table.want(channels(&["bad", "good"])).unwrap().unwrap();
        let mut good = table.want(channels(&["good"])).unwrap().unwrap();
        drop(table.take_changes(1, 100));
        let mut settled = Vec::new();
        let mut denied = channels(&["bad", "good"]);
        table.ask_again(&mut denied, 1, 2);
        assert!(table.refused("bad", 2, "no", &mut settled));
        assert!(!table.refused("bad", 2, "no", &mut settled));
        table.confirmed("good", 2, &mut settled);
        settled.into_iter().for_each(|(caller, result)| drop(caller.send(result)));
        assert_eq!(bad.try_recv(), Ok(Err(BusError::Refused("no".into()))));
        assert_eq!(good.try_recv(), Ok(Ok(())));
        assert_eq!(table.retry_refused(), 1);
        changes(&table, 3, &["bad"], &[]);
    }

    #[test]
    fn channels_wanted_during_an_outage_are_subscribed_after_it() {
        let table = Subscriptions::default();
        let mut kept = table.want(channels(&["a"])).unwrap().unwrap();
        drop(table.want(channels(&["b"])));
        table.unwant(channels(&["b"]));
        assert_eq!(table.len(), 1);
        assert!(table.table.lock().dirty.is_empty());
        assert_eq!(table.connected(), 1);
        changes(&table, 1, &["a"], &[]);
        table.disconnected();
        table.connected();
        changes(&table, 1, &["a"], &[]);
        assert_eq!(confirm(&table, "a", 1), 1);
        assert_eq!(kept.try_recv(), Ok(Ok(())));
        assert!(table.table.lock().waiting.is_empty());
    }

    #[test]
    fn callers_that_gave_up_do_not_pile_up() {
        let table = Subscriptions::default();
        for _ in 0..100 {
            drop(table.want(channels(&["a"])));
        }
        assert_eq!(table.table.lock().waiting.values().map(Vec::len).sum::<usize>(), 1);
    }

    #[test]
    fn closing_fails_those_who_wait_and_those_who_come() {
        let table = Subscriptions::default();
        let mut caller = table.want(channels(&["a"])).unwrap().unwrap();
        table.close();
        assert_eq!(caller.try_recv(), Ok(Err(BusError::Closed)));
        assert_eq!(table.want(channels(&["a"])).err(), Some(BusError::Closed));
    }
}
