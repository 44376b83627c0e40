//! Rule for sending a request again on another lane. Knows no lanes.

use std::fmt;

use http::Method;
use wsproxy_proto::tunnel::event::End;

/// Retries of one request.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Retries {
    undispatched: u32,
    lost: u32,
}

/// Reason why a request is sent again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Retry {
    /// It reached no upstream.
    Undispatched,
    /// Its lane was lost, and it changes nothing.
    LaneLost,
}

impl Retries {
    /// Returns why a request whose stream ended without a head may be sent again, and counts that; `None`: it may not.
    /// `has_more`: the request has a body, all of which is still there, or asks for an upgrade.
    pub(super) fn allow(&mut self, end: &End, method: &Method, has_more: bool) -> Option<Retry> {
        if end.is_not_dispatched() {
            self.undispatched = self.undispatched.saturating_add(1);
            return (self.undispatched <= UNDISPATCHED_MAX).then_some(Retry::Undispatched);
        }
        let is_lost = matches!(end, End::LaneLost { .. });
        (is_lost && self.allow_lost(method, has_more)).then_some(Retry::LaneLost)
    }

    /// Returns whether a request that may have reached its upstream, and whose lane or way there was lost before a head,
    /// may be sent again, and counts that. An upgrade may run a command, so that its method tells nothing.
    pub(in crate::endpoint::tunnel) fn allow_lost(
        &mut self,
        method: &Method,
        has_more: bool,
    ) -> bool {
        let changes_nothing = matches!(*method, Method::GET | Method::HEAD) && !has_more;
        let is_allowed = changes_nothing && self.lost == 0;
        self.lost += u32::from(is_allowed);
        is_allowed
    }

    /// Reads the words of [`Self`] from another instance.
    pub(in crate::endpoint::tunnel) fn parse(text: &str) -> Option<Self> {
        let (undispatched, lost) = text.split_once(' ')?;
        Some(Self { undispatched: undispatched.parse().ok()?, lost: lost.parse().ok()? })
    }

    /// Returns whether the upstream may have seen the request before.
    pub(super) const fn are_marked(&self) -> bool {
        self.lost > 0
    }
}

impl fmt::Display for Retries {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.undispatched, self.lost)
    }
}

/// Most retries of a request that reached no upstream.
const UNDISPATCHED_MAX: u32 = 2;

#[cfg(test)]
mod tests {
    use wsproxy_proto::tunnel::code::Code;

    use super::*;

    #[test]
    fn a_request_that_reached_no_upstream_is_sent_twice_more() {
        for end in [End::GoneAway(Code::Restarting), End::LaneLost { not_dispatched: true }] {
            let mut retries = Retries::default();
            let allowed: Vec<_> =
                (0..3).map(|_| retries.allow(&end, &Method::POST, true).is_some()).collect();
            assert_eq!((allowed, retries.are_marked()), (vec![true, true, false], false));
        }
    }

    #[test]
    fn another_instance_goes_on_with_the_retries() {
        let mut retries = Retries::default();
        let lost = End::LaneLost { not_dispatched: false };
        assert!(retries.allow(&lost, &Method::GET, false).is_some());
        let mut read = Retries::parse(&retries.to_string()).unwrap();
        assert!(read == retries && read.are_marked());
        assert!(read.allow(&lost, &Method::GET, false).is_none());
        for bad in ["", "1", "1 ", "a 1", "-1 0", "0 1 2", "0  1"] {
            assert_eq!(Retries::parse(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn a_lost_lane_is_tried_again_for_reading_only() {
        let end = End::LaneLost { not_dispatched: false };
        let mut retries = Retries::default();
        assert!(retries.allow(&end, &Method::POST, false).is_none());
        assert!(retries.allow(&end, &Method::GET, true).is_none());
        assert!(retries.allow(&end, &Method::GET, false).is_some() && retries.are_marked());
        assert!(retries.allow(&end, &Method::GET, false).is_none());
        let reset = End::ResetHere(Code::Cancelled);
        assert!(Retries::default().allow(&reset, &Method::GET, false).is_none());
    }
}
