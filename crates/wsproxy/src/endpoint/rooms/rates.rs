//! The rate of one member's messages: above it the newest positions wait, and other messages are dropped.

use std::{
    collections::VecDeque,
    sync::atomic::{AtomicU32, Ordering::Relaxed},
};

use parking_lot::Mutex;
use wsproxy_conn::clock::Micros;
use wsproxy_proto::{
    rate::{Bucket, Rate, shared::SharedRate},
    rooms::check::{Body, Checked},
};

use crate::config::rooms::RoomsConfig;

/// Rates of the messages of all members of an instance, and of one member. A reload of the configuration replaces them.
#[derive(Debug)]
pub(super) struct RoomRates {
    /// Messages per second of one member, as members are told; 0: no limit.
    per_second: AtomicU32,
    of_member: SharedRate,
    of_all: SharedRate,
    /// Guards the state of `of_all`.
    bucket: Mutex<Bucket>,
}

impl RoomRates {
    /// Makes the rates of a configuration.
    pub(super) fn new(config: &RoomsConfig) -> Self {
        let rates = Self {
            per_second: AtomicU32::new(0),
            of_member: None.into(),
            of_all: None.into(),
            bucket: Mutex::default(),
        };
        rates.allow(config);
        rates
    }

    /// Takes the rates from another configuration.
    pub(super) fn allow(&self, config: &RoomsConfig) {
        self.per_second.store(config.messages_per_second, Relaxed);
        self.of_member.store(rate(config.messages_per_second));
        self.of_all.store(rate(config.messages_per_second_total));
    }

    /// Returns the messages per second of one member; 0: no limit.
    pub(super) fn per_second(&self) -> u32 {
        self.per_second.load(Relaxed)
    }

    fn take(&self, now: Micros) -> Result<(), u64> {
        let Some(rate) = self.of_all.load() else { return Ok(()) };
        self.bucket.lock().take(rate, nanos(now))
    }
}

/// Verdict on a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Passed {
    /// The message is within the rates.
    Now,
    /// The position waits until the rates allow it.
    Later,
    /// The message is dropped. The client is told so once a second, with the time to wait.
    Dropped(Option<Micros>),
    /// The client has sent too much for too long.
    Flood,
}

/// Rate of one member's messages.
#[derive(Debug, Default)]
pub(super) struct Rates {
    bucket: Bucket,
    /// On the heap, since most members never send above their rate.
    above: Option<Box<Above>>,
}

/// State of a member that has sent above its rate.
#[derive(Debug)]
struct Above {
    /// The newest position of each entity that waits: entity and envelope.
    waiting: VecDeque<(Box<str>, Vec<u8>)>,
    /// Waiting positions that a newer one has replaced.
    coalesced: u64,
    /// Time at which the next waiting position may be sent.
    next: Micros,
    /// Time since which the client has been above its rate.
    over_since: Option<Micros>,
    /// Time of the last message above the rate.
    over_at: Micros,
    /// Time from which on the client is told again.
    tells_at: Micros,
}

impl Rates {
    /// Counts a message.
    pub(super) fn take(
        &mut self,
        (checked, envelope): (&Checked<'_>, &[u8]),
        limits: &RoomRates,
        now: Micros,
    ) -> Passed {
        let Err(wait) = self.pass(limits, now) else {
            // A newer position makes a waiting one needless, and so does the end of its entity.
            if let Body::Position { entity, .. } | Body::Despawn { entity } = checked.body
                && let Some(above) = &mut self.above
            {
                above.forget(entity);
            }
            return Passed::Now;
        };
        let above = self.above.get_or_insert_default();
        if above.is_flood(now) {
            return Passed::Flood;
        }
        match checked.body {
            Body::Position { entity, .. } if above.keep(entity, envelope) => {
                above.next = above.next.min(now.after(wait));
                Passed::Later
            }
            _ => above.refuse(wait, now),
        }
    }

    /// Counts a message that is no envelope.
    pub(super) fn take_opaque(&mut self, limits: &RoomRates, now: Micros) -> Passed {
        let Err(wait) = self.pass(limits, now) else { return Passed::Now };
        let above = self.above.get_or_insert_default();
        if above.is_flood(now) {
            return Passed::Flood;
        }
        above.refuse(wait, now)
    }

    fn pass(&mut self, limits: &RoomRates, now: Micros) -> Result<(), Micros> {
        let wait = |nanos: u64| Micros(nanos.div_ceil(1000));
        if let Some(rate) = limits.of_member.load() {
            self.bucket.take(rate, nanos(now)).map_err(wait)?;
        }
        limits.take(now).map_err(wait)
    }

    /// Returns a position that may be sent now.
    pub(super) fn due(&mut self, limits: &RoomRates, now: Micros) -> Option<Vec<u8>> {
        if self.above.as_ref().is_none_or(|above| above.waiting.is_empty() || now < above.next) {
            return None;
        }
        let passed = self.pass(limits, now);
        let above = self.above.as_mut()?;
        if let Err(wait) = passed {
            above.next = now.after(wait);
            return None;
        }
        let (_, envelope) = above.waiting.pop_front()?;
        if above.waiting.is_empty() {
            above.next = Micros::NEVER;
        }
        Some(envelope)
    }

    /// Returns the time at which [`Self::due`] may have a position.
    pub(super) fn next(&self) -> Micros {
        self.above.as_ref().map_or(Micros::NEVER, |above| above.next)
    }

    /// Returns the number of waiting positions that a newer one has replaced since the last call.
    pub(super) fn take_coalesced(&mut self) -> u64 {
        self.above.as_mut().map_or(0, |above| std::mem::take(&mut above.coalesced))
    }
}

impl Default for Above {
    fn default() -> Self {
        Self {
            waiting: VecDeque::new(),
            coalesced: 0,
            next: Micros::NEVER,
            over_since: None,
            over_at: Micros(0),
            tells_at: Micros(0),
        }
    }
}

impl Above {
    fn forget(&mut self, entity: &str) {
        let count = self.waiting.len();
        self.waiting.retain(|(waiting, _)| **waiting != *entity);
        self.coalesced += (count - self.waiting.len()) as u64;
        if self.waiting.is_empty() {
            self.next = Micros::NEVER;
        }
    }

    /// Keeps the newest position of an entity. Returns whether there is room.
    fn keep(&mut self, entity: &str, envelope: &[u8]) -> bool {
        if envelope.len() > POSITION_BYTES_MAX {
            return false;
        }
        if let Some((_, waiting)) =
            self.waiting.iter_mut().find(|(waiting, _)| **waiting == *entity)
        {
            waiting.clear();
            waiting.extend_from_slice(envelope);
            self.coalesced += 1;
            return true;
        }
        let has_room = self.waiting.len() < WAITING_MAX;
        if has_room {
            self.waiting.push_back((entity.into(), envelope.to_vec()));
        }
        has_room
    }

    fn refuse(&mut self, wait: Micros, now: Micros) -> Passed {
        if now < self.tells_at {
            return Passed::Dropped(None);
        }
        self.tells_at = now.after(TELL_EVERY);
        Passed::Dropped(Some(wait))
    }

    /// Notes a message above the rate. Returns whether there was one in every second of the last ten.
    fn is_flood(&mut self, now: Micros) -> bool {
        let goes_on = now.since(self.over_at) < OVER_PAUSE;
        self.over_at = now;
        let since = match self.over_since.filter(|_| goes_on) {
            Some(since) => since,
            None => *self.over_since.insert(now),
        };
        now.since(since) >= FLOOD_AFTER
    }
}

fn rate(per_second: u32) -> Option<Rate> {
    Rate::new(per_second, 1000, per_second.saturating_mul(2))
}

const fn nanos(now: Micros) -> u64 {
    now.0.saturating_mul(1000)
}

/// Most positions that wait: as many as a member usually has entities.
const WAITING_MAX: usize = 100;

/// Largest envelope of a position that waits.
const POSITION_BYTES_MAX: usize = 1024;

// Every member has one.
const _: () = assert!(size_of::<Rates>() <= 16);

const TELL_EVERY: Micros = Micros(1_000_000);

/// Pause after which a client counts as back below its rate.
const OVER_PAUSE: Micros = Micros(1_000_000);

/// Time above the rate after which a client is disconnected.
const FLOOD_AFTER: Micros = Micros(10_000_000);

#[cfg(test)]
mod tests {
    use super::*;
    use wsproxy_proto::rooms::check;

    /// An envelope with a position of the entity `e`, and a `seq` to tell it from others.
    fn position(entity: u8, seq: u8) -> Vec<u8> {
        vec![0xA2, 1, 5, 10, 1, entity, 32, seq]
    }

    fn take(rates: &mut Rates, limits: &RoomRates, envelope: &[u8], now: u64) -> Passed {
        rates.take((&check::check(envelope, "me").unwrap(), envelope), limits, Micros(now))
    }

    fn one_per_second() -> (Rates, RoomRates) {
        let config = RoomsConfig { messages_per_second: 1, ..RoomsConfig::default() };
        (Rates::default(), RoomRates::new(&config))
    }

    #[test]
    fn a_changed_rate_holds_for_members_who_are_there() {
        let (mut rates, limits) = one_per_second();
        let now = 1_000_000_000;
        let mut made = |limits: &RoomRates, now| {
            let is_passed = |_: &u32| rates.take_opaque(limits, Micros(now)) == Passed::Now;
            (0..9).filter(is_passed).count()
        };
        assert_eq!(made(&limits, now), 2);
        let config =
            |messages_per_second| RoomsConfig { messages_per_second, ..RoomsConfig::default() };
        limits.allow(&config(100));
        assert_eq!((made(&limits, now + 50_000), limits.per_second()), (5, 100));
        limits.allow(&config(0));
        assert_eq!(made(&limits, now + 50_000), 9);
    }

    #[test]
    fn newest_position_of_each_entity_waits_for_its_time() {
        let (mut rates, limits) = one_per_second();
        let now = 1_000_000_000;
        assert_eq!(take(&mut rates, &limits, &position(b'a', 0), now), Passed::Now);
        assert_eq!(take(&mut rates, &limits, &position(b'a', 1), now), Passed::Now);
        for seq in 2..9 {
            assert_eq!(take(&mut rates, &limits, &position(b'a', seq), now), Passed::Later);
        }
        assert_eq!(take(&mut rates, &limits, &position(b'b', 0), now), Passed::Later);
        assert_eq!((rates.take_coalesced(), rates.take_coalesced()), (6, 0));
        assert_eq!(rates.due(&limits, Micros(now)), None);
        let next = rates.next();
        assert_eq!(next, Micros(now + 1_000_000));
        assert_eq!(rates.due(&limits, next), Some(position(b'a', 8)));
        assert_eq!(rates.due(&limits, next), None);
        let next = rates.next();
        assert_eq!(rates.due(&limits, next), Some(position(b'b', 0)));
        assert_eq!(rates.next(), Micros::NEVER);
    }

    #[test]
    fn despawn_ends_the_waiting_position_of_its_entity() {
        let (mut rates, limits) = one_per_second();
        let now = 1_000_000_000;
        for seq in 0..3 {
            take(&mut rates, &limits, &position(b'a', seq), now);
        }
        let despawn = [0x82, 2, 3, 10, 1, b'a'];
        assert_eq!(take(&mut rates, &limits, &despawn, now + 1_000_000), Passed::Now);
        assert_eq!(rates.due(&limits, Micros(now + 9_000_000)), None);
        assert_eq!(rates.next(), Micros::NEVER);
    }

    #[test]
    fn positions_of_so_many_entities_wait() {
        let mut above = Above::default();
        let names = u8::MIN..WAITING_MAX as u8;
        assert!(names.clone().all(|name| above.keep(&name.to_string(), b"1")));
        assert!(!above.keep("one too many", b"1"));
        assert!(above.keep("0", b"2"), "a newer position takes no further place");
        above.forget("1");
        assert_eq!(above.waiting.len(), names.len() - 1);
        assert_eq!(above.waiting.pop_front(), Some(("0".into(), b"2".to_vec())));
    }

    #[test]
    fn client_above_its_rate_is_told_once_a_second_and_closed_after_ten() {
        let (mut rates, limits) = one_per_second();
        let mut told = 0;
        for tenth in 0..200_u64 {
            match rates.take_opaque(&limits, Micros(1_000_000_000 + tenth * 100_000)) {
                Passed::Dropped(Some(_)) => told += 1,
                Passed::Flood => {
                    assert!((100..=125).contains(&tenth), "{tenth}");
                    assert!((10..=12).contains(&told), "{told}");
                    return;
                }
                _ => {}
            }
        }
        panic!("the client was not closed");
    }
}
