//! Codes of RESET and GOAWAY; knows no status of HTTP.

/// Reason why a stream or a lane ends (§7). Other numbers count as [`Self::UpstreamReset`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u16)]
pub enum Code {
    /// No failure; of RESET with STOP.
    None = 0,
    /// The client left, or a deadline passed.
    Cancelled = 1,
    /// The lane takes no further stream.
    Refused = 2,
    /// The agent could not connect to its upstream.
    UpstreamConnect = 3,
    /// TLS to the upstream failed.
    UpstreamTls = 4,
    /// The upstream closed its connection in the middle.
    UpstreamReset = 5,
    /// The upstream sent no head in time.
    UpstreamTimeout = 6,
    /// The upstream's answer is no HTTP.
    UpstreamProtocol = 7,
    /// A head is larger than its receiver takes.
    HeadTooLarge = 8,
    /// The reader of the stream took nothing for too long, and its place was needed.
    SlowReader = 9,
    /// Reserved.
    Reserved = 10,
    /// The agent does not serve this path.
    BadPath = 11,
    /// The process restarts, or the lane has no stream numbers left.
    Restarting = 12,
    /// A newer lane of the same agent took this lane's place.
    Superseded = 13,
    /// More data came than there was credit for.
    FlowControl = 14,
    /// A rule of the protocol was broken.
    Protocol = 15,
    /// The process has no memory for a further stream.
    Overloaded = 16,
}

impl Code {
    /// All codes, by their numbers.
    pub const ALL: [Self; 17] = [
        Self::None,
        Self::Cancelled,
        Self::Refused,
        Self::UpstreamConnect,
        Self::UpstreamTls,
        Self::UpstreamReset,
        Self::UpstreamTimeout,
        Self::UpstreamProtocol,
        Self::HeadTooLarge,
        Self::SlowReader,
        Self::Reserved,
        Self::BadPath,
        Self::Restarting,
        Self::Superseded,
        Self::FlowControl,
        Self::Protocol,
        Self::Overloaded,
    ];

    /// Returns the number on the wire.
    #[must_use]
    pub const fn number(self) -> u16 {
        self as u16
    }

    /// Returns the code with this number.
    #[must_use]
    pub fn from_number(number: u16) -> Self {
        Self::ALL.get(usize::from(number)).copied().unwrap_or(Self::UpstreamReset)
    }

    /// Returns the word for logs, metrics and close reasons.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Cancelled => "cancelled",
            Self::Refused => "refused",
            Self::UpstreamConnect => "upstream_connect",
            Self::UpstreamTls => "upstream_tls",
            Self::UpstreamReset => "upstream_reset",
            Self::UpstreamTimeout => "upstream_timeout",
            Self::UpstreamProtocol => "upstream_protocol",
            Self::HeadTooLarge => "head_too_large",
            Self::SlowReader => "slow_reader",
            Self::Reserved => "reserved",
            Self::BadPath => "bad_path",
            Self::Restarting => "restarting",
            Self::Superseded => "superseded",
            Self::FlowControl => "flow_control",
            Self::Protocol => "protocol",
            Self::Overloaded => "overloaded",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_their_numbers_and_unknown_ones_upstream_reset() {
        for (number, code) in (0..).zip(Code::ALL) {
            assert_eq!((code.number(), Code::from_number(number)), (number, code));
        }
        assert_eq!(Code::from_number(17), Code::UpstreamReset);
        assert_eq!(Code::from_number(u16::MAX), Code::UpstreamReset);
    }
}
