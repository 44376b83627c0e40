//! One HTTP request for a small document, bounded in time and size; does not know its content.

use std::{path::Path, time::Duration};

use bytes::Bytes;
use http::{HeaderValue, Request, StatusCode, Uri, header};
use http_body_util::Full;
use tokio_util::task::TaskTracker;

use crate::outbound::{self, Outbound, OutboundError, USER_AGENT};

/// Fetches one document again and again, each time on a connection of its own.
pub(super) struct Fetcher {
    outbound: Outbound,
    url: Uri,
    timeout: Duration,
}

/// The reason why there is no usable document.
#[derive(Debug, thiserror::Error)]
pub(super) enum FetchError {
    #[error(transparent)]
    Outbound(#[from] OutboundError),
    #[error("status {0}")]
    Status(StatusCode),
    #[error("the answer is no set of keys: line {line}, column {column}")]
    Malformed { line: usize, column: usize },
    #[error("none of {published} keys can be used with jwt.algorithms")]
    NoKey { published: usize },
}

impl Fetcher {
    /// Creates the client, without a connection. Connections are driven on `tasks`.
    pub(super) fn new(
        url: &str,
        ca_file: Option<&Path>,
        timeout: Duration,
        tasks: &TaskTracker,
    ) -> Result<Self, String> {
        let url = url.parse().map_err(|error| format!("jwt.jwks_url is no URL: {error}"))?;
        // The next request is minutes away, so no connection is kept open.
        Ok(Self { outbound: Outbound::new(ca_file, None, tasks)?, url, timeout })
    }

    /// Returns whether third parties can read and change the traffic.
    pub(super) fn is_exposed(&self) -> bool {
        outbound::is_exposed(&self.url)
    }

    /// Fetches the document.
    pub(super) async fn fetch(&self) -> Result<Bytes, FetchError> {
        outbound::within(self.timeout, self.request()).await
    }

    async fn request(&self) -> Result<Bytes, FetchError> {
        let mut request = Request::new(Full::default());
        *request.uri_mut() = self.url.clone();
        let headers = request.headers_mut();
        headers.insert(header::ACCEPT, HeaderValue::from_static(ACCEPT));
        headers.insert(header::USER_AGENT, HeaderValue::from_static(USER_AGENT));
        let answer = self.outbound.send(request).await?;
        if answer.status() != StatusCode::OK {
            return Err(FetchError::Status(answer.status()));
        }
        Ok(outbound::read(answer, BODY_BYTES_MAX).await?)
    }
}

/// Upper bound of the document's size: a key takes half a kilobyte, a set a few kilobytes.
const BODY_BYTES_MAX: usize = 256 * 1024;

const ACCEPT: &str = "application/jwk-set+json, application/json";
