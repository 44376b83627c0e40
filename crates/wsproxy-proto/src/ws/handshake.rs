//! The opening handshake as a server sees it, RFC 6455 section 4.2; knows headers, no HTTP server.

use base64::{Engine, prelude::BASE64_STANDARD};
use http::{HeaderMap, Method, Version, header};
use sha1_smol::Sha1;

/// What is appended to the client's key (section 1.3).
const GUID: &str = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11";

/// A request for an upgrade that is well formed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Upgrade {
    /// The value of `Sec-WebSocket-Accept`.
    pub accept: String,
}

/// Why a request is no upgrade.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// It does not ask for one.
    NotAnUpgrade,
    /// Another version of the protocol.
    Version,
    /// Another method than GET.
    Method,
    /// It asks for one in a way that the RFC forbids.
    Malformed(&'static str),
}

/// Checks a request (section 4.2.1).
///
/// # Errors
/// The first rule that it breaks.
pub fn read_upgrade(
    method: &Method,
    version: Version,
    headers: &HeaderMap,
) -> Result<Upgrade, Refusal> {
    if !has_token(headers, header::UPGRADE, "websocket") {
        return Err(Refusal::NotAnUpgrade);
    }
    if method != Method::GET {
        return Err(Refusal::Method);
    }
    if version != Version::HTTP_11 {
        return Err(Refusal::Malformed("A WebSocket needs HTTP/1.1."));
    }
    if !has_token(headers, header::CONNECTION, "upgrade") {
        return Err(Refusal::Malformed("The Connection header does not say Upgrade."));
    }
    if single(headers, header::SEC_WEBSOCKET_VERSION) != Some("13") {
        return Err(Refusal::Version);
    }
    let key = single(headers, header::SEC_WEBSOCKET_KEY)
        .filter(|key| BASE64_STANDARD.decode(key).is_ok_and(|bytes| bytes.len() == 16))
        .ok_or(Refusal::Malformed("Sec-WebSocket-Key must be one value of 16 bytes in base64."))?;
    if headers.contains_key(header::CONTENT_LENGTH)
        && single(headers, header::CONTENT_LENGTH) != Some("0")
        || headers.contains_key(header::TRANSFER_ENCODING)
    {
        return Err(Refusal::Malformed("A WebSocket handshake has no body."));
    }
    Ok(Upgrade { accept: accept(key) })
}

/// The value of `Sec-WebSocket-Accept` for a key.
#[must_use]
pub fn accept(key: &str) -> String {
    let mut hash = Sha1::new();
    hash.update(key.as_bytes());
    hash.update(GUID.as_bytes());
    BASE64_STANDARD.encode(hash.digest().bytes())
}

/// The subprotocols that the client offers, in its order.
pub fn subprotocols(headers: &HeaderMap) -> impl Iterator<Item = &str> {
    tokens(headers, header::SEC_WEBSOCKET_PROTOCOL)
}

fn has_token(headers: &HeaderMap, name: header::HeaderName, token: &str) -> bool {
    tokens(headers, name).any(|found| found.eq_ignore_ascii_case(token))
}

fn tokens(headers: &HeaderMap, name: header::HeaderName) -> impl Iterator<Item = &str> {
    let lines = headers.get_all(name).into_iter();
    lines
        .filter_map(|line| line.to_str().ok())
        .flat_map(|line| line.split(','))
        .map(str::trim)
        .filter(|token| !token.is_empty())
}

fn single(headers: &HeaderMap, name: header::HeaderName) -> Option<&str> {
    let mut values = headers.get_all(name).into_iter();
    let value = values.next()?.to_str().ok()?.trim();
    values.next().is_none().then_some(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(change: impl Fn(&mut HeaderMap)) -> Result<Upgrade, Refusal> {
        let mut headers = HeaderMap::new();
        headers.insert(header::UPGRADE, "WebSocket".parse().unwrap());
        headers.insert(header::CONNECTION, "keep-alive, Upgrade".parse().unwrap());
        headers.insert(header::SEC_WEBSOCKET_VERSION, "13".parse().unwrap());
        headers.insert(header::SEC_WEBSOCKET_KEY, "dGhlIHNhbXBsZSBub25jZQ==".parse().unwrap());
        change(&mut headers);
        read_upgrade(&Method::GET, Version::HTTP_11, &headers)
    }

    #[test]
    fn the_example_of_the_rfc_is_accepted() {
        let accept = "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=".to_owned();
        assert_eq!(request(|_| ()), Ok(Upgrade { accept }));
    }

    #[test]
    fn malformed_requests_are_refused() {
        let without =
            |name: header::HeaderName| request(move |headers| drop(headers.remove(&name)));
        assert_eq!(without(header::UPGRADE), Err(Refusal::NotAnUpgrade));
        assert!(matches!(without(header::CONNECTION), Err(Refusal::Malformed(_))));
        assert_eq!(without(header::SEC_WEBSOCKET_VERSION), Err(Refusal::Version));
        assert!(matches!(without(header::SEC_WEBSOCKET_KEY), Err(Refusal::Malformed(_))));
        let key = |key: &'static str| {
            request(move |headers| {
                headers.append(header::SEC_WEBSOCKET_KEY, key.parse().unwrap());
            })
        };
        assert!(matches!(key("dGhlIHNhbXBsZSBub25jZQ=="), Err(Refusal::Malformed(_))));
        let body = |headers: &mut HeaderMap| {
            headers.insert(header::CONTENT_LENGTH, "5".parse().unwrap());
        };
        assert!(matches!(request(body), Err(Refusal::Malformed(_))));
    }
}
