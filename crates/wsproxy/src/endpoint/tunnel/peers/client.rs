//! Client of the listeners of other instances: one connection for each request in flight. Knows no lanes.

use std::time::Duration;

use http::{HeaderValue, Request, Response};
use hyper::body::Incoming;
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::{
    client::legacy::{Client, Error, connect::HttpConnector},
    rt::TokioTimer,
};
use tokio_util::task::TaskTracker;

use super::{SECRET, body::HeldBody};
use crate::{config::tunnel::TunnelConfig, outbound::Tasks, tls};

/// Client of other instances. Cheap to clone.
#[derive(Clone)]
pub(super) struct PeerClient {
    client: Client<HttpsConnector<HttpConnector>, HeldBody>,
    /// Value of [`SECRET`].
    secret: HeaderValue,
}

impl PeerClient {
    /// Creates the client, without a connection.
    ///
    /// # Errors
    /// A sentence for the operator: the file of authorities cannot be read, or holds no certificate.
    pub(super) fn new(
        config: &TunnelConfig,
        secret: &str,
        tasks: &TaskTracker,
    ) -> Result<Self, String> {
        let mut secret = HeaderValue::try_from(format!("Bearer {secret}"))
            .map_err(|_| "tunnel.peer_secret has bytes that no header may have".to_owned())?;
        secret.set_sensitive(true);
        let mut connector = HttpConnector::new();
        connector.enforce_http(false);
        connector.set_nodelay(true);
        connector.set_connect_timeout(Some(CONNECT_TIMEOUT));
        // An instance whose machine is lost says nothing, not even to watches.
        connector.set_keepalive(Some(KEEPALIVE));
        connector.set_keepalive_interval(Some(KEEPALIVE_INTERVAL));
        connector.set_keepalive_retries(Some(KEEPALIVE_RETRIES));
        let builder = HttpsConnectorBuilder::new()
            .with_tls_config(tls::client_config(config.peer_ca_file.as_deref())?);
        // The registry names the addresses, and must not be able to make this instance speak in plain.
        let builder = if config.peer_tls { builder.https_only() } else { builder.https_or_http() };
        let connector = builder.enable_http1().wrap_connector(connector);
        let mut client = Client::builder(Tasks(tasks.clone()));
        client
            .http1_max_buf_size(BUFFER_BYTES_MAX)
            .pool_max_idle_per_host(IDLE_MAX)
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(IDLE_TIME);
        Ok(Self { client: client.build(connector), secret })
    }

    /// Sends a request with the secret, and returns the head of the answer.
    ///
    /// # Errors
    /// The connection failed; [`Error::is_connect`]: before the request was sent.
    pub(super) async fn send(
        &self,
        mut request: Request<HeldBody>,
    ) -> Result<Response<Incoming>, Error> {
        request.headers_mut().insert(SECRET, self.secret.clone());
        self.client.request(request).await
    }
}

/// Time to connect to an instance in the same network.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);

const KEEPALIVE: Duration = Duration::from_secs(10);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(5);
const KEEPALIVE_RETRIES: u32 = 3;

/// Upper bound of the bytes of one connection that wait in this process, in each direction.
const BUFFER_BYTES_MAX: usize = 64 << 10;

/// Most idle connections to one instance.
const IDLE_MAX: usize = 8;

/// Time for which an idle connection is kept.
const IDLE_TIME: Duration = Duration::from_secs(30);
