//! The judgement whether a relayed call has lost its owner, by looks at the agent's place. Knows neither bus nor clock.

use crate::endpoint::agents::owner::PlaceLook;

/// The looks at the place of one call's agent since the call was sent.
#[derive(Debug, Default)]
pub(super) struct OwnerWatch {
    /// The first known generation: that of the owner.
    generation: Option<u64>,
    /// The last look spoke against the owner.
    is_doubted: bool,
}

/// Judgement of a look.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    /// The owner is there, as far as a look can tell.
    There,
    /// The next look decides: the owner may be about to subscribe again, or to end the call itself.
    Doubted,
    /// The owner is lost: two looks in a row agree.
    Lost,
}

impl OwnerWatch {
    /// Judges a look. A place that is heard and has no generation is no proof: Redis has lost its data, and the holder
    /// writes its generation again at its next heartbeat.
    pub(super) fn judge(&mut self, look: &PlaceLook) -> Verdict {
        let is_replaced = look.generation > self.generation && self.generation.is_some();
        self.generation = self.generation.or(look.generation);
        if look.is_heard && !is_replaced {
            self.is_doubted = false;
            return Verdict::There;
        }
        if std::mem::replace(&mut self.is_doubted, true) { Verdict::Lost } else { Verdict::Doubted }
    }
}

#[cfg(test)]
mod tests {
    use super::{Verdict::*, *};

    /// Judges looks in a row: generation (0: none) and whether a connection listens.
    fn judged<const N: usize>(looks: [(u64, bool); N]) -> [Verdict; N] {
        let mut watch = OwnerWatch::default();
        looks.map(|(generation, is_heard)| {
            let generation = (generation > 0).then_some(generation);
            watch.judge(&PlaceLook { generation, is_heard })
        })
    }

    #[test]
    fn an_owner_is_lost_when_two_looks_do_not_hear_it() {
        assert_eq!(judged([(7, true), (7, false), (7, false)]), [There, Doubted, Lost]);
        assert_eq!(judged([(0, false), (0, false)]), [Doubted, Lost]);
        let again = [(7, false), (7, true), (7, false), (7, true)];
        assert_eq!(judged(again), [Doubted, There, Doubted, There]);
    }

    #[test]
    fn an_owner_is_lost_when_a_newer_one_holds_the_place() {
        assert_eq!(judged([(7, true), (8, true), (8, true)]), [There, Doubted, Lost]);
        assert_eq!(judged([(7, false), (8, true)]), [Doubted, Lost]);
    }

    #[test]
    fn a_redis_without_data_is_no_proof_against_an_owner() {
        assert_eq!(judged([(7, true), (0, true), (0, true), (7, true)]), [There; 4]);
        assert_eq!(judged([(0, true), (7, true), (7, true)]), [There; 3]);
        assert_eq!(judged([(0, true), (7, true), (8, true), (8, true)])[2..], [Doubted, Lost]);
    }
}
