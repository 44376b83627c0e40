//! Upgrades: which requests ask for one, and which answers grant it. Knows no protocol behind an upgrade.

use http::{HeaderMap, HeaderValue, Version, header};

use crate::endpoint::tunnel::{
    headers::connection::Options,
    refusal::{Code, Refusal},
};

/// Returns the protocols that a request wants to upgrade to; `None` for an ordinary request.
///
/// # Errors
/// `bad_upgrade`: a protocol that speaks HTTP, which would carry further requests past the gateway's rules; a list that
/// is malformed; a body, of which the upstream could not tell where it ends.
pub fn asked(version: Version, headers: &HeaderMap) -> Result<Option<HeaderValue>, Refusal> {
    let names_upgrade = Options::of_request(headers).is_ok_and(|all| all.contains("upgrade"));
    if version != Version::HTTP_11 || !names_upgrade || !headers.contains_key(header::UPGRADE) {
        return Ok(None);
    }
    let values = headers.get_all(header::UPGRADE).iter().map(HeaderValue::as_bytes);
    let joined = values.collect::<Vec<_>>().join(&b", "[..]);
    let mut protocols = protocols(&joined).peekable();
    if protocols.peek().is_none() {
        return Err(refused("The Upgrade header is empty."));
    }
    for protocol in protocols {
        let (name, version) = name(protocol);
        if !is_token(name) || !version.is_none_or(is_token) {
            return Err(refused("The Upgrade header is malformed."));
        }
        if is_http(name) {
            return Err(refused("An upgrade to another version of HTTP is not allowed."));
        }
    }
    let length = headers.get(header::CONTENT_LENGTH);
    let is_empty = length.is_none_or(|length| length.as_bytes().iter().all(|byte| *byte == b'0'));
    if !is_empty || headers.contains_key(header::TRANSFER_ENCODING) {
        return Err(refused("A request for an upgrade cannot have a body."));
    }
    HeaderValue::from_bytes(&joined)
        .map(Some)
        .map_err(|_| refused("The Upgrade header is invalid."))
}

/// Returns whether an answer switches to a protocol that the request named.
pub(super) fn is_granted(granted: &[u8], asked: &HeaderValue) -> bool {
    let mut granted = protocols(granted);
    let (Some(one), None) = (granted.next(), granted.next()) else { return false };
    !is_http(name(one).0)
        && protocols(asked.as_bytes()).any(|asked| name(asked).0.eq_ignore_ascii_case(name(one).0))
}

fn protocols(list: &[u8]) -> impl Iterator<Item = &[u8]> {
    let parts = list.split(|byte| *byte == b',').map(<[u8]>::trim_ascii);
    parts.filter(|part| !part.is_empty())
}

/// Splits a protocol into its name and its version.
fn name(protocol: &[u8]) -> (&[u8], Option<&[u8]>) {
    match protocol.iter().position(|byte| *byte == b'/') {
        Some(slash) => (&protocol[..slash], Some(&protocol[slash + 1..])),
        None => (protocol, None),
    }
}

fn is_token(text: &[u8]) -> bool {
    let is_mark = |byte: &u8| b"!#$%&'*+-.^_`|~".contains(byte);
    !text.is_empty() && text.iter().all(|byte| byte.is_ascii_alphanumeric() || is_mark(byte))
}

fn is_http(name: &[u8]) -> bool {
    OF_HTTP.iter().any(|of_http| name.eq_ignore_ascii_case(of_http))
}

fn refused(message: &'static str) -> Refusal {
    Refusal::because(Code::BadUpgrade, message)
}

/// Protocols behind which HTTP goes on. `TLS` is that of RFC 2817.
const OF_HTTP: [&[u8]; 5] = [b"h2c", b"h2", b"h3", b"http", b"tls"];

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(lines: &[(&'static str, &str)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in lines {
            headers.append(*name, HeaderValue::from_bytes(value.as_bytes()).unwrap());
        }
        headers
    }

    fn read(lines: &[(&'static str, &str)]) -> Result<Option<String>, Code> {
        let asked = asked(Version::HTTP_11, &headers(lines));
        let text = |value: HeaderValue| value.to_str().unwrap().to_owned();
        asked.map(|value| value.map(text)).map_err(|refusal| refusal.code)
    }

    #[test]
    fn any_protocol_but_http_may_be_asked_for() {
        for protocol in ["websocket", "SPDY/3.1", "tcp", "h2o", "WebSocket, x/1"] {
            let lines = [("connection", "Upgrade"), ("upgrade", protocol)];
            assert_eq!(read(&lines), Ok(Some(protocol.into())));
            let empty = [lines[0], lines[1], ("content-length", "0")];
            assert_eq!(read(&empty), Ok(Some(protocol.into())));
        }
        let lines = [("connection", "a, upgrade"), ("upgrade", "a"), ("upgrade", "b")];
        assert_eq!(read(&lines), Ok(Some("a, b".into())));
    }

    #[test]
    fn a_request_without_both_headers_is_ordinary() {
        assert_eq!(read(&[("upgrade", "h2c")]), Ok(None));
        assert_eq!(read(&[("connection", "upgrade")]), Ok(None));
        assert_eq!(read(&[("connection", "close"), ("upgrade", "a")]), Ok(None));
        let lines = headers(&[("connection", "upgrade"), ("upgrade", "websocket")]);
        assert_eq!(asked(Version::HTTP_10, &lines), Ok(None));
    }

    #[test]
    fn an_upgrade_that_would_smuggle_is_refused() {
        for protocol in [
            "h2c",
            "H2C",
            "websocket, h2c",
            "websocket,h2c",
            "h2c,",
            "h2",
            "HTTP/2.0",
            "http/1.1",
            "TLS/1.0",
            "h2c/1",
            "",
            ",",
            "web socket",
            "a/b/c",
            "/1",
            "a/",
            "\"h2c\"",
        ] {
            let lines = [("connection", "upgrade"), ("upgrade", protocol)];
            assert_eq!(read(&lines), Err(Code::BadUpgrade), "{protocol}");
            let split = [lines[0], ("upgrade", "websocket"), lines[1]];
            let is_empty = protocol.is_empty() || protocol == ",";
            assert_eq!(read(&split).is_err(), !is_empty, "{protocol}");
        }
        for body in [("content-length", "1"), ("transfer-encoding", "chunked")] {
            let lines = [("connection", "upgrade"), ("upgrade", "tcp"), body];
            assert_eq!(read(&lines), Err(Code::BadUpgrade));
        }
    }

    #[test]
    fn only_a_protocol_that_was_asked_for_is_granted() {
        let asked = HeaderValue::from_static("SPDY/3.1, websocket");
        for (granted, expected) in [
            ("SPDY/3.1", true),
            ("spdy/3.1", true),
            ("websocket", true),
            (" WebSocket ", true),
            ("h2c", false),
            ("tcp", false),
            ("websocket, SPDY/3.1", false),
            ("", false),
        ] {
            assert_eq!(is_granted(granted.as_bytes(), &asked), expected, "{granted}");
        }
    }
}
