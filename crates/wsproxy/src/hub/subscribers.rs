//! The sinks of one topic: as small as can be for one, fast to join and to leave for thousands.

use hashbrown::HashMap;

use crate::hub::{Place, Sink};

/// The sinks of one topic, without order.
///
/// Almost every session has one connection, so that one sink must cost no more than itself.
#[derive(Debug, Default)]
pub(super) enum Subscribers {
    /// Nobody: the topic is about to be forgotten.
    #[default]
    None,
    /// One.
    One(Sink),
    /// Several, by where they deliver to.
    Many(Box<HashMap<Place, Sink, foldhash::fast::RandomState>>),
}

impl Subscribers {
    /// Adds a sink; one that delivers to the same place is replaced.
    pub(super) fn add(&mut self, sink: Sink) {
        match self {
            Self::Many(sinks) => {
                sinks.insert(sink.place(), sink);
            }
            Self::One(first) if first.place() != sink.place() => {
                let mut sinks = Box::new(HashMap::default());
                sinks.insert(sink.place(), sink);
                if let Self::One(first) = std::mem::replace(self, Self::None) {
                    sinks.insert(first.place(), first);
                }
                *self = Self::Many(sinks);
            }
            Self::None | Self::One(_) => *self = Self::One(sink),
        }
    }

    /// Removes and returns a sink.
    pub(super) fn remove(&mut self, place: Place) -> Option<Sink> {
        let removed = match self {
            Self::Many(sinks) => {
                let removed = sinks.remove(&place);
                if sinks.len() < sinks.capacity() / 4 {
                    sinks.shrink_to_fit();
                }
                removed
            }
            Self::One(sink) if sink.place() == place => match std::mem::replace(self, Self::None) {
                Self::One(sink) => Some(sink),
                _ => None,
            },
            Self::None | Self::One(_) => None,
        };
        if matches!(self, Self::Many(sinks) if sinks.is_empty()) {
            *self = Self::None;
        }
        removed
    }

    /// How many there are.
    pub(super) fn len(&self) -> usize {
        match self {
            Self::None => 0,
            Self::One(_) => 1,
            Self::Many(sinks) => sinks.len(),
        }
    }

    /// Whether nobody is left.
    pub(super) const fn is_empty(&self) -> bool {
        matches!(self, Self::None)
    }

    /// All of them, to be changed into others of the same place.
    pub(super) fn iter_mut(&mut self) -> impl Iterator<Item = &mut Sink> {
        let (one, many) = match self {
            Self::None => (None, None),
            Self::One(sink) => (Some(sink), None),
            Self::Many(sinks) => (None, Some(sinks.values_mut())),
        };
        one.into_iter().chain(many.into_iter().flatten())
    }

    /// All of them.
    pub(super) fn iter(&self) -> impl Iterator<Item = &Sink> {
        let (one, many) = match self {
            Self::None => (None, None),
            Self::One(sink) => (Some(sink), None),
            Self::Many(sinks) => (None, Some(sinks.values())),
        };
        one.into_iter().chain(many.into_iter().flatten())
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
        let mut subscribers = Subscribers::None;
        assert_eq!(size_of::<Subscribers>(), 16, "there is one for every session");
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
        assert!(subscribers.is_empty());
    }
}
