//! The one table of endings: every way in which wsproxy ends a connection after `101`.

/// Way in which a connection ends: the code and reason for the peer, and the label of the metric.
///
/// The codes are those of RFC 6455, section 7.4.1, and from 4000 on wsproxy's own. Clients tell entries with the same
/// code apart by the reason. `spec/finality.json` has all of them too, with what a client does then.
///
/// ```
/// use wsproxy_proto::disconnect::Disconnect;
///
/// assert_eq!((Disconnect::SLOW.code, Disconnect::SLOW.reason), (1008, "slow consumer"));
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Disconnect {
    /// Close code on the wire.
    pub code: u16,
    /// Reason on the wire: at most 123 bytes of UTF-8.
    pub reason: &'static str,
    /// Value of the metric label `reason`.
    pub label: &'static str,
}

macro_rules! table {
    ($($(#[$doc:meta])* $name:ident = $code:literal, $reason:literal, $label:literal;)*) => {
        impl Disconnect {
            $($(#[$doc])* pub const $name: Self =
                Self { code: $code, reason: $reason, label: $label };)*

            /// Every entry of the table, for documentation and tests.
            pub const ALL: &'static [Self] = &[$(Self::$name),*];
        }
    };
}

table! {
    /// The peer closed, and was answered with its own code.
    NORMAL = 1000, "", "normal";
    /// A frame or sequence of frames that RFC 6455 forbids.
    PROTOCOL = 1002, "protocol error", "protocol_error";
    /// Data of a kind that the endpoint does not take.
    UNSUPPORTED = 1003, "kind of data not accepted", "unsupported";
    /// A text message, or a close reason, that is not UTF-8.
    NOT_UTF8 = 1007, "not UTF-8", "not_utf8";
    /// Compressed data that does not inflate.
    BAD_DEFLATE = 1007, "compressed data is damaged", "bad_deflate";
    /// The client does not read as fast as messages for it arrive.
    SLOW = 1008, "slow consumer", "slow_consumer";
    /// The client sends more messages per second than the limit.
    RATE = 1008, "too many messages", "rate_limited";
    /// The client sent more invalid messages than the limit.
    STRIKES = 1008, "too many invalid messages", "strikes";
    /// A message above the size limit, before or after inflating.
    TOO_BIG = 1009, "message too big", "too_big";
    /// A message of more fragments than the limit.
    TOO_MANY_FRAGMENTS = 1009, "too many fragments", "too_many_fragments";
    /// A fault of the gateway.
    INTERNAL = 1011, "internal error", "internal";
    /// The instance is draining.
    RESTART = 1012, "instance restarting", "restart";
    /// The instance lost its bus, and is configured to send its clients away then.
    BUS_LOST = 1012, "bus lost", "bus_lost";
    /// The instance is short of a resource.
    TRY_LATER = 1013, "try again later", "try_later";
    /// A newer connection took the place of this one.
    REPLACED = 4001, "replaced", "replaced";
    /// Nothing arrived within the heartbeat timeout.
    HEARTBEAT = 4002, "heartbeat timeout", "heartbeat_timeout";
    /// No data message in either direction within the idle timeout.
    IDLE = 4003, "idle timeout", "idle_timeout";
    /// A worker ended the connection.
    BACKEND = 4004, "ended by the backend", "backend";
    /// The credential of the connection is no longer good; the client needs another one to come back.
    EXPIRED = 4401, "credential expired", "expired";
    /// The credential of the connection was revoked.
    REVOKED = 4401, "credential revoked", "revoked";
    /// The socket failed, or the peer left without a close frame; nothing is sent.
    GONE = 1006, "", "gone";
    /// The instance of the connection was killed. Another instance tells workers; the client is told nothing.
    SERVER_LOST = 1006, "", "server_lost";
}

impl Disconnect {
    /// The entry of the table that equals `self`, for a holder that needs a `'static` reference.
    #[must_use]
    pub fn entry(self) -> &'static Self {
        Self::ALL.iter().find(|entry| **entry == self).unwrap_or(&Self::INTERNAL)
    }
}

/// Whether a peer may send `code` in a close frame (RFC 6455, section 7.4).
#[must_use]
pub const fn is_sendable(code: u16) -> bool {
    matches!(code, 1000..=1003 | 1007..=1014 | 3000..=4999)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_unique_and_reasons_fit_a_close_frame() {
        let mut labels: Vec<_> = Disconnect::ALL.iter().map(|d| d.label).collect();
        labels.sort_unstable();
        labels.dedup();
        assert_eq!(labels.len(), Disconnect::ALL.len());
        assert!(Disconnect::ALL.iter().all(|d| d.reason.len() <= 123));
    }

    #[test]
    fn reserved_codes_are_not_sendable() {
        for code in [0, 999, 1004, 1005, 1006, 1015, 1016, 2999, 5000] {
            assert!(!is_sendable(code), "{code}");
        }
        for code in [1000, 1001, 1003, 1007, 1012, 1014, 3000, 4004, 4999] {
            assert!(is_sendable(code), "{code}");
        }
    }
}
