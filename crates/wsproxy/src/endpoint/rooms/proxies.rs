//! The warning that a proxy is not trusted, so that all its clients share one address and its attempts.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use http::{HeaderMap, header};
use tracing::warn;
use wsproxy_conn::clock::Micros;

use crate::config::peer::{Peer, TrustedProxy};

/// A warning that is given once a minute.
#[derive(Debug, Default)]
pub(super) struct ProxyWarning {
    next: AtomicU64,
}

impl ProxyWarning {
    /// Warns if `peer` is not trusted, and names a client behind it. Called for attempts while their limit is on.
    pub(super) fn look(
        &self,
        peer: Peer,
        headers: &HeaderMap,
        trusted: &[TrustedProxy],
        Micros(now): Micros,
    ) {
        if self.is_due(peer, headers, trusted, now) {
            warn!(
                %peer,
                key = "server.trusted_proxies",
                "An untrusted peer names the client that it speaks for: all its clients count as one address in the \
                 limit of attempts. If the peer is your proxy, add it to server.trusted_proxies."
            );
        }
    }

    fn is_due(&self, peer: Peer, headers: &HeaderMap, trusted: &[TrustedProxy], now: u64) -> bool {
        let is_named =
            headers.contains_key(X_FORWARDED_FOR) || headers.contains_key(header::FORWARDED);
        if !is_named || peer.is_trusted(trusted) {
            return false;
        }
        let next = self.next.load(Relaxed);
        now >= next && self.next.compare_exchange(next, now + EVERY, Relaxed, Relaxed).is_ok()
    }
}

const X_FORWARDED_FOR: &str = "x-forwarded-for";

/// Interval of the warning, in microseconds.
const EVERY: u64 = 60_000_000;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_untrusted_proxy_is_warned_of_once_a_minute() {
        let warning = ProxyWarning::default();
        let trusted = [TrustedProxy::Network("10.0.0.0/8".parse().unwrap())];
        let due = |peer: &str, name: &'static str, second: u64| {
            let headers = [(name.parse().unwrap(), "1.1.1.1".parse().unwrap())];
            let headers = headers.into_iter().collect();
            warning.is_due(Peer::of(peer.parse().unwrap()), &headers, &trusted, second * 1_000_000)
        };
        assert!(!due("192.0.2.1", "user-agent", 100));
        assert!(!due("10.0.0.1", "x-forwarded-for", 100));
        assert!(due("192.0.2.1", "x-forwarded-for", 100));
        assert!(!due("192.0.2.1", "forwarded", 159));
        assert!(due("192.0.2.2", "forwarded", 160));
    }
}
