//! The sinks of one topic: small for a single sink, fast for thousands.

use hashbrown::HashMap;

use crate::hub::sink::{Sink, SinkId};

/// The sinks of one topic, without order.
///
/// Almost every session has a single connection, so a single sink must take no extra memory.
#[derive(Debug, Default)]
pub(super) enum Subscribers {
    /// No sink: the topic is about to be removed.
    #[default]
    None,
    /// One sink.
    One(Sink),
    /// Several sinks, by their destinations.
    Many(Box<HashMap<SinkId, Sink, foldhash::fast::RandomState>>),
}

impl Subscribers {
    /// Adds a sink, and replaces one with the same destination.
    pub(super) fn add(&mut self, sink: Sink) {
        match self {
            Self::Many(sinks) => {
                sinks.insert(sink.id(), sink);
            }
            Self::One(first) if first.id() != sink.id() => {
                let mut sinks = Box::new(HashMap::default());
                sinks.insert(sink.id(), sink);
                if let Self::One(first) = std::mem::replace(self, Self::None) {
                    sinks.insert(first.id(), first);
                }
                *self = Self::Many(sinks);
            }
            Self::None | Self::One(_) => *self = Self::One(sink),
        }
    }

    /// Removes and returns a sink.
    pub(super) fn remove(&mut self, id: SinkId) -> Option<Sink> {
        let removed = match self {
            Self::Many(sinks) => {
                let removed = sinks.remove(&id);
                if sinks.len() < sinks.capacity() / 4 {
                    sinks.shrink_to_fit();
                }
                removed
            }
            Self::One(sink) if sink.id() == id => match std::mem::replace(self, Self::None) {
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

    /// Returns the number of sinks.
    pub(super) fn len(&self) -> usize {
        match self {
            Self::None => 0,
            Self::One(_) => 1,
            Self::Many(sinks) => sinks.len(),
        }
    }

    /// Returns whether there is no sink.
    pub(super) const fn is_empty(&self) -> bool {
        matches!(self, Self::None)
    }

    /// Returns all sinks. They may be replaced by others with the same destination.
    pub(super) fn iter_mut(&mut self) -> impl Iterator<Item = &mut Sink> {
        let (one, many) = match self {
            Self::None => (None, None),
            Self::One(sink) => (Some(sink), None),
            Self::Many(sinks) => (None, Some(sinks.values_mut())),
        };
        one.into_iter().chain(many.into_iter().flatten())
    }

    /// Returns all sinks.
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
    use crate::hub::follower::FollowerQueue;

    #[test]
    fn any_order_of_joining_and_leaving_keeps_exactly_those_who_stay() {
        let queues: Vec<_> = (0..500).map(|_| FollowerQueue::new(1)).collect();
        let mut subscribers = Subscribers::None;
        assert_eq!(size_of::<Subscribers>(), 24, "there is one for every session");
        for queue in &queues {
            subscribers.add(Sink::Follower(Arc::clone(queue)));
        }
        assert_eq!(subscribers.iter().count(), 500);
        for queue in queues.iter().step_by(2).rev() {
            assert!(subscribers.remove(Sink::Follower(Arc::clone(queue)).id()).is_some());
            assert!(subscribers.remove(Sink::Follower(Arc::clone(queue)).id()).is_none());
        }
        assert_eq!(subscribers.iter().count(), 250);
        for queue in queues.iter().skip(1).step_by(2) {
            assert!(subscribers.remove(Sink::Follower(Arc::clone(queue)).id()).is_some());
        }
        assert!(subscribers.is_empty());
    }
}
