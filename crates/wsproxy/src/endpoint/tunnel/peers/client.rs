//! Client of the listeners of other instances: one connection for each request in flight. Knows no lanes.

use std::{io, net::SocketAddr, time::Duration};

use futures_util::future::BoxFuture;
use http::{HeaderValue, Request, Response, Uri};
use hyper::body::Incoming;
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::{
    client::legacy::{
        Client, Error,
        connect::{HttpConnector, dns::Name},
    },
    rt::{TokioIo, TokioTimer},
};
use socket2::SockRef;
use tokio::net::{TcpStream, lookup_host};
use tokio_util::task::TaskTracker;
use tower::{
    ServiceExt as _,
    util::{MapResponse, ServiceFn, service_fn},
};

use super::{HEADERS_MAX, SECRET, body::HeldBody};
use crate::{
    config::{peer::is_private, tunnel::TunnelConfig},
    outbound::Tasks,
    tls,
};

/// Search for the addresses of a name.
type Names = ServiceFn<fn(Name) -> BoxFuture<'static, io::Result<std::vec::IntoIter<SocketAddr>>>>;

/// Connector whose sockets have their options.
type Connector = MapResponse<HttpConnector<Names>, fn(Stream) -> Stream>;

type Stream = TokioIo<TcpStream>;

/// Client of other instances. Cheap to clone.
#[derive(Clone)]
pub(super) struct PeerClient {
    client: Client<HttpsConnector<Connector>, HeldBody>,
    /// Only addresses of private networks are connected to: the registry names them, and there is no TLS that would tell
    /// another machine from an instance.
    is_private: bool,
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
        let is_private = !config.peer_tls && !config.peer_allow_insecure;
        let names: Names = service_fn(if is_private { private_addresses } else { addresses });
        let mut connector = HttpConnector::new_with_resolver(names);
        connector.enforce_http(false);
        connector.set_nodelay(true);
        connector.set_connect_timeout(Some(CONNECT_TIMEOUT));
        // An instance whose machine is lost says nothing, not even to watches.
        connector.set_keepalive(Some(KEEPALIVE));
        connector.set_keepalive_interval(Some(KEEPALIVE_INTERVAL));
        connector.set_keepalive_retries(Some(KEEPALIVE_RETRIES));
        let trust = match &config.peer_ca_file {
            // A certificate of a public authority says nothing of who is an instance.
            Some(path) => tls::private_client_config(path)?,
            None => tls::client_config(None)?,
        };
        let builder = HttpsConnectorBuilder::new().with_tls_config(trust);
        // The registry names the addresses, and must not be able to make this instance speak in plain.
        let builder = if config.peer_tls { builder.https_only() } else { builder.https_or_http() };
        let connector: Connector = connector.map_response(prepared);
        let connector = builder.enable_http1().wrap_connector(connector);
        let mut client = Client::builder(Tasks(tasks.clone()));
        client
            .http1_max_buf_size(BUFFER_BYTES_MAX)
            .http1_max_headers(HEADERS_MAX)
            .pool_max_idle_per_host(IDLE_MAX)
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(IDLE_TIME);
        Ok(Self { client: client.build(connector), is_private, secret })
    }

    /// Returns whether the secret may go to a host. Names are looked at when their addresses are known.
    pub(super) fn may_reach(&self, uri: &Uri) -> bool {
        let host = uri.host().unwrap_or_default();
        let address = host.trim_start_matches('[').trim_end_matches(']').parse();
        !self.is_private || address.map_or(true, is_private)
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

/// Bounds the bytes that wait in the kernel: the clock of the head begins with the last byte that left this process, and the
/// other instance's with the last one that it took.
fn prepared(stream: Stream) -> Stream {
    let _ = SockRef::from(stream.inner()).set_tcp_notsent_lowat(UNSENT_BYTES_MAX);
    stream
}

fn addresses(name: Name) -> BoxFuture<'static, io::Result<std::vec::IntoIter<SocketAddr>>> {
    Box::pin(async move {
        let found: Vec<_> = lookup_host((name.as_str(), 0)).await?.collect();
        Ok(found.into_iter())
    })
}

fn private_addresses(name: Name) -> BoxFuture<'static, io::Result<std::vec::IntoIter<SocketAddr>>> {
    Box::pin(async move {
        let mut found: Vec<_> = addresses(name).await?.collect();
        found.retain(|address| is_private(address.ip()));
        match found.is_empty() {
            true => Err(io::Error::other("the name has no address of a private network")),
            false => Ok(found.into_iter()),
        }
    })
}

/// Time to connect to an instance in the same network.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);

const KEEPALIVE: Duration = Duration::from_secs(10);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(5);
const KEEPALIVE_RETRIES: u32 = 3;

/// Upper bound of the bytes of one connection that wait in this process, in each direction.
const BUFFER_BYTES_MAX: usize = 64 << 10;

/// Upper bound of the bytes of a body that wait in the kernel for their first transmission.
const UNSENT_BYTES_MAX: u32 = 64 << 10;

/// Most idle connections to one instance.
const IDLE_MAX: usize = 8;

/// Time for which an idle connection is kept.
const IDLE_TIME: Duration = Duration::from_secs(30);

#[cfg(test)]
mod tests {
    use super::*;

    fn client(peer_tls: bool, peer_allow_insecure: bool) -> PeerClient {
        let config = TunnelConfig { peer_tls, peer_allow_insecure, ..TunnelConfig::default() };
        PeerClient::new(&config, "secret", &TaskTracker::new()).unwrap()
    }

    #[tokio::test]
    async fn the_secret_stays_in_private_networks_without_tls() {
        for (url, is_private) in [
            ("http://10.0.0.1:8081/", true),
            ("http://127.0.0.1:1/", true),
            ("http://[fd00::1]:1/", true),
            ("http://gw-1.internal/", true),
            ("http://192.0.2.1/", false),
            ("http://[2001:db8::1]:1/", false),
        ] {
            let uri: Uri = url.parse().unwrap();
            assert_eq!(client(false, false).may_reach(&uri), is_private, "{url}");
            assert!(client(true, false).may_reach(&uri) && client(false, true).may_reach(&uri));
        }
        let name = |text: &str| text.parse::<Name>().unwrap();
        assert!(private_addresses(name("localhost")).await.unwrap().next().is_some());
        // A name may be the text of an address.
        assert!(private_addresses(name("192.0.2.1")).await.is_err());
        assert!(addresses(name("192.0.2.1")).await.unwrap().next().is_some());
    }
}
