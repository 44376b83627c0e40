//! Hosts and ports as headers and settings write them, parsed; knows no headers and no settings.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// `host[:port]`, as in a `Host` header: RFC 3986, 3.2.2, without user, escapes and punctuation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Authority<'a> {
    /// The name or address, an IPv6 address in its brackets.
    pub host: &'a str,
    /// The digits after the colon; `None` without a colon.
    pub port: Option<&'a str>,
}

impl<'a> Authority<'a> {
    /// Reads a host and port; `None` if `text` is none.
    #[must_use]
    pub fn parse(text: &'a str) -> Option<Self> {
        let end = match text.strip_prefix('[') {
            Some(rest) => rest.find(']')? + 2,
            None => text.find(':').unwrap_or(text.len()),
        };
        let (host, rest) = text.split_at(end);
        let is_host = match host.strip_prefix('[').and_then(|host| host.strip_suffix(']')) {
            Some(address) => address.parse::<Ipv6Addr>().is_ok(),
            None => !host.is_empty() && host.bytes().all(is_of_a_name),
        };
        let port = if rest.is_empty() { None } else { Some(rest.strip_prefix(':')?) };
        let is_port = port.is_none_or(|port| {
            let digits = port.bytes().all(|byte| byte.is_ascii_digit());
            digits && (port.is_empty() || port.parse::<u16>().is_ok())
        });
        (is_host && is_port).then_some(Self { host, port })
    }

    /// Returns the host if it is an address.
    #[must_use]
    pub fn address(&self) -> Option<IpAddr> {
        match self.host.strip_prefix('[').and_then(|host| host.strip_suffix(']')) {
            Some(address) => address.parse::<Ipv6Addr>().ok().map(IpAddr::V6),
            None => self.host.parse::<Ipv4Addr>().ok().map(IpAddr::V4),
        }
    }

    /// Returns whether the host is an address, or a name without an empty label (hence without a dot at either end).
    #[must_use]
    pub fn is_complete(&self) -> bool {
        let is_label = |label: &str| !label.is_empty() && !label.contains('~');
        self.host.starts_with('[') || self.host.split('.').all(is_label)
    }
}

const fn is_of_a_name(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_' | b'~')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_and_ports_are_told_apart() {
        for (text, host, port) in [
            ("example.org", "example.org", None),
            ("example.org:80", "example.org", Some("80")),
            ("example.org:", "example.org", Some("")),
            ("my_host", "my_host", None),
            ("127.0.0.1:1", "127.0.0.1", Some("1")),
            ("[::1]", "[::1]", None),
            ("[::1]:8080", "[::1]", Some("8080")),
        ] {
            assert_eq!(Authority::parse(text), Some(Authority { host, port }), "{text}");
        }
    }

    #[test]
    fn text_that_is_no_host_is_refused() {
        for bad in [
            "", ":80", "a b", "a/b", "u@a", "a:b", "a:65536", "a:+1", "a:1:2", "::1", "[::1",
            "[a]", "[::1]x", "a\\b", "a,b", "a?b", "a#b", "a%20b", "ä", "a\tb", "[]", "[::1]:x",
        ] {
            assert_eq!(Authority::parse(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn addresses_are_known_as_such() {
        let of = |text| Authority::parse(text).and_then(|authority| authority.address());
        assert_eq!(of("127.0.0.1:80"), Some(Ipv4Addr::LOCALHOST.into()));
        assert_eq!(of("[::1]"), Some(Ipv6Addr::LOCALHOST.into()));
        assert_eq!((of("localhost"), of("127.1"), of("0x7f.1")), (None, None, None));
    }
}
