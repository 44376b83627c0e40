//! Server's side of the opening handshake (RFC 6455, section 4.2); knows no sockets.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use http::header::{
    CONNECTION, HeaderName, SEC_WEBSOCKET_KEY, SEC_WEBSOCKET_PROTOCOL, SEC_WEBSOCKET_VERSION,
    UPGRADE,
};
use http::{HeaderMap, Method, Version};

/// Request that may be answered with `101`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Upgrade {
    /// Value of `Sec-WebSocket-Accept`.
    pub accept: String,
}

/// Reason why a request is no opening handshake.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// `426` with `Upgrade: websocket`.
    NotAnUpgrade,
    /// `426` with `Sec-WebSocket-Version: 13`.
    Version,
    /// `405` with `Allow: GET`.
    Method,
    /// `400`, with a sentence about the error.
    Malformed(&'static str),
}

/// Checks the opening handshake of a client.
///
/// # Errors
/// The refusal to answer with.
pub fn read_upgrade(
    method: &Method,
    version: Version,
    headers: &HeaderMap,
) -> Result<Upgrade, Refusal> {
    if method != Method::GET {
        return Err(Refusal::Method);
    }
    let asked =
        lists_token(headers, &CONNECTION, "upgrade") && lists_token(headers, &UPGRADE, "websocket");
    if version != Version::HTTP_11 || !asked {
        return Err(Refusal::NotAnUpgrade);
    }
    if only(headers, &SEC_WEBSOCKET_VERSION).is_none_or(|version| version != "13") {
        return Err(Refusal::Version);
    }
    let key = only(headers, &SEC_WEBSOCKET_KEY)
        .ok_or(Refusal::Malformed("Sec-WebSocket-Key must be given exactly once"))?;
    if !is_key(key) {
        return Err(Refusal::Malformed("Sec-WebSocket-Key must be 16 bytes in base64"));
    }
    Ok(Upgrade { accept: accept(key) })
}

/// Returns the subprotocols that a client offers, in its order of preference.
pub fn subprotocols(headers: &HeaderMap) -> impl Iterator<Item = &str> {
    tokens(headers, &SEC_WEBSOCKET_PROTOCOL)
}

/// Returns the `Sec-WebSocket-Accept` for a `Sec-WebSocket-Key`.
pub(crate) fn accept(key: &str) -> String {
    let mut sha1 = sha1_smol::Sha1::new();
    sha1.update(key.as_bytes());
    sha1.update(b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11");
    STANDARD.encode(sha1.digest().bytes())
}

/// Returns whether one of the comma-separated elements of any `name` header is `token`, in upper or lower case.
pub(crate) fn lists_token(headers: &HeaderMap, name: &HeaderName, token: &str) -> bool {
    tokens(headers, name).any(|found| found.eq_ignore_ascii_case(token))
}

/// Returns the value of a header that is given exactly once.
pub(crate) fn only<'h>(headers: &'h HeaderMap, name: &HeaderName) -> Option<&'h str> {
    let mut values = headers.get_all(name).iter();
    let value = values.next()?.to_str().ok()?.trim();
    values.next().is_none().then_some(value)
}

fn tokens<'h>(headers: &'h HeaderMap, name: &HeaderName) -> impl Iterator<Item = &'h str> {
    headers
        .get_all(name)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .map(str::trim)
        .filter(|token| !token.is_empty())
}

fn is_key(key: &str) -> bool {
    // 24 characters hold 18 bytes at most.
    let mut bytes = [0; 18];
    key.len() == 24 && matches!(STANDARD.decode_slice(key, &mut bytes), Ok(16))
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: &str = "dGhlIHNhbXBsZSBub25jZQ==";

    fn headers(list: &[(&'static str, &str)]) -> HeaderMap {
        list.iter()
            .map(|(name, value)| (HeaderName::from_static(name), value.parse().unwrap()))
            .fold(HeaderMap::new(), |mut map, (name, value)| {
                map.append(name, value);
                map
            })
    }

    fn read(list: &[(&'static str, &str)]) -> Result<Upgrade, Refusal> {
        read_upgrade(&Method::GET, Version::HTTP_11, &headers(list))
    }

    const GOOD: [(&str, &str); 4] = [
        ("connection", "keep-alive, Upgrade"),
        ("upgrade", "WebSocket"),
        ("sec-websocket-version", "13"),
        ("sec-websocket-key", KEY),
    ];

    /// Reads the valid request with the headers called `name` replaced by `values`.
    fn with(name: &'static str, values: &[&str]) -> Result<Upgrade, Refusal> {
        let mut list: Vec<_> = GOOD.into_iter().filter(|header| header.0 != name).collect();
        list.extend(values.iter().map(|value| (name, *value)));
        let list: Vec<(&'static str, &str)> = list;
        read(&list)
    }

    #[test]
    fn the_example_of_the_rfc() {
        let upgrade = read(&GOOD).unwrap();
        assert_eq!(upgrade.accept, "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=");
    }

    #[test]
    fn upgrade_may_be_asked_for_in_any_header_instance() {
        assert!(with("connection", &["keep-alive", "UPGRADE"]).is_ok());
        assert!(with("upgrade", &["h2c, websocket"]).is_ok());
        for name in ["connection", "upgrade"] {
            for values in [&[][..], &["close"], &["websockets upgrades"], &["\u{e4}"]] {
                assert_eq!(with(name, values), Err(Refusal::NotAnUpgrade), "{name} {values:?}");
            }
        }
    }

    #[test]
    fn another_version_is_told_ours() {
        for values in [&[][..], &["8"], &["013"], &["13", "13"], &["13, 8"], &[""]] {
            assert_eq!(with("sec-websocket-version", values), Err(Refusal::Version), "{values:?}");
        }
        assert!(with("sec-websocket-version", &[" 13 "]).is_ok());
    }

    #[test]
    fn a_key_is_sixteen_bytes_once() {
        let long = format!("{KEY}{KEY}");
        let cases: [&[&str]; 8] = [
            &[],
            &[KEY, KEY],
            &[""],
            &["dGhlIHNhbXBsZSBub25jZQ"],
            &["dGhlIHNhbXBsZSBub25jZXh4"],
            &["dGhlIHNhbXBsZSBub25jZR=="],
            &["dGhlIHNhbXBsZSBub25j*Q=="],
            &[&long],
        ];
        for values in cases {
            let result = with("sec-websocket-key", values);
            assert!(matches!(result, Err(Refusal::Malformed(_))), "{values:?}");
        }
    }

    #[test]
    fn method_and_version_of_http() {
        let all = headers(&GOOD);
        for method in [Method::POST, Method::HEAD, Method::CONNECT] {
            let result = read_upgrade(&method, Version::HTTP_11, &all);
            assert_eq!(result, Err(Refusal::Method));
        }
        for version in [Version::HTTP_10, Version::HTTP_2] {
            let result = read_upgrade(&Method::GET, version, &all);
            assert_eq!(result, Err(Refusal::NotAnUpgrade));
        }
    }

    #[test]
    fn subprotocols_of_all_instances_in_order() {
        let name = "sec-websocket-protocol";
        let map = headers(&[(name, " a ,b,, "), (name, "bearer.x=y"), (name, "\u{e4}")]);
        assert_eq!(subprotocols(&map).collect::<Vec<_>>(), ["a", "b", "bearer.x=y"]);
        assert_eq!(subprotocols(&HeaderMap::new()).count(), 0);
    }
}
