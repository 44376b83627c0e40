//! Head of an answer for the lane; knows no connection.

use std::borrow::Cow;

use http::{
    HeaderMap, HeaderName, HeaderValue, Response, StatusCode,
    header::{CONNECTION, CONTENT_LENGTH, LOCATION, TE, TRANSFER_ENCODING, UPGRADE},
};
use wsproxy_proto::tunnel::{
    code::Code,
    headers::{HeaderBlock, HeaderError},
};

use crate::failure::Failure;

/// Returns the headers of an answer without those of the upstream's connection. A `Location` at the upstream's own `host`
/// becomes a path, since the gateway does not know that host.
///
/// # Errors
/// [`Code::HeadTooLarge`]; [`Code::UpstreamProtocol`]: the answer's body is coded in a way that the agent cannot read.
pub(crate) fn header_block<B>(
    response: &Response<B>,
    host: &HeaderValue,
) -> Result<HeaderBlock, Failure> {
    let headers = response.headers();
    let is_upgrade = response.status() == StatusCode::SWITCHING_PROTOCOLS;
    let is_coded = headers.contains_key(TRANSFER_ENCODING);
    if headers.get_all(TRANSFER_ENCODING).iter().any(|value| !is_chunked(value.as_bytes())) {
        let message = "the answer has a transfer coding that was not asked for";
        return Err(Failure::new(Code::UpstreamProtocol, message));
    }
    let named = named_by_connection(headers);
    let mut block = HeaderBlock::of_head();
    let mut has_length = false;
    for (name, value) in headers {
        if name == CONTENT_LENGTH {
            // The HTTP library has compared the lengths, and takes a list of equal ones for one of them.
            if !value.as_bytes().iter().all(u8::is_ascii_digit) {
                return Err(Failure::new(Code::UpstreamProtocol, "the answer has several lengths"));
            }
            if std::mem::replace(&mut has_length, true) {
                continue;
            }
        }
        // A length beside chunks says something else than the chunks do (RFC 9112, section 6.3).
        let is_dropped = is_of_connection(name, is_upgrade)
            || (is_coded && name == CONTENT_LENGTH)
            || (named.contains(name) && !(is_upgrade && name == UPGRADE));
        if !is_dropped {
            let value = value.as_bytes();
            let path = (name == LOCATION).then(|| own_path(value, host.as_bytes())).flatten();
            push(&mut block, name, path.as_deref().unwrap_or(value))?;
        }
    }
    Ok(block)
}

/// Returns the path of a URL at the upstream's own host; `None` for any other text.
fn own_path<'v>(url: &'v [u8], host: &[u8]) -> Option<Cow<'v, [u8]>> {
    let schemes = [(&b"https:"[..], &b":443"[..]), (b"http:", b":80"), (b"", b"")];
    let (scheme, port) = schemes.into_iter().find(|(scheme, _)| {
        url.get(..scheme.len()).is_some_and(|start| start.eq_ignore_ascii_case(scheme))
    })?;
    let rest = url[scheme.len()..].strip_prefix(b"//")?;
    let end = rest.iter().position(|byte| b"/?#\\".contains(byte)).unwrap_or(rest.len());
    let (authority, path) = rest.split_at(end);
    let authority = authority.strip_suffix(port).unwrap_or(authority);
    let host = host.strip_suffix(port).unwrap_or(host);
    // Two slashes at the start of a path would name a host.
    let is_own = authority.eq_ignore_ascii_case(host) && !path.starts_with(b"//");
    let path = is_own.then_some(path)?;
    Some(if path.starts_with(b"/") { path.into() } else { [b"/", path].concat().into() })
}

/// Returns trailers for the lane.
///
/// # Errors
/// [`Code::HeadTooLarge`].
pub(crate) fn trailer_block(trailers: &HeaderMap) -> Result<HeaderBlock, Failure> {
    let mut block = HeaderBlock::new();
    for (name, value) in trailers {
        push(&mut block, name, value.as_bytes())?;
    }
    Ok(block)
}

fn push(block: &mut HeaderBlock, name: &HeaderName, value: &[u8]) -> Result<(), Failure> {
    block.push(name.as_str().as_bytes(), value).map_err(|error| match error {
        HeaderError::TooLarge => too_large(),
        HeaderError::Invalid => {
            Failure::new(Code::UpstreamProtocol, "the answer has an invalid header")
        }
    })
}

/// Returns the failure of an answer whose head is larger than the gateway takes.
pub(crate) fn too_large() -> Failure {
    Failure::new(Code::HeadTooLarge, "the head of the answer is too large")
}

fn is_chunked(value: &[u8]) -> bool {
    value.trim_ascii().eq_ignore_ascii_case(b"chunked")
}

fn is_of_connection(name: &HeaderName, is_upgrade: bool) -> bool {
    *name == CONNECTION
        || *name == TRANSFER_ENCODING
        || *name == TE
        || (*name == UPGRADE && !is_upgrade)
        || name == "keep-alive"
        || name == "proxy-connection"
}

/// Returns the headers that `Connection` names.
fn named_by_connection(headers: &HeaderMap) -> Vec<HeaderName> {
    let values = headers.get_all(CONNECTION).iter().filter_map(|value| value.to_str().ok());
    let names = values.flat_map(|value| value.split(','));
    names.filter_map(|name| HeaderName::from_bytes(name.trim().as_bytes()).ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(response: &Response<()>) -> Vec<String> {
        let block = header_block(response, &HeaderValue::from_static("up:6443")).unwrap();
        let names = block.headers().iter().map(|(name, _)| String::from_utf8_lossy(name).into());
        names.collect()
    }

    #[test]
    fn headers_of_the_connection_stay_with_it() {
        let response = Response::builder()
            .header("connection", "close, X-Hop")
            .header("x-hop", "1")
            .header("keep-alive", "timeout=5")
            .header("transfer-encoding", "Chunked")
            .header("content-length", "5")
            .header("trailer", "x-sum")
            .header("content-type", "text/plain");
        assert_eq!(names(&response.body(()).unwrap()), ["trailer", "content-type"]);
        let twice = Response::builder().header("content-length", "5").header("content-length", "5");
        assert_eq!(names(&twice.body(()).unwrap()), ["content-length"]);
        let upgraded = Response::builder()
            .status(101)
            .header("connection", "Upgrade")
            .header("upgrade", "SPDY/3.1");
        assert_eq!(names(&upgraded.body(()).unwrap()), ["upgrade"]);
    }

    #[test]
    fn codings_and_lists_of_lengths_are_no_answer() {
        for (name, value) in [("transfer-encoding", "gzip, chunked"), ("content-length", "5, 5")] {
            let response = Response::builder().header(name, value);
            let host = HeaderValue::from_static("up:6443");
            let failure = header_block(&response.body(()).unwrap(), &host).unwrap_err();
            assert_eq!(failure.code(), Code::UpstreamProtocol);
        }
    }

    #[test]
    fn a_location_at_the_upstream_becomes_a_path() {
        for (host, url, expected) in [
            ("up:6443", "https://up:6443/a?b#c", Some("/a?b#c")),
            ("up:6443", "HTTPS://UP:6443/a", Some("/a")),
            ("up:6443", "//up:6443/a", Some("/a")),
            ("up:6443", "https://up:6443", Some("/")),
            ("up:6443", "https://up:6443?a", Some("/?a")),
            ("up", "https://up:443/a", Some("/a")),
            ("up:80", "http://up/a", Some("/a")),
            ("up", "http://up:443/a", None),
            ("up:6443", "https://up/a", None),
            ("up:6443", "https://up:6443//evil.example/a", None),
            ("up:6443", "https://up:6443@evil.example/a", None),
            ("up:6443", "https://up:6443.evil.example/a", None),
            ("up:6443", "/a", None),
            ("up:6443", "a", None),
            ("up:6443", "", None),
            ("up:6443", "https:", None),
        ] {
            let path = own_path(url.as_bytes(), host.as_bytes());
            assert_eq!(path.as_deref(), expected.map(str::as_bytes), "{url}");
        }
    }
}
