//! The one table of endings: every way in which wsproxy ends a connection after `101`.

/// Why a connection is ended: what the peer is told, and under which label it is counted.
///
/// The codes are those of RFC 6455 section 7.4.1 and, above 4000, of the contract's section 9.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Disconnect {
    /// Close code on the wire.
    pub code: u16,
    /// Reason on the wire: at most 123 bytes of UTF-8.
    pub reason: &'static str,
    /// Value of the metric label `reason`.
    pub label: &'static str,
    /// Whether an honest client should come back on its own.
    pub reconnect: bool,
}

macro_rules! table {
    ($($(#[$doc:meta])* $name:ident = $code:literal, $reason:literal, $label:literal, $reconnect:literal;)*) => {
        impl Disconnect {
            $($(#[$doc])* pub const $name: Self =
                Self { code: $code, reason: $reason, label: $label, reconnect: $reconnect };)*

            /// Every entry of the table, for documentation and tests.
            pub const ALL: &'static [Self] = &[$(Self::$name),*];
        }
    };
}

table! {
    /// The peer closed, and was answered with its own code.
    NORMAL = 1000, "", "normal", false;
    /// A frame or sequence of frames that RFC 6455 forbids.
    PROTOCOL = 1002, "protocol error", "protocol_error", false;
    /// Data of a kind which the endpoint does not take.
    UNSUPPORTED = 1003, "kind of data not accepted", "unsupported", false;
    /// A text message, or a close reason, that is not UTF-8.
    NOT_UTF8 = 1007, "not UTF-8", "not_utf8", false;
    /// Compressed data that does not inflate.
    BAD_DEFLATE = 1007, "compressed data is damaged", "bad_deflate", false;
    /// The peer does not read as fast as messages for it arrive.
    SLOW = 1008, "slow consumer", "slow_consumer", true;
    /// The peer sends more messages per second than the limit.
    RATE = 1008, "too many messages", "rate_limited", true;
    /// The peer sent more invalid messages than the limit.
    STRIKES = 1008, "too many invalid messages", "strikes", false;
    /// A message above the size limit, before or after inflating.
    TOO_BIG = 1009, "message too big", "too_big", false;
    /// A message of more fragments than the limit.
    TOO_MANY_FRAGMENTS = 1009, "too many fragments", "too_many_fragments", false;
    /// A fault of the gateway's own.
    INTERNAL = 1011, "internal error", "internal", true;
    /// The instance is draining.
    RESTART = 1012, "instance restarting", "restart", true;
    /// The bus was lost and the endpoint is configured to send its clients away.
    BUS_LOST = 1012, "bus lost", "bus_lost", true;
    /// The instance is short of a resource.
    TRY_LATER = 1013, "try again later", "try_later", true;
    /// Nothing arrived within the heartbeat timeout.
    HEARTBEAT = 4002, "heartbeat timeout", "heartbeat_timeout", true;
    /// No data message in either direction within the idle timeout.
    IDLE = 4003, "idle timeout", "idle_timeout", false;
    /// A worker ended it.
    BACKEND = 4004, "ended by the backend", "backend", false;
    /// The credential with which it was opened is no longer good; another one is needed to come back.
    EXPIRED = 4401, "credential expired", "expired", false;
    /// The credential with which it was opened was revoked.
    REVOKED = 4401, "credential revoked", "revoked", false;
    /// The socket failed, or the peer left without a close frame; nothing is sent.
    GONE = 1006, "", "gone", true;
    /// The instance of the connection was killed; another one says so to workers, nobody to the client.
    SERVER_LOST = 1006, "", "server_lost", true;
}

impl Disconnect {
    /// This entry as it stands in the table, for whoever keeps it as long as a connection.
    #[must_use]
    pub fn entry(self) -> &'static Self {
        Self::ALL.iter().find(|entry| **entry == self).unwrap_or(&Self::INTERNAL)
    }
}

/// Whether a peer may send `code` in a close frame (RFC 6455 section 7.4).
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
