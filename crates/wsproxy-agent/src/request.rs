//! Head of a request: checks what the gateway sent, and makes the head for the upstream. Knows no connection.

use std::{borrow::Cow, sync::Arc};

use http::{
    HeaderMap, HeaderName, HeaderValue, Method, Request, Uri,
    header::{AUTHORIZATION, CONNECTION, CONTENT_LENGTH, HOST, TE, TRANSFER_ENCODING},
    uri::PathAndQuery,
};
use tokio::sync::Notify;
use wsproxy_proto::tunnel::{code::Code, event};

use crate::{compression, config::Service, failure::Failure, upstream::body::RequestBody};

/// Head of a request that the agent sends to its upstream, without the agent's credential.
#[derive(Debug)]
pub(crate) struct RequestHead {
    method: Method,
    uri: Uri,
    headers: HeaderMap,
    /// Whether a request may be sent twice: it has no effect at the upstream (RFC 9110, section 9.2.1).
    pub(crate) is_safe: bool,
    /// Length of the body, where it is told.
    pub(crate) length: Option<u64>,
    /// Whether the client takes an answer that the agent compressed.
    pub(crate) takes_gzip: bool,
}

impl RequestHead {
    /// Checks the head of a stream against the rules of the agent, and takes it over.
    ///
    /// # Errors
    /// [`Code::BadPath`]: the agent does not serve the path. [`Code::Protocol`]: a header that a gateway must not send,
    /// or a head that is no HTTP.
    pub(crate) fn read(request: &event::Request, service: &Service) -> Result<Self, Failure> {
        let broken = |message| Failure::new(Code::Protocol, message);
        let method = Method::from_bytes(&request.method);
        let method = method.map_err(|_| broken("the method is no token"))?;
        if method == Method::CONNECT || method == Method::TRACE {
            return Err(broken("the method is not served"));
        }
        let uri = read_path(request)?;
        if !service.paths.allows(uri.path()) {
            return Err(Failure::new(Code::BadPath, "the agent does not serve this path"));
        }
        // Room for what a connection adds.
        let count = request.headers.headers().iter().count() + ADDED_MAX;
        let mut headers = HeaderMap::with_capacity(count.min(PREPARED_MAX));
        for (name, value) in request.headers.iter() {
            if is_refused(name, &value, request.upgrade) {
                return Err(broken("a header is not allowed"));
            }
            let name = HeaderName::from_lowercase(name);
            let name = name.map_err(|_| broken("a header is no name"))?;
            let value = HeaderValue::from_maybe_shared(value);
            headers.append(name, value.map_err(|_| broken("a header's value is invalid"))?);
        }
        let length = read_length(&headers)?;
        let is_bodyless = request.end || request.upgrade;
        if is_bodyless && length.is_some_and(|length| length > 0) {
            return Err(broken("the length is that of a body, and there is none"));
        }
        // An upgrade may run a command: `kubectl exec` is a `GET`.
        let is_safe =
            !request.upgrade && [Method::GET, Method::HEAD, Method::OPTIONS].contains(&method);
        let may_compress = service.compresses && !request.long && !request.upgrade;
        let takes_gzip =
            may_compress && method != Method::HEAD && compression::accepts_gzip(&headers);
        let mut head = Self { method, uri, headers, is_safe, length, takes_gzip };
        head.complete(is_bodyless, request.upgrade, service);
        Ok(head)
    }

    /// Returns the head of a probe.
    pub(crate) fn of_probe(path: PathAndQuery, service: &Service) -> Self {
        let mut headers = HeaderMap::new();
        headers.insert(HOST, service.host.clone());
        Self {
            method: Method::GET,
            uri: path.into(),
            headers,
            is_safe: true,
            length: None,
            takes_gzip: false,
        }
    }

    /// Returns the request with a body. The credential comes last, so that no other header takes its place.
    pub(crate) fn request(
        self,
        body: RequestBody,
        credential: Option<HeaderValue>,
        went_on: Option<&Arc<Notify>>,
    ) -> Request<RequestBody> {
        let mut request = Request::new(body);
        *request.method_mut() = self.method;
        *request.uri_mut() = self.uri;
        *request.headers_mut() = self.headers;
        if let Some(went_on) = went_on.cloned() {
            hyper::ext::on_informational(&mut request, move |head| {
                if head.status() == http::StatusCode::CONTINUE {
                    went_on.notify_one();
                }
            });
        }
        if let Some(credential) = credential {
            request.headers_mut().insert(AUTHORIZATION, credential);
        }
        request
    }

    /// Adds the headers that belong to one connection.
    fn complete(&mut self, is_bodyless: bool, is_upgrade: bool, service: &Service) {
        let Self { method, headers, length, .. } = self;
        if !service.preserve_host || !headers.contains_key(HOST) {
            headers.insert(HOST, service.host.clone());
        }
        if is_upgrade {
            headers.insert(CONNECTION, HeaderValue::from_static("upgrade"));
        } else if headers.contains_key(TE) {
            headers.insert(CONNECTION, HeaderValue::from_static("te"));
        }
        if is_bodyless && length.is_none() && has_body_by_nature(method) {
            headers.insert(CONTENT_LENGTH, HeaderValue::from_static("0"));
        }
        if !is_bodyless && length.is_none() {
            // The HTTP library would send no body with GET.
            headers.insert(TRANSFER_ENCODING, HeaderValue::from_static("chunked"));
        }
    }
}

fn has_body_by_nature(method: &Method) -> bool {
    [Method::POST, Method::PUT, Method::PATCH].contains(method)
}

/// Returns whether a header belongs to one connection, or claims an identity at the upstream.
fn is_refused(name: &[u8], value: &[u8], is_upgrade: bool) -> bool {
    let name = if name.contains(&b'_') {
        let spelled = name.iter().map(|byte| if *byte == b'_' { b'-' } else { *byte });
        Cow::Owned(spelled.collect::<Vec<u8>>())
    } else {
        Cow::Borrowed(name)
    };
    match &name[..] {
        b"connection" | b"keep-alive" | b"transfer-encoding" => true,
        b"te" => !value.eq_ignore_ascii_case(b"trailers"),
        b"upgrade" => !is_upgrade,
        name => REFUSED_PREFIXES.iter().any(|prefix| name.starts_with(prefix)),
    }
}

fn read_path(request: &event::Request) -> Result<Uri, Failure> {
    let bad = || Failure::new(Code::BadPath, "the path is malformed");
    let has_fragment = request.path.iter().any(|byte| matches!(byte, b'#' | b'\\'));
    let path = PathAndQuery::from_maybe_shared(request.path.clone());
    let path = path.ok().filter(|_| !has_fragment).ok_or_else(bad)?;
    let mut parts = http::uri::Parts::default();
    parts.path_and_query = Some(path);
    Uri::from_parts(parts).map_err(|_| bad())
}

fn read_length(headers: &HeaderMap) -> Result<Option<u64>, Failure> {
    let mut values = headers.get_all(CONTENT_LENGTH).iter();
    let Some(value) = values.next() else { return Ok(None) };
    let is_number = value.as_bytes().iter().all(u8::is_ascii_digit);
    let length = value.to_str().ok().filter(|_| is_number).and_then(|text| text.parse().ok());
    let length = length.filter(|_| values.next().is_none());
    let broken = || Failure::new(Code::Protocol, "the length of the body is malformed");
    length.map(Some).ok_or_else(broken)
}

/// Upper bound of the headers that a connection and the agent's credential add.
const ADDED_MAX: usize = 4;

/// Upper bound of the headers for which there is room from the beginning.
const PREPARED_MAX: usize = 64;

/// Beginnings of names that a gateway takes away: of connections to proxies, and of identities that an upstream believes.
const REFUSED_PREFIXES: [&[u8]; 4] = [b"proxy-", b"impersonate-", b"x-remote-", b"x-wsproxy-"];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn identities_and_hop_by_hop_headers_are_refused() {
        for name in [
            "connection",
            "keep-alive",
            "transfer-encoding",
            "proxy-authorization",
            "upgrade",
            "te",
            "impersonate-user",
            "impersonate_user",
            "x-remote-group",
            "x_remote_user",
            "x-wsproxy-peer",
            "keep_alive",
        ] {
            assert!(is_refused(name.as_bytes(), b"x", false), "{name}");
        }
        assert!(!is_refused(b"te", b"Trailers", false));
        assert!(!is_refused(b"upgrade", b"SPDY/3.1", true));
        for name in ["accept", "x-forwarded-for", "x-request-id", "trailer", "host"] {
            assert!(!is_refused(name.as_bytes(), b"x", false), "{name}");
        }
    }
}
