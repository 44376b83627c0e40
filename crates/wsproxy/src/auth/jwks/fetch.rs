//! One HTTP request for a small document, bounded in time and size; does not know its content.

use std::{error::Error, path::Path, time::Duration};

use bytes::Bytes;
use http::{HeaderValue, Request, StatusCode, Uri, header};
use http_body_util::{BodyExt, Empty, LengthLimitError, Limited};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::{Client, connect::HttpConnector};
use tokio_util::task::TaskTracker;

use crate::tls;

/// Fetches one document again and again, each time on a connection of its own. Follows no redirect.
pub(super) struct Fetcher {
    client: Client<HttpsConnector<HttpConnector>, Empty<Bytes>>,
    url: Uri,
    timeout: Duration,
}

/// The reason why there is no usable document.
#[derive(Debug, thiserror::Error)]
pub(super) enum FetchError {
    #[error("no answer: {0}")]
    Transport(String),
    #[error("no answer in time")]
    Timeout,
    #[error("status {0}")]
    Status(StatusCode),
    #[error("the answer is larger than {BODY_BYTES_MAX} bytes")]
    TooLarge,
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
        let connector = HttpsConnectorBuilder::new()
            .with_tls_config(tls::client_config(ca_file)?)
            .https_or_http()
            .enable_http1()
            .build();
        let mut client = Client::builder(Tasks(tasks.clone()));
        // The next request is minutes away, so no connection is kept open.
        client.pool_max_idle_per_host(0);
        Ok(Self { client: client.build(connector), url, timeout })
    }

    /// Returns whether third parties can read and change the traffic.
    pub(super) fn is_exposed(&self) -> bool {
        let host = self.url.host().unwrap_or_default();
        let address = host.trim_matches(['[', ']']).parse::<std::net::IpAddr>();
        let here = address.map_or(host == "localhost", |address| address.is_loopback());
        self.url.scheme() == Some(&http::uri::Scheme::HTTP) && !here
    }

    /// Fetches the document.
    pub(super) async fn fetch(&self) -> Result<Bytes, FetchError> {
        tokio::time::timeout(self.timeout, self.request()).await.unwrap_or(Err(FetchError::Timeout))
    }

    async fn request(&self) -> Result<Bytes, FetchError> {
        let mut request = Request::new(Empty::new());
        *request.uri_mut() = self.url.clone();
        let headers = request.headers_mut();
        headers.insert(header::ACCEPT, HeaderValue::from_static(ACCEPT));
        headers.insert(header::USER_AGENT, HeaderValue::from_static(USER_AGENT));
        let answer = self.client.request(request).await.map_err(|error| transport(&error))?;
        if answer.status() != StatusCode::OK {
            return Err(FetchError::Status(answer.status()));
        }
        match Limited::new(answer.into_body(), BODY_BYTES_MAX).collect().await {
            Ok(body) => Ok(body.to_bytes()),
            Err(error) if error.is::<LengthLimitError>() => Err(FetchError::TooLarge),
            Err(error) => Err(transport(&*error)),
        }
    }
}

/// Returns the whole chain of errors, since the outermost one has few details.
fn transport(error: &(dyn Error + 'static)) -> FetchError {
    let causes = std::iter::successors(Some(error), |error| (*error).source());
    FetchError::Transport(causes.map(ToString::to_string).collect::<Vec<_>>().join(": "))
}

/// Executor that lets the shutdown wait for connections.
#[derive(Clone)]
struct Tasks(TaskTracker);

impl<F> hyper::rt::Executor<F> for Tasks
where
    F: Future<Output = ()> + Send + 'static,
{
    fn execute(&self, connection: F) {
        self.0.spawn(connection);
    }
}

/// Upper bound of the document's size: a key takes half a kilobyte, a set a few kilobytes.
const BODY_BYTES_MAX: usize = 256 * 1024;

const ACCEPT: &str = "application/jwk-set+json, application/json";
const USER_AGENT: &str = concat!("wsproxy/", env!("CARGO_PKG_VERSION"));
