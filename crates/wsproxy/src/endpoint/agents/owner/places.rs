//! The places of users' agents in one process, for the embedded bus; without IO and without a clock.

use std::time::Duration;

use hashbrown::HashMap;
use tokio::time::Instant;
use uuid::Uuid;
use wsproxy_proto::names::Id;

use crate::endpoint::agents::owner::{Claim, Claimed, Owner, PLACE_TTL, WINDOW};

/// Places by user.
///
/// Invariant: holds at most twice the places that live, and some thousand.
#[derive(Debug, Default)]
pub(super) struct Places {
    places: HashMap<Id, Place>,
    /// Number of places at which expired ones are removed.
    purged_at: usize,
}

/// The place of one user.
#[derive(Debug, Clone)]
pub(super) struct Place {
    generation: u64,
    /// The holder; `None`: the place was released, and its generation stays for a while.
    holder: Option<Owner>,
    /// Start of the minute in which replacements are counted.
    window: Option<Instant>,
    replaced: u32,
    expires: Instant,
}

impl Places {
    /// Does what the script `agent_claim.lua` does. The second value is the generation of a marker to publish. `now`
    /// is also given in microseconds of the wall clock.
    pub(super) fn claim(
        &mut self,
        user: &Id,
        claim: Claim,
        server: &str,
        replacements_max: u32,
        (now, micros): (Instant, u64),
    ) -> (Claimed, Option<u64>) {
        self.purge(now);
        let place = self.places.entry(user.clone()).or_insert_with(|| Place::new(now));
        if place.expires <= now {
            *place = Place::new(now);
        }
        let before = place.holder.clone();
        let is_holder = before.as_ref().is_some_and(|owner| owner.connection == claim.connection);
        if claim.held.is_some_and(|held| !is_holder && place.generation >= held) {
            return (Claimed::Lost { owner: before, generation: place.generation }, None);
        }
        if claim.held.is_none()
            && !is_holder
            && replacements_max > 0
            && let Some(owner) = &before
            && let Some(retry_after) = place.count(replacements_max, now)
        {
            return (Claimed::Flapping { retry_after, owner: owner.clone() }, None);
        }
        let generation = match claim.held {
            Some(held) => held.max(place.generation),
            None => micros.max(place.generation + 1),
        };
        place.generation = generation;
        place.holder = Some(Owner { connection: claim.connection, server: server.into() });
        place.expires = now + PLACE_TTL;
        let replaced = before.filter(|_| !is_holder);
        let marker = (!is_holder || claim.announce).then_some(generation);
        (Claimed::Held { generation, replaced, is_alone: !is_holder }, marker)
    }

    /// Does what the script `agent_release.lua` does. Returns the generation of the marker to publish.
    pub(super) fn release(
        &mut self,
        user: &Id,
        connection: Uuid,
        kept: Duration,
        now: Instant,
    ) -> Option<u64> {
        let place = self.places.get_mut(user).filter(|place| place.expires > now)?;
        place.holder.take_if(|owner| owner.connection == connection)?;
        place.expires = now + kept;
        Some(place.generation)
    }

    /// Returns a copy of a place.
    pub(super) fn of(&self, user: &Id) -> Option<Place> {
        self.places.get(user).cloned()
    }

    /// Undoes a change of a place.
    pub(super) fn restore(&mut self, user: &Id, before: Option<Place>) {
        match before {
            Some(place) => self.places.insert(user.clone(), place),
            None => self.places.remove(user),
        };
    }

    /// Returns whether a place has a generation.
    pub(super) fn is_awaited(&self, user: &Id, now: Instant) -> bool {
        self.places.get(user).is_some_and(|place| place.expires > now)
    }

    fn purge(&mut self, now: Instant) {
        if self.places.len() >= self.purged_at {
            self.places.retain(|_, place| place.expires > now);
            self.places.shrink_to(self.places.len() * 2);
            self.purged_at = (self.places.len() * 2).max(PURGED_AT_MIN);
        }
    }
}

impl Place {
    const fn new(now: Instant) -> Self {
        Self { generation: 0, holder: None, window: None, replaced: 0, expires: now }
    }

    /// Returns the connection that holds the place.
    pub(super) fn holder_at(&self, now: Instant) -> Option<Uuid> {
        self.holder.as_ref().filter(|_| self.expires > now).map(|owner| owner.connection)
    }

    /// Counts a replacement, unless there were too many within the minute: then returns the rest of the minute.
    fn count(&mut self, replacements_max: u32, now: Instant) -> Option<Duration> {
        let since = |window: Instant| now.saturating_duration_since(window);
        let window = self.window.filter(|window| since(*window) < WINDOW).unwrap_or_else(|| {
            self.replaced = 0;
            now
        });
        if self.replaced >= replacements_max {
            let rest = WINDOW.saturating_sub(since(window));
            return Some(Duration::from_secs(rest.as_millis().div_ceil(1000).max(1) as u64));
        }
        self.window = Some(window);
        self.replaced += 1;
        None
    }
}

/// Smallest number of places at which expired ones are removed.
const PURGED_AT_MIN: usize = 1024;

#[cfg(test)]
mod tests {
    use super::*;

    /// Claims the place of one user as a newcomer.
    fn take(places: &mut Places, now: Instant) -> Claimed {
        let claim = Claim { connection: Uuid::new_v4(), held: None, announce: false };
        places.claim(&user("u"), claim, "s", 2, (now, 1)).0
    }

    fn user(name: &str) -> Id {
        Id::parse(name).unwrap()
    }

    #[tokio::test]
    async fn replacements_are_counted_anew_after_a_minute() {
        let (mut places, start) = (Places::default(), Instant::now());
        for _ in 0..3 {
            assert!(matches!(take(&mut places, start), Claimed::Held { .. }));
        }
        let later = start + Duration::from_millis(20_500);
        let Claimed::Flapping { retry_after, .. } = take(&mut places, later) else {
            panic!("the third replacement is refused")
        };
        assert_eq!(retry_after, Duration::from_secs(40));
        assert!(matches!(take(&mut places, start + WINDOW), Claimed::Held { .. }));
    }

    #[tokio::test]
    async fn place_that_is_not_kept_is_free_and_forgotten() {
        let (mut places, start) = (Places::default(), Instant::now());
        take(&mut places, start);
        assert!(places.is_awaited(&user("u"), start));
        let later = start + PLACE_TTL;
        assert!(!places.is_awaited(&user("u"), later));
        assert!(matches!(take(&mut places, later), Claimed::Held { replaced: None, .. }));
        let much_later = later + PLACE_TTL;
        for number in 0..PURGED_AT_MIN {
            let claim = Claim { connection: Uuid::new_v4(), held: None, announce: false };
            let name = user(&format!("u-{number}"));
            places.claim(&name, claim, "s", 2, (much_later, 1));
        }
        assert!(!places.places.contains_key(&user("u")));
        assert_eq!(places.places.len(), PURGED_AT_MIN);
    }
}
