//! Which address a client has, behind any number of trusted proxies.

use std::net::IpAddr;

use http::{HeaderMap, header};
use ipnet::IpNet;

/// The address nearest to us that is not one of our own proxies.
///
/// `Forwarded` (RFC 7239) and `X-Forwarded-For` are read from the right, and only as long as the
/// hop that wrote them is trusted: what stands further left anybody could have written.
///
/// A proxy that writes one of the two hands the other on as the client sent it. So where both are
/// there and tell different stories, one is forged, and neither is believed.
#[must_use]
pub fn client(peer: IpAddr, headers: &HeaderMap, trusted: &[IpNet]) -> IpAddr {
    let is_trusted = |address: IpAddr| trusted.iter().any(|net| net.contains(&address));
    let nearest = peer.to_canonical();
    if !is_trusted(nearest) {
        return nearest;
    }
    let forwarded = values(headers, header::FORWARDED.as_str()).map(forwarded_for);
    let legacy = values(headers, "x-forwarded-for").map(parse);
    let stories = [forwarded.collect::<Vec<_>>(), legacy.collect()];
    let mut told = stories.iter().filter(|hops| !hops.is_empty());
    let first = told.next().map(|hops| walk(nearest, hops, is_trusted));
    let second = told.next().map(|hops| walk(nearest, hops, is_trusted));
    match (first, second) {
        (Some(one), Some(other)) if one != other => nearest,
        (Some(one), _) => one,
        (None, _) => nearest,
    }
}

/// The nearest address of a chain that is not trusted, or where it cannot be read on.
fn walk(
    mut nearest: IpAddr,
    hops: &[Option<IpAddr>],
    is_trusted: impl Fn(IpAddr) -> bool,
) -> IpAddr {
    for hop in hops.iter().rev() {
        // A hop that cannot be read ends the chain: whoever wrote it is the nearest known.
        let Some(address) = *hop else { break };
        nearest = address;
        if !is_trusted(address) {
            break;
        }
    }
    nearest
}

fn values<'a>(headers: &'a HeaderMap, name: &str) -> impl Iterator<Item = &'a str> {
    let lines = headers.get_all(name).iter().map(|value| value.to_str().unwrap_or_default());
    lines.flat_map(|line| line.split(','))
}

fn forwarded_for(element: &str) -> Option<IpAddr> {
    element.split(';').find_map(|pair| {
        let (name, value) = pair.trim().split_once('=')?;
        name.eq_ignore_ascii_case("for").then(|| parse(value.trim_matches('"')))?
    })
}

fn parse(text: &str) -> Option<IpAddr> {
    let text = text.trim();
    let bare = match text.strip_prefix('[') {
        Some(v6) => v6.split(']').next()?,
        None if text.matches(':').count() == 1 => text.split(':').next()?,
        None => text,
    };
    bare.parse::<IpAddr>().ok().map(|address| address.to_canonical())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(peer: &str, name: &'static str, value: &str) -> String {
        let mut headers = HeaderMap::new();
        headers.insert(name, value.parse().unwrap());
        let trusted = ["10.0.0.0/8".parse().unwrap(), "::1/128".parse().unwrap()];
        client(peer.parse().unwrap(), &headers, &trusted).to_string()
    }

    #[test]
    fn only_trusted_proxies_are_believed() {
        let xff = "x-forwarded-for";
        assert_eq!(seen("192.0.2.1", xff, "1.1.1.1"), "192.0.2.1");
        assert_eq!(seen("10.0.0.1", xff, "1.1.1.1"), "1.1.1.1");
        assert_eq!(seen("10.0.0.1", xff, "6.6.6.6, 1.1.1.1, 10.0.0.2"), "1.1.1.1");
        assert_eq!(seen("10.0.0.1", xff, "1.1.1.1:5000"), "1.1.1.1");
        assert_eq!(seen("10.0.0.1", xff, "1.1.1.1, garbage"), "10.0.0.1");
        assert_eq!(seen("::ffff:10.0.0.1", xff, "2001:db8::1"), "2001:db8::1");
    }

    #[test]
    fn of_two_stories_that_differ_neither_is_believed() {
        let seen = |forwarded: &'static str, legacy: &'static str| {
            let mut headers = HeaderMap::new();
            headers.insert(header::FORWARDED, forwarded.parse().unwrap());
            headers.insert("x-forwarded-for", legacy.parse().unwrap());
            let trusted = ["10.0.0.0/8".parse().unwrap()];
            client("10.0.0.1".parse().unwrap(), &headers, &trusted).to_string()
        };
        assert_eq!(seen("for=1.1.1.1", "6.6.6.6, 1.1.1.1"), "1.1.1.1");
        // Whichever of them the proxy wrote, the client wrote the other.
        assert_eq!(seen("for=6.6.6.6", "1.1.1.1"), "10.0.0.1");
        assert_eq!(seen("garbage", "1.1.1.1"), "10.0.0.1");
    }

    #[test]
    fn forwarded_is_read_as_rfc_7239_writes_it() {
        let value = r#"for=6.6.6.6, for="[2001:db8::1]:4711";proto=https"#;
        assert_eq!(seen("10.0.0.1", "forwarded", value), "2001:db8::1");
        assert_eq!(seen("::1", "forwarded", "proto=http; For=1.1.1.1"), "1.1.1.1");
        assert_eq!(seen("10.0.0.1", "forwarded", "for=unknown"), "10.0.0.1");
    }
}
