//! Client's side of the opening handshake (RFC 6455, section 4.1); knows no sockets.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use http::header::{
    CONNECTION, HeaderName, HeaderValue, SEC_WEBSOCKET_ACCEPT, SEC_WEBSOCKET_EXTENSIONS,
    SEC_WEBSOCKET_PROTOCOL, UPGRADE,
};
use http::uri::PathAndQuery;
use http::{HeaderMap, StatusCode};

use super::deflate::Params;
use super::handshake::{accept, lists_token, only};
use super::{extension, negotiation};

/// Opening handshake to send.
///
/// ```
/// use wsproxy_proto::ws::client::{ClientRequest, Response, read_response};
///
/// let host = http::HeaderValue::from_static("example.org");
/// let path = http::uri::PathAndQuery::from_static("/chat");
/// let request = ClientRequest::new(host, path, *b"the sample nonce");
/// assert!(request.build().starts_with(b"GET /chat HTTP/1.1\r\nHost: example.org\r\n"));
/// let refused = read_response(b"HTTP/1.1 503 Unavailable\r\n\r\n", &request);
/// assert!(matches!(refused, Ok(Response::Refused { status, .. }) if status == 503));
/// ```
#[derive(Debug, Clone)]
pub struct ClientRequest {
    host: HeaderValue,
    path: PathAndQuery,
    key: String,
    subprotocols: Vec<String>,
    headers: Vec<(HeaderName, HeaderValue)>,
    deflate: Option<Params>,
}

impl ClientRequest {
    /// Creates a request. `nonce` is 16 random bytes.
    #[must_use]
    pub fn new(host: HeaderValue, path: PathAndQuery, nonce: [u8; 16]) -> Self {
        Self {
            host,
            path,
            key: STANDARD.encode(nonce),
            subprotocols: Vec::new(),
            headers: Vec::new(),
            deflate: None,
        }
    }

    /// Offers a subprotocol, after those offered before. A name that is no token cannot be offered, and is left out.
    #[must_use]
    pub fn subprotocol(mut self, name: &str) -> Self {
        if !name.is_empty() && name.bytes().all(extension::is_token) {
            self.subprotocols.push(name.into());
        }
        self
    }

    /// Adds a header.
    #[must_use]
    pub fn header(mut self, name: HeaderName, value: HeaderValue) -> Self {
        self.headers.push((name, value));
        self
    }

    /// Offers permessage-deflate with these parameters. A window of 15 bits is no demand.
    #[must_use]
    pub fn deflate(mut self, offer: Params) -> Self {
        self.deflate = Some(offer);
        self
    }

    /// Returns the request's head for the wire.
    #[must_use]
    pub fn build(&self) -> Vec<u8> {
        let mut head = Vec::with_capacity(512);
        head.extend_from_slice(b"GET ");
        // A query without a path is a legal `PathAndQuery`, but not a legal request target.
        if !self.path.as_str().starts_with('/') {
            head.push(b'/');
        }
        head.extend_from_slice(self.path.as_str().as_bytes());
        head.extend_from_slice(b" HTTP/1.1");
        add(&mut head, "Host", self.host.as_bytes());
        add(&mut head, "Connection", b"Upgrade");
        add(&mut head, "Upgrade", b"websocket");
        add(&mut head, "Sec-WebSocket-Version", b"13");
        add(&mut head, "Sec-WebSocket-Key", self.key.as_bytes());
        if !self.subprotocols.is_empty() {
            add(&mut head, "Sec-WebSocket-Protocol", self.subprotocols.join(", ").as_bytes());
        }
        if let Some(offer) = &self.deflate {
            add(&mut head, "Sec-WebSocket-Extensions", negotiation::offer(offer).as_bytes());
        }
        for (name, value) in &self.headers {
            add(&mut head, name.as_str(), value.as_bytes());
        }
        head.extend_from_slice(b"\r\n\r\n");
        head
    }
}

fn add(head: &mut Vec<u8>, name: &str, value: &[u8]) {
    for part in [b"\r\n", name.as_bytes(), b": ", value] {
        head.extend_from_slice(part);
    }
}

/// Answer of a server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Response {
    /// The head is not complete: more bytes are needed.
    Incomplete,
    /// `101` with valid headers.
    Accepted {
        /// Parameters of compression that were negotiated.
        deflate: Option<Params>,
        /// Subprotocol that the server chose.
        subprotocol: Option<String>,
        /// Number of bytes of the head; frames follow.
        consumed: usize,
    },
    /// Any other status.
    Refused {
        /// Status of the answer.
        status: StatusCode,
        /// Headers of the answer.
        headers: HeaderMap,
        /// Number of bytes of the head; a body follows.
        consumed: usize,
    },
}

/// Error of an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ResponseError {
    /// The answer is not HTTP/1.1, or larger than [`RESPONSE_BYTES_MAX`].
    #[error("the answer is not HTTP/1.1")]
    NotHttp,
    /// `101` with a header that is missing or wrong.
    #[error("{0}")]
    Malformed(&'static str),
}

/// Reads the server's answer to `request` from `head`, which is all bytes received so far.
///
/// # Errors
/// [`ResponseError`]: the connection cannot be used.
pub fn read_response(head: &[u8], request: &ClientRequest) -> Result<Response, ResponseError> {
    let mut fields = [httparse::EMPTY_HEADER; HEADERS_MAX];
    let mut response = httparse::Response::new(&mut fields);
    let parsed = response.parse(head).map_err(|_| ResponseError::NotHttp)?;
    let consumed = match parsed {
        httparse::Status::Complete(consumed) => consumed,
        httparse::Status::Partial if head.len() < RESPONSE_BYTES_MAX => {
            return Ok(Response::Incomplete);
        }
        httparse::Status::Partial => return Err(ResponseError::NotHttp),
    };
    let status = response.code.and_then(|code| StatusCode::from_u16(code).ok());
    let (Some(status), Some(1)) = (status, response.version) else {
        return Err(ResponseError::NotHttp);
    };
    let mut headers = HeaderMap::new();
    for field in response.headers.iter() {
        let name = HeaderName::from_bytes(field.name.as_bytes());
        let value = HeaderValue::from_bytes(field.value);
        let (Ok(name), Ok(value)) = (name, value) else { return Err(ResponseError::NotHttp) };
        headers.append(name, value);
    }
    if status != StatusCode::SWITCHING_PROTOCOLS {
        return Ok(Response::Refused { status, headers, consumed });
    }
    let (deflate, subprotocol) = check(&headers, request).map_err(ResponseError::Malformed)?;
    Ok(Response::Accepted { deflate, subprotocol, consumed })
}

/// Checks a `101` by the rules of RFC 6455, section 4.1.
fn check(
    headers: &HeaderMap,
    request: &ClientRequest,
) -> Result<(Option<Params>, Option<String>), &'static str> {
    if !lists_token(headers, &CONNECTION, "upgrade") {
        return Err("the answer does not upgrade the connection");
    }
    if !only(headers, &UPGRADE).is_some_and(|value| value.eq_ignore_ascii_case("websocket")) {
        return Err("the answer upgrades to something else");
    }
    if only(headers, &SEC_WEBSOCKET_ACCEPT) != Some(&accept(&request.key)) {
        return Err("the answer is not to our key");
    }
    let subprotocol = if headers.contains_key(SEC_WEBSOCKET_PROTOCOL) {
        let chosen = only(headers, &SEC_WEBSOCKET_PROTOCOL)
            .filter(|chosen| request.subprotocols.iter().any(|offered| offered == chosen));
        Some(chosen.ok_or("the answer chooses a subprotocol that was not offered")?.to_owned())
    } else {
        None
    };
    let mut deflate = None;
    for value in headers.get_all(SEC_WEBSOCKET_EXTENSIONS) {
        let value = value.to_str().map_err(|_| MALFORMED_EXTENSIONS)?;
        for extension in extension::parse(value) {
            let extension = extension.map_err(|_| MALFORMED_EXTENSIONS)?;
            let offer = request.deflate.filter(|_| extension.name == negotiation::NAME);
            let (Some(offer), None) = (offer, deflate) else {
                return Err("the answer uses an extension that was not offered");
            };
            let agreed = negotiation::confirm(&extension, &offer);
            deflate = Some(agreed.ok_or("the answer breaks the offer of permessage-deflate")?);
        }
    }
    Ok((deflate, subprotocol))
}

/// Upper bound of the head of an answer.
pub const RESPONSE_BYTES_MAX: usize = 16 << 10;

const HEADERS_MAX: usize = 100;

const MALFORMED_EXTENSIONS: &str = "the answer's extensions are malformed";

#[cfg(test)]
mod tests {
    use super::*;

    const OFFER: Params = Params {
        server_no_context_takeover: true,
        client_no_context_takeover: false,
        server_max_window_bits: 15,
        client_max_window_bits: 15,
    };

    fn request() -> ClientRequest {
        let host = HeaderValue::from_static("example.org");
        let nonce = *b"the sample nonce";
        ClientRequest::new(host, PathAndQuery::from_static("/chat?a=b"), nonce)
            .subprotocol("one")
            .subprotocol("two")
            .subprotocol("no token")
    }

    fn answer(extra: &str) -> String {
        format!(
            "HTTP/1.1 101 Switching Protocols\r\nUpgrade: WebSocket\r\nConnection: Upgrade\r\n\
             Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n{extra}\r\n"
        )
    }

    fn read(extra: &str) -> Result<Response, ResponseError> {
        read_response(answer(extra).as_bytes(), &request().deflate(OFFER))
    }

    #[test]
    fn the_request_has_what_the_rfc_asks_for() {
        let request = request()
            .header(HeaderName::from_static("x-a"), HeaderValue::from_static("b"))
            .deflate(OFFER);
        let head = String::from_utf8(request.build()).unwrap();
        assert_eq!(
            head,
            "GET /chat?a=b HTTP/1.1\r\nHost: example.org\r\nConnection: Upgrade\r\n\
             Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\n\
             Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\
             Sec-WebSocket-Protocol: one, two\r\n\
             Sec-WebSocket-Extensions: permessage-deflate; server_no_context_takeover; \
             client_max_window_bits\r\nx-a: b\r\n\r\n"
        );
    }

    #[test]
    fn an_answer_is_read_at_any_split() {
        let text = answer("Sec-WebSocket-Protocol: two\r\n");
        for end in 0..text.len() {
            let result = read_response(&text.as_bytes()[..end], &request());
            assert_eq!(result, Ok(Response::Incomplete));
        }
        let with_frames = text.clone() + "frames";
        let result = read_response(with_frames.as_bytes(), &request());
        let consumed = text.len();
        let subprotocol = Some("two".into());
        assert_eq!(result, Ok(Response::Accepted { deflate: None, subprotocol, consumed }));
    }

    #[test]
    fn deflate_is_what_both_agreed_on() {
        let extra = "Sec-WebSocket-Extensions: permessage-deflate; server_no_context_takeover; \
                     client_max_window_bits=10; server_max_window_bits=\"12\"\r\n";
        let Ok(Response::Accepted { deflate: Some(params), .. }) = read(extra) else { panic!() };
        assert_eq!((params.server_max_window_bits, params.client_max_window_bits), (12, 10));
        assert!(params.server_no_context_takeover && !params.client_no_context_takeover);
    }

    #[test]
    fn what_was_not_offered_is_not_accepted() {
        for extra in [
            "Sec-WebSocket-Protocol: three\r\n",
            "Sec-WebSocket-Protocol: one\r\nSec-WebSocket-Protocol: two\r\n",
            "Sec-WebSocket-Extensions: x-other\r\n",
            "Sec-WebSocket-Extensions: permessage-deflate\r\n",
            "Sec-WebSocket-Extensions: permessage-deflate; server_no_context_takeover; x\r\n",
            "Sec-WebSocket-Extensions: permessage-deflate; server_no_context_takeover; \
             client_max_window_bits\r\n",
            "Sec-WebSocket-Extensions: permessage-deflate; server_no_context_takeover; \
             client_max_window_bits=8\r\n",
            "Sec-WebSocket-Extensions: permessage-deflate; server_no_context_takeover, \
             permessage-deflate; server_no_context_takeover\r\n",
            "Sec-WebSocket-Extensions: ;\r\n",
            "Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n",
            "Upgrade: websocket\r\n",
        ] {
            assert!(matches!(read(extra), Err(ResponseError::Malformed(_))), "{extra}");
        }
        let extra = "Sec-WebSocket-Extensions: permessage-deflate\r\n";
        let result = read_response(answer(extra).as_bytes(), &request());
        assert!(matches!(result, Err(ResponseError::Malformed(_))));
    }

    #[test]
    fn refusals_and_nonsense() {
        let text = "HTTP/1.1 429 Too Many Requests\r\nRetry-After: 7\r\n\r\nbody";
        let result = read_response(text.as_bytes(), &request());
        let Ok(Response::Refused { status, headers, consumed }) = result else { panic!() };
        assert_eq!((status.as_u16(), &text[consumed..]), (429, "body"));
        assert_eq!(headers["retry-after"], "7");
        for text in ["SSH-2.0-OpenSSH\r\n", "HTTP/1.0 101 x\r\n\r\n", "HTTP/1.1 099 x\r\n\r\n"] {
            assert_eq!(read_response(text.as_bytes(), &request()), Err(ResponseError::NotHttp));
        }
        let endless = format!("HTTP/1.1 200 OK\r\nX: {}", "a".repeat(RESPONSE_BYTES_MAX));
        assert_eq!(read_response(endless.as_bytes(), &request()), Err(ResponseError::NotHttp));
        for (good, bad) in [("Connection: Upgrade", "Connection: close"), ("s3p", "s3q")] {
            let text = answer("").replace(good, bad);
            let result = read_response(text.as_bytes(), &request());
            assert!(matches!(result, Err(ResponseError::Malformed(_))), "{bad}");
        }
    }
}
