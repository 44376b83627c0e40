//! Trailers: which fields may stand behind a body (RFC 9110, 6.5.1). Knows no body.

use http::{HeaderMap, HeaderName, HeaderValue, header};
use wsproxy_proto::tunnel::headers::{HeaderBlock, Headers};

use crate::endpoint::tunnel::headers::{Kind, canonical};

/// Returns whether a client takes trailers. Those of its request pass only then, too.
#[must_use]
pub fn are_accepted(headers: &HeaderMap) -> bool {
    headers.get_all(header::TE).iter().any(|value| {
        let mut codings = value.as_bytes().split(|byte| *byte == b',');
        codings.any(|coding| {
            let name = coding.split(|byte| *byte == b';').next().unwrap_or_default();
            name.trim_ascii().eq_ignore_ascii_case(b"trailers")
        })
    })
}

/// Returns the value of `Trailer` with the fields that pass; `None` if there is none. The library for HTTP sends only
/// trailers that `Trailer` announces.
#[must_use]
pub fn announced(headers: &HeaderMap) -> Option<Vec<u8>> {
    let values = headers.get_all(header::TRAILER).iter().map(HeaderValue::as_bytes);
    let names = values.flat_map(|value| value.split(|byte| *byte == b',')).map(<[u8]>::trim_ascii);
    let names = names.filter_map(|name| HeaderName::from_bytes(name).ok());
    let names: Vec<_> = names.filter(|name| passes(name.as_str())).collect();
    let names: Vec<_> = names.iter().map(|name| name.as_str().as_bytes()).collect();
    (!names.is_empty()).then(|| names.join(&b", "[..]))
}

/// Returns the trailers of a request that pass. Those that do not fit into a block are left out.
#[must_use]
pub fn of_request(trailers: &HeaderMap) -> HeaderBlock {
    let mut block = HeaderBlock::new();
    for (name, value) in trailers.iter().filter(|(name, _)| passes(name.as_str())) {
        // Nothing behind a body can be refused any more.
        let _ = block.push(name.as_str().as_bytes(), value.as_bytes());
    }
    block
}

/// Returns the trailers of an answer that pass.
#[must_use]
pub fn of_answer(trailers: Headers<'_>) -> HeaderMap {
    let mut map = HeaderMap::new();
    for (name, value) in trailers.iter() {
        let (name, value) = (HeaderName::from_bytes(name), HeaderValue::from_bytes(value));
        if let (Ok(name), Ok(value)) = (name, value)
            && passes(name.as_str())
        {
            let _ = map.try_append(name, value);
        }
    }
    map
}

/// Returns whether a field may stand in a trailer: none that frames or routes a message, proves an identity, or changes
/// how the message is read.
fn passes(name: &str) -> bool {
    let canonical = canonical(name);
    Kind::of(name) == Kind::Other
        && !canonical.starts_with("content-")
        && !canonical.starts_with("if-")
        && !REFUSED.contains(&&*canonical)
}

/// Fields of heads alone.
const REFUSED: [&str; 26] = [
    "accept",
    "accept-encoding",
    "age",
    "allow",
    "cache-control",
    "clear-site-data",
    "date",
    "expires",
    "location",
    "max-forwards",
    "origin",
    "pragma",
    "range",
    "referer",
    "refresh",
    "retry-after",
    "sec-websocket-accept",
    "sec-websocket-key",
    "sec-websocket-protocol",
    "set-cookie",
    "strict-transport-security",
    "user-agent",
    "vary",
    "www-authenticate",
    "alt-svc",
    "service-worker-allowed",
];

#[cfg(test)]
mod tests {
    use super::*;

    fn map(lines: &[(&'static str, &str)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in lines {
            headers.append(*name, value.parse().unwrap());
        }
        headers
    }

    #[test]
    fn trailers_are_accepted_where_te_says_so() {
        for te in ["trailers", "Trailers", "gzip;q=0.5, trailers", "deflate,trailers;q=1"] {
            assert!(are_accepted(&map(&[("te", te)])), "{te}");
        }
        for te in ["", "gzip", "trailersx", "x-trailers", "gzip;trailers"] {
            assert!(!are_accepted(&map(&[("te", te)])), "{te}");
        }
        assert!(are_accepted(&map(&[("te", "gzip"), ("te", "trailers")])));
        assert!(!are_accepted(&map(&[])));
    }

    #[test]
    fn only_names_that_pass_are_announced() {
        let headers = map(&[
            ("trailer", "grpc-status, Content-Length,,X-Checksum"),
            ("trailer", "authorization, a b, x-wsproxy-a"),
        ]);
        assert_eq!(announced(&headers).unwrap(), b"grpc-status, x-checksum");
        assert_eq!(announced(&map(&[("trailer", "host")])), None);
        assert_eq!(announced(&map(&[])), None);
    }

    #[test]
    fn fields_that_change_a_message_do_not_pass_behind_its_body() {
        let lines = [
            ("grpc-status", "0"),
            ("x-checksum", "1"),
            ("x-checksum", "2"),
            ("content-length", "5"),
            ("transfer-encoding", "chunked"),
            ("host", "a"),
            ("authorization", "a"),
            ("cookie", "a"),
            ("set-cookie", "a=b"),
            ("x-forwarded-for", "1.1.1.1"),
            ("impersonate-user", "root"),
            ("x_remote_user", "root"),
            ("x_wsproxy_source", "a"),
            ("location", "/"),
            ("content-encoding", "gzip"),
            ("if_match", "a"),
            ("connection", "close"),
            ("via", "1.1 a"),
        ];
        let block = of_request(&map(&lines));
        let expected: [(&[u8], &[u8]); 3] =
            [(b"grpc-status", b"0"), (b"x-checksum", b"1"), (b"x-checksum", b"2")];
        assert_eq!(block.headers().iter().collect::<Vec<_>>(), expected);
        let mut all = HeaderBlock::new();
        lines.iter().for_each(|(name, value)| {
            all.push(name.as_bytes(), value.as_bytes()).unwrap();
        });
        let passed = of_answer(all.headers());
        assert_eq!(passed, map(&lines[..3]));
    }

    #[test]
    fn a_bomb_of_trailers_is_cut() {
        let mut large = HeaderMap::new();
        let value = HeaderValue::from_bytes(&[b'v'; 60_000]).unwrap();
        ["x-a", "x-b", "x-c"].into_iter().for_each(|name| {
            large.insert(name, value.clone());
        });
        assert!(of_request(&large).headers().as_bytes().len() < 65_536);
    }
}
