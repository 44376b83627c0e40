//! HTTP requests of the instance itself, each bounded in time and in the size of its answer. Knows no content.

use std::{error::Error, path::Path, time::Duration};

use bytes::Bytes;
use http::{Request, Response, Uri};
use http_body_util::{BodyExt, Full, LengthLimitError, Limited};
use hyper::body::Incoming;
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::TokioTimer,
};
use tokio_util::task::TaskTracker;

use crate::tls;

/// Client of one server. Follows no redirect.
pub(crate) struct Outbound(Client<HttpsConnector<HttpConnector>, Full<Bytes>>);

/// The reason why there is no answer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum OutboundError {
    #[error("no answer: {0}")]
    Transport(String),
    #[error("no answer in time")]
    Timeout,
    #[error("the answer is larger than {0} bytes")]
    TooLarge(usize),
}

impl Outbound {
    /// Creates the client, without a connection. Connections are driven on `tasks`, and kept for `idle`.
    ///
    /// # Errors
    /// A sentence for the operator: the file cannot be read, or holds no certificate.
    pub(crate) fn new(
        ca_file: Option<&Path>,
        idle: Option<Duration>,
        tasks: &TaskTracker,
    ) -> Result<Self, String> {
        let connector = HttpsConnectorBuilder::new()
            .with_tls_config(tls::client_config(ca_file)?)
            .https_or_http()
            .enable_http1()
            .build();
        let mut client = Client::builder(Tasks(tasks.clone()));
        client.pool_max_idle_per_host(usize::from(idle.is_some()));
        client.pool_timer(TokioTimer::new()).pool_idle_timeout(idle);
        Ok(Self(client.build(connector)))
    }

    /// Sends a request, and returns the head of the answer.
    ///
    /// # Errors
    /// [`OutboundError::Transport`].
    pub(crate) async fn send(
        &self,
        request: Request<Full<Bytes>>,
    ) -> Result<Response<Incoming>, OutboundError> {
        self.0.request(request).await.map_err(|error| transport(&error))
    }
}

/// Reads the body of an answer.
///
/// # Errors
/// [`OutboundError::Transport`], [`OutboundError::TooLarge`].
pub(crate) async fn read(
    answer: Response<Incoming>,
    bytes_max: usize,
) -> Result<Bytes, OutboundError> {
    match Limited::new(answer.into_body(), bytes_max).collect().await {
        Ok(body) => Ok(body.to_bytes()),
        Err(error) if error.is::<LengthLimitError>() => Err(OutboundError::TooLarge(bytes_max)),
        Err(error) => Err(transport(&*error)),
    }
}

/// Bounds the time of a request with its answer.
///
/// # Errors
/// [`OutboundError::Timeout`]. Also the errors of `work`.
pub(crate) async fn within<T, E: From<OutboundError>>(
    time: Duration,
    work: impl Future<Output = Result<T, E>>,
) -> Result<T, E> {
    tokio::time::timeout(time, work).await.unwrap_or_else(|_| Err(OutboundError::Timeout.into()))
}

/// Returns whether third parties can read and change the traffic with a server.
pub(crate) fn is_exposed(url: &Uri) -> bool {
    let host = url.host().unwrap_or_default();
    let address = host.trim_matches(['[', ']']).parse::<std::net::IpAddr>();
    let is_here = address.map_or(host == "localhost", |address| address.is_loopback());
    url.scheme() == Some(&http::uri::Scheme::HTTP) && !is_here
}

/// Returns the whole chain of errors, since the outermost one has few details.
fn transport(error: &(dyn Error + 'static)) -> OutboundError {
    let causes = std::iter::successors(Some(error), |error| (*error).source());
    OutboundError::Transport(causes.map(ToString::to_string).collect::<Vec<_>>().join(": "))
}

/// Executor that lets the shutdown wait for connections.
#[derive(Clone)]
pub(crate) struct Tasks(pub(crate) TaskTracker);

impl<F> hyper::rt::Executor<F> for Tasks
where
    F: Future<Output = ()> + Send + 'static,
{
    fn execute(&self, connection: F) {
        self.0.spawn(connection);
    }
}

/// Name of the gateway in its requests.
pub(crate) const USER_AGENT: &str = concat!("wsproxy/", env!("CARGO_PKG_VERSION"));
