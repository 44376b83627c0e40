//! The client's side of the opening handshake (RFC 6455 section 4.1); knows no sockets.

use http::header::{HeaderName, HeaderValue};
use http::uri::PathAndQuery;
use http::{HeaderMap, StatusCode};

use super::deflate::Params;

/// An opening handshake to send.
#[derive(Debug, Clone)]
pub struct ClientRequest {
    host: HeaderValue,
    path: PathAndQuery,
    nonce: [u8; 16],
}

impl ClientRequest {
    /// `nonce` is the caller's randomness.
    #[must_use]
    pub fn new(host: HeaderValue, path: PathAndQuery, nonce: [u8; 16]) -> Self {
        Self { host, path, nonce }
    }

    /// Offers a subprotocol, after those offered before.
    #[must_use]
    pub fn subprotocol(self, name: &str) -> Self {
        let _ = name;
        self
    }

    /// Adds a header.
    #[must_use]
    pub fn header(self, name: HeaderName, value: HeaderValue) -> Self {
        let _ = (name, value);
        self
    }

    /// Offers permessage-deflate.
    #[must_use]
    pub fn deflate(self, offer: Params) -> Self {
        let _ = offer;
        self
    }

    /// The request's head for the wire.
    #[must_use]
    pub fn build(&self) -> Vec<u8> {
        let _ = (&self.host, &self.path, &self.nonce);
        todo!()
    }
}

/// What the server answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Response {
    /// The head is not complete: call again with more bytes.
    Incomplete,
    /// `101`, and all of it as it must be.
    Accepted {
        /// What was negotiated.
        deflate: Option<Params>,
        /// The subprotocol that the server chose.
        subprotocol: Option<String>,
        /// Bytes of the head; frames follow.
        consumed: usize,
    },
    /// Any other status.
    Refused {
        /// What the server says.
        status: StatusCode,
        /// With these headers.
        headers: HeaderMap,
        /// Bytes of the head; a body follows.
        consumed: usize,
    },
}

/// What is wrong with an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ResponseError {
    /// Not HTTP/1.1, or more headers than any honest server sends.
    #[error("the answer is not HTTP/1.1")]
    NotHttp,
    /// `101` with something missing or other than it must be.
    #[error("{0}")]
    Malformed(&'static str),
}

/// Reads the server's answer to `request` from `head`, all bytes received so far.
///
/// # Errors
/// The answer cannot be trusted: give the connection up.
pub fn read_response(head: &[u8], request: &ClientRequest) -> Result<Response, ResponseError> {
    let _ = (head, request);
    Ok(Response::Incomplete)
}
