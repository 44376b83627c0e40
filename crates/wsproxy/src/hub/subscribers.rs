//! The sinks of one topic: small for one, fast to leave for thousands.

use hashbrown::HashMap;
use smallvec::SmallVec;

use crate::hub::Sink;

/// From so many on, leaving looks the place up instead of searching it.
const INDEXED_FROM: usize = 64;

/// The sinks of one topic, without order.
#[derive(Debug)]
pub struct Subscribers {
    sinks: SmallVec<[Sink; 1]>,
    /// Where each sink is, once there are many.
    #[allow(clippy::type_complexity, reason = "it is spelled once")]
    index: Option<Box<HashMap<(usize, u8), usize, foldhash::fast::RandomState>>>,
}

impl Subscribers {
    /// The first one.
    #[must_use]
    pub fn one(sink: Sink) -> Self {
        Self { sinks: SmallVec::from_buf([sink]), index: None }
    }

    /// Adds a sink; one that is there already is replaced.
    pub fn add(&mut self, sink: Sink) {
        let place = sink.place();
        if let Some(at) = self.position(place) {
            self.sinks[at] = sink;
            return;
        }
        self.sinks.push(sink);
        if let Some(index) = &mut self.index {
            index.insert(place, self.sinks.len() - 1);
        } else if self.sinks.len() >= INDEXED_FROM {
            let places = self.sinks.iter().enumerate().map(|(at, sink)| (sink.place(), at));
            self.index = Some(Box::new(places.collect()));
        }
    }

    /// Removes and returns a sink.
    pub fn remove(&mut self, place: (usize, u8)) -> Option<Sink> {
        let at = self.position(place)?;
        let removed = self.sinks.swap_remove(at);
        if let Some(index) = &mut self.index {
            index.remove(&place);
            if let Some(moved) = self.sinks.get(at) {
                index.insert(moved.place(), at);
            }
        }
        if self.sinks.len() < INDEXED_FROM / 2 && self.index.is_some() {
            self.index = None;
            self.sinks.shrink_to_fit();
        }
        Some(removed)
    }

    /// Whether nobody is left.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.sinks.is_empty()
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = &Sink> {
        self.sinks.iter()
    }

    fn position(&self, place: (usize, u8)) -> Option<usize> {
        match &self.index {
            Some(index) => index.get(&place).copied(),
            None => self.sinks.iter().position(|sink| sink.place() == place),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::hub::tap::Tap;

    #[test]
    fn any_order_of_joining_and_leaving_keeps_exactly_those_who_stay() {
        let taps: Vec<_> = (0..500).map(|_| Tap::new(1)).collect();
        let mut subscribers = Subscribers::one(Sink::Tap(Arc::clone(&taps[0])));
        for tap in &taps {
            subscribers.add(Sink::Tap(Arc::clone(tap)));
        }
        assert_eq!(subscribers.iter().count(), 500);
        for tap in taps.iter().step_by(2).rev() {
            assert!(subscribers.remove(Sink::Tap(Arc::clone(tap)).place()).is_some());
            assert!(subscribers.remove(Sink::Tap(Arc::clone(tap)).place()).is_none());
        }
        assert_eq!(subscribers.iter().count(), 250);
        for tap in taps.iter().skip(1).step_by(2) {
            assert!(subscribers.remove(Sink::Tap(Arc::clone(tap)).place()).is_some());
        }
        assert!(subscribers.is_empty() && subscribers.index.is_none());
    }
}
