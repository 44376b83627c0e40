//! The address of a client behind any number of trusted proxies.

use std::net::IpAddr;

use http::{HeaderMap, header};

use crate::config::{
    ForwardedHeader,
    host::Authority,
    peer::{Peer, TrustedProxy},
};

/// Extension of a request: the other end of its socket.
#[derive(Debug, Clone, Copy)]
pub struct RemotePeer(pub Peer);

/// Returns the nearest address that is not a trusted proxy.
///
/// `Forwarded` (RFC 7239) and `X-Forwarded-For` are read from right to left, over all their lines.
/// Reading stops at the first hop that is not trusted: a client may have written everything further
/// left.
///
/// A proxy writes one of the two headers and passes the other on as the client sent it. If the
/// operator names the header that the proxy writes, the other is ignored. Otherwise, if the two name
/// different clients, one is forged and both are ignored.
#[must_use]
pub fn client(
    peer: Peer,
    headers: &HeaderMap,
    trusted: &[TrustedProxy],
    written: ForwardedHeader,
) -> IpAddr {
    let nearest = peer.address();
    if !peer.is_trusted(trusted) {
        return nearest;
    }
    let is_trusted = |address: IpAddr| Peer::of(address).is_trusted(trusted);
    let named = |name: &str, parse: fn(&str) -> Hop| {
        let hops = hops(headers, name, parse);
        (!hops.is_empty()).then(|| walk(nearest, &hops, is_trusted))
    };
    let forwarded = || named(header::FORWARDED.as_str(), forwarded_for);
    let legacy = || named(X_FORWARDED_FOR, parse);
    let client = match written {
        ForwardedHeader::Forwarded => forwarded(),
        ForwardedHeader::XForwardedFor => legacy(),
        ForwardedHeader::Auto => match (forwarded(), legacy()) {
            (Some(one), Some(other)) => (one == other).then_some(one),
            (one, other) => one.or(other),
        },
    };
    client.unwrap_or(nearest)
}

/// The address of a hop; `None` if it is hidden or malformed.
type Hop = Option<IpAddr>;

/// Returns the nearest address of a chain that is not trusted, or the last one before a malformed hop.
fn walk(mut nearest: IpAddr, hops: &[Hop], is_trusted: impl Fn(IpAddr) -> bool) -> IpAddr {
    for hop in hops.iter().rev() {
        // Behind a malformed hop nothing is known: the proxy that wrote it is the nearest address.
        let Some(address) = *hop else { break };
        nearest = address;
        if !is_trusted(address) {
            break;
        }
    }
    nearest
}

/// Returns the elements of all lines of a header. The nearest proxy wrote the last one.
fn hops(headers: &HeaderMap, name: &str, parse: fn(&str) -> Hop) -> Vec<Hop> {
    let mut hops = Vec::new();
    for line in headers.get_all(name) {
        // A line that cannot be split still counts as one unknown hop.
        let elements = line.to_str().ok().and_then(|line| split(line, ','));
        match elements {
            None => hops.push(None),
            // Empty elements do not count: RFC 9110, 5.6.1.2.
            Some(elements) => hops.extend(
                elements.into_iter().filter(|element| !element.trim().is_empty()).map(parse),
            ),
        }
    }
    hops
}

/// Splits at separators outside quotes: a client may have chosen the text inside. `None` if a quote is not closed.
fn split(text: &str, separator: char) -> Option<Vec<&str>> {
    let (mut parts, mut start, mut quoted, mut escaped) = (Vec::new(), 0, false, false);
    for (at, c) in text.char_indices() {
        match c {
            _ if escaped => escaped = false,
            '\\' if quoted => escaped = true,
            '"' => quoted = !quoted,
            c if c == separator && !quoted => {
                parts.push(&text[start..at]);
                start = at + 1;
            }
            _ => {}
        }
    }
    parts.push(&text[start..]);
    (!quoted).then_some(parts)
}

/// Parses the `for` parameter of an element of `Forwarded`.
fn forwarded_for(element: &str) -> Hop {
    let mut found = None;
    for pair in split(element, ';')? {
        let (name, value) = pair.trim().split_once('=')?;
        if name.eq_ignore_ascii_case("for") && found.replace(value).is_some() {
            return None;
        }
    }
    let node = found?;
    let bare = node.strip_prefix('"').and_then(|node| node.strip_suffix('"'));
    parse(bare.unwrap_or(node))
}

/// Parses an address with or without a port. An IPv6 address may be in brackets.
fn parse(text: &str) -> Hop {
    let text = text.trim();
    let address = match Authority::parse(text) {
        Some(place) => place.address(),
        None => text.parse().ok(),
    };
    address.map(|address| address.to_canonical())
}

const X_FORWARDED_FOR: &str = "x-forwarded-for";

#[cfg(test)]
mod tests {
    use super::*;

    fn client_of(lines: &[(&'static str, &str)], written: ForwardedHeader) -> String {
        let mut headers = HeaderMap::new();
        for (name, value) in lines {
            headers.append(*name, value.parse().unwrap());
        }
        client(Peer::of("10.0.0.1".parse().unwrap()), &headers, &trusted(), written).to_string()
    }

    fn trusted() -> [TrustedProxy; 2] {
        ["10.0.0.0/8", "::1/128"].map(|text| TrustedProxy::Network(text.parse().unwrap()))
    }

    fn seen(peer: &str, name: &'static str, value: &str) -> String {
        let mut headers = HeaderMap::new();
        headers.insert(name, value.parse().unwrap());
        let peer = Peer::of(peer.parse().unwrap());
        client(peer, &headers, &trusted(), ForwardedHeader::Auto).to_string()
    }

    #[test]
    fn a_unix_peer_is_believed_only_where_trusted() {
        let mut headers = HeaderMap::new();
        headers.insert("x-forwarded-for", "192.0.2.1".parse().unwrap());
        let seen = |trusted: &[TrustedProxy]| {
            client(Peer::Unix, &headers, trusted, ForwardedHeader::Auto).to_string()
        };
        assert_eq!(seen(&[TrustedProxy::Unix]), "192.0.2.1");
        let loopback = TrustedProxy::Network("127.0.0.0/8".parse().unwrap());
        assert_eq!(seen(&[loopback]), "127.0.0.1");
        let none = HeaderMap::new();
        let address = client(Peer::Unix, &none, &[TrustedProxy::Unix], ForwardedHeader::Auto);
        assert_eq!(address.to_string(), "127.0.0.1");
    }

    #[test]
    fn only_trusted_proxies_are_believed() {
        let xff = "x-forwarded-for";
        assert_eq!(seen("192.0.2.1", xff, "1.1.1.1"), "192.0.2.1");
        assert_eq!(seen("192.0.2.1", "forwarded", "for=1.1.1.1"), "192.0.2.1");
        assert_eq!(seen("10.0.0.1", xff, "1.1.1.1"), "1.1.1.1");
        assert_eq!(seen("10.0.0.1", xff, "6.6.6.6, 1.1.1.1, 10.0.0.2"), "1.1.1.1");
        assert_eq!(seen("10.0.0.1", xff, "1.1.1.1:5000"), "1.1.1.1");
        assert_eq!(seen("10.0.0.1", xff, "1.1.1.1,, "), "1.1.1.1");
        assert_eq!(seen("10.0.0.1", xff, "[2001:db8::1]:5000"), "2001:db8::1");
        assert_eq!(seen("10.0.0.1", xff, "1.1.1.1, garbage"), "10.0.0.1");
        assert_eq!(seen("::ffff:10.0.0.1", xff, "2001:db8::1"), "2001:db8::1");
        assert_eq!(seen("10.0.0.1", xff, "::ffff:1.1.1.1"), "1.1.1.1");
    }

    #[test]
    fn of_two_stories_that_differ_neither_is_believed() {
        let seen = |forwarded, legacy| {
            let lines = [("forwarded", forwarded), ("x-forwarded-for", legacy)];
            client_of(&lines, ForwardedHeader::Auto)
        };
        assert_eq!(seen("for=1.1.1.1", "6.6.6.6, 1.1.1.1"), "1.1.1.1");
        // The proxy wrote one of the two headers, and the client the other.
        assert_eq!(seen("for=6.6.6.6", "1.1.1.1"), "10.0.0.1");
        assert_eq!(seen("garbage", "1.1.1.1"), "10.0.0.1");
    }

    #[test]
    fn the_header_that_the_proxy_writes_is_the_only_one_read() {
        let both = [("forwarded", "for=6.6.6.6"), ("x-forwarded-for", "1.1.1.1")];
        assert_eq!(client_of(&both, ForwardedHeader::XForwardedFor), "1.1.1.1");
        assert_eq!(client_of(&both, ForwardedHeader::Forwarded), "6.6.6.6");
        assert_eq!(client_of(&both[..1], ForwardedHeader::XForwardedFor), "10.0.0.1");
        assert_eq!(client_of(&both[1..], ForwardedHeader::Forwarded), "10.0.0.1");
    }

    #[test]
    fn several_lines_are_one_list() {
        for name in ["x-forwarded-for", "forwarded"] {
            let of = |address: &str| match name {
                "forwarded" => format!("for={address}"),
                _ => address.to_owned(),
            };
            let seen = |lines: &[&str]| {
                let lines: Vec<_> = lines.iter().map(|line| of(line)).collect();
                let lines: Vec<_> = lines.iter().map(|line| (name, line.as_str())).collect();
                client_of(&lines, ForwardedHeader::Auto)
            };
            assert_eq!(seen(&["6.6.6.6", "1.1.1.1"]), "1.1.1.1");
            assert_eq!(seen(&["6.6.6.6", "1.1.1.1", "10.0.0.2"]), "1.1.1.1");
            assert_eq!(seen(&["6.6.6.6", "garbage", "10.0.0.2"]), "10.0.0.2");
        }
    }

    #[test]
    fn forwarded_is_read_as_rfc_7239_writes_it() {
        let value = r#"for=6.6.6.6, for="[2001:db8::1]:4711";proto=https"#;
        assert_eq!(seen("10.0.0.1", "forwarded", value), "2001:db8::1");
        assert_eq!(seen("::1", "forwarded", "proto=http; For=1.1.1.1"), "1.1.1.1");
        assert_eq!(seen("::1", "forwarded", "for=\"1.1.1.1:80\";by=10.0.0.1"), "1.1.1.1");
        assert_eq!(seen("10.0.0.1", "forwarded", "for=unknown"), "10.0.0.1");
        assert_eq!(seen("10.0.0.1", "forwarded", "for=_hidden, by=10.0.0.1"), "10.0.0.1");
        assert_eq!(seen("10.0.0.1", "forwarded", "for=1.1.1.1;for=2.2.2.2"), "10.0.0.1");
    }

    /// A proxy may repeat a client's text in quotes.
    #[test]
    fn a_quoted_value_is_no_further_element() {
        let value = r#"for=1.1.1.1;host="x, for=6.6.6.6""#;
        assert_eq!(seen("10.0.0.1", "forwarded", value), "1.1.1.1");
        let value = r#"for=1.1.1.1;host="x\", for=6.6.6.6""#;
        assert_eq!(seen("10.0.0.1", "forwarded", value), "1.1.1.1");
        let value = r#"host="x;for=6.6.6.6";for=1.1.1.1"#;
        assert_eq!(seen("10.0.0.1", "forwarded", value), "1.1.1.1");
        // A quote that the client left open.
        assert_eq!(seen("10.0.0.1", "forwarded", r#"for=", for=1.1.1.1"#), "10.0.0.1");
    }
}
