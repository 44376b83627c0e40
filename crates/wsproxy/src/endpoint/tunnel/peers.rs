//! Requests for lanes at other instances: which instance gets one, and the listener for those that others bring.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

use parking_lot::Mutex;
use secrecy::ExposeSecret as _;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::{debug, info, warn};
use wsproxy_proto::names::Id;

use crate::{
    config::tunnel::TunnelConfig,
    core::{Core, sockets::Sockets},
    endpoint::tunnel::{
        Tunnel,
        peers::{client::PeerClient, listener::PeerService},
    },
    http::listener::{
        HeadLimits, Listening,
        open::{Listener, Place},
        tls::TlsListener,
    },
    registry::tunnel::{LaneRegistry, RemoteLane},
    telemetry::{
        counter::Counter,
        scrape::{Scrape, Section, Source},
    },
};

pub(super) mod body;
mod client;
pub(super) mod forward;
mod listener;

/// The way to lanes at other instances, and from them.
pub struct Peers {
    /// Lanes of all instances.
    pub registry: Arc<LaneRegistry>,
    /// Client of other instances; `None`: `tunnel.peer_bind` is not set, or the instance ends.
    client: Mutex<Option<PeerClient>>,
    /// Number of the next choice among equal lanes.
    turn: AtomicUsize,
    /// Cancelled when no further socket of another instance is accepted.
    accepting: CancellationToken,
    /// Counters that the metrics read.
    pub counters: PeerCounters,
}

/// Counters of requests between instances.
#[derive(Debug, Default)]
pub struct PeerCounters {
    /// Requests that another instance answered.
    pub forwarded: Counter,
    /// Attempts that found no lane at the instance that the registry named, or did not reach it.
    pub missed: Counter,
    /// Requests of other instances.
    pub taken: Counter,
    /// Requests to the listener without the secret.
    pub refused: Counter,
}

impl Peers {
    /// Starts the client. Its connections are driven on `tasks`.
    ///
    /// # Errors
    /// A sentence for the operator: the file of authorities cannot be used.
    pub(super) fn new(
        config: &TunnelConfig,
        registry: Arc<LaneRegistry>,
        tasks: &TaskTracker,
    ) -> Result<Arc<Self>, String> {
        let client = match (config.peer_bind, &config.peer_secret) {
            (Some(_), Some(secret)) => {
                Some(PeerClient::new(config, secret.expose_secret(), tasks)?)
            }
            _ => None,
        };
        Ok(Arc::new(Self {
            registry,
            client: Mutex::new(client),
            turn: AtomicUsize::new(0),
            accepting: CancellationToken::new(),
            counters: PeerCounters::default(),
        }))
    }

    /// Takes no further connection of another instance, and ends those that are idle.
    pub(super) fn close(&self) {
        self.accepting.cancel();
        self.client.lock().take();
    }

    /// Returns whether a cluster has lanes at other instances, or lost its last one less than `grace` ago.
    pub(super) fn expects(&self, cluster: &Id, grace: Duration) -> bool {
        self.registry.known_elsewhere(cluster).is_some_and(|lanes| !lanes.is_empty())
            || self.registry.lost_elsewhere_for(cluster).is_some_and(|ago| ago < grace)
    }

    /// Chooses among lanes at other instances, without those that were tried.
    fn choose<'l>(&self, lanes: &'l [RemoteLane], tried: &[RemoteLane]) -> Option<&'l RemoteLane> {
        let open = || lanes.iter().filter(|lane| is_open(lane) && !tried.contains(lane));
        let count = open().count();
        let turn = self.turn.fetch_add(1, Relaxed);
        (count > 0).then(|| open().nth(turn % count)).flatten()
    }
}

/// Returns whether a lane takes requests of other instances.
fn is_open(lane: &RemoteLane) -> bool {
    !lane.record.draining && lane.record.peer.is_some()
}

impl Source for Peers {
    fn collect(&self, scrape: &mut Scrape) {
        self.registry.collect(scrape);
        collect(&self.counters, scrape);
    }
}

/// Adds the numbers of requests between instances. An instance without the tunnel shows zeros.
pub(super) fn collect(counters: &PeerCounters, scrape: &mut Scrape) {
    scrape.section(Section::Families);
    for (name, help, counter) in [
        ("tunnel_forwarded", "Requests that another instance answered", &counters.forwarded),
        (
            "tunnel_forwards_missed",
            "Attempts that reached no lane at the instance that the registry named",
            &counters.missed,
        ),
        ("tunnel_peer_requests", "Requests of other instances", &counters.taken),
        (
            "tunnel_peer_refused",
            "Requests to the listener for instances without the secret",
            &counters.refused,
        ),
    ] {
        scrape.counter(name, help, counter.value());
    }
}

/// Returns the URL at which other instances reach this one; `None`: `tunnel.peer_bind` is not set.
pub(super) fn url(config: &TunnelConfig) -> Option<Arc<str>> {
    let bind = config.peer_bind?;
    let scheme = if config.peer_tls { "https" } else { "http" };
    let own = || format!("{scheme}://{bind}");
    Some(config.peer_url.clone().unwrap_or_else(own).into())
}

/// Opens the listener for other instances, where `tunnel.peer_bind` is set.
///
/// # Errors
/// Another process listens there, or the address does not belong to this machine.
pub(super) fn listen(
    peers: &Arc<Peers>,
    tunnel: &Arc<Tunnel>,
    core: &Arc<Core>,
    tls: Option<Arc<TlsListener>>,
    sockets_max: usize,
) -> std::io::Result<()> {
    let config = &core.config.tunnel;
    let (Some(bind), Some(secret)) = (config.peer_bind, &config.peer_secret) else {
        warn_of_others(peers, core);
        return Ok(());
    };
    let listener = Listener::open(&Place::Tcp(bind), false)?;
    let listening = Listening {
        sockets: Sockets::new(sockets_max),
        tls: tls.filter(|_| config.peer_tls),
        proxy_protocol: false,
        header_timeout: HEADER_TIMEOUT,
        head: HeadLimits {
            bytes: 2 * core.config.server.header_bytes_max + ADDED_BYTES_MAX,
            headers: HEADERS_MAX,
        },
        accepting: peers.accepting.clone(),
        answering: peers.accepting.clone(),
    };
    let service = PeerService::new(peers, tunnel, core, secret.expose_secret());
    info!(address = %bind, tls = config.peer_tls, "Listening for other instances.");
    core.tasks.spawn(crate::http::listener::run(listener, service, listening));
    Ok(())
}

/// Warns if there are other instances, whose lanes this one does not reach.
fn warn_of_others(peers: &Arc<Peers>, core: &Arc<Core>) {
    let (peers, closing) = (Arc::clone(peers), peers.accepting.clone());
    core.tasks.spawn(async move {
        let look = async {
            loop {
                match peers.registry.has_peers().await {
                    Ok(true) => {
                        return warn!(
                            "There are other instances, but tunnel.peer_bind is not set: requests for agents that are \
                             connected there are answered with 503."
                        );
                    }
                    Ok(false) => return,
                    Err(error) => debug!(%error, "Other instances cannot be looked for now."),
                }
                tokio::time::sleep(LOOK_AGAIN).await;
            }
        };
        tokio::select! {
            () = closing.cancelled() => {}
            () = look => {}
        }
    });
}

/// Header with the secret of instances.
const SECRET: &str = "x-wsproxy-peer";

/// Header with the time that is left for the head of an answer, in milliseconds.
const HEAD_MS: &str = "x-wsproxy-head-ms";

/// Header with the time that a request may still wait for a lane, in milliseconds.
const WAIT_MS: &str = "x-wsproxy-wait-ms";

/// Header of an answer that no instance may keep, though nothing else in its head says so.
pub(super) const UNKEPT: &str = "x-wsproxy-unkept";

/// Header that says that the client itself waits for `100`.
const EXPECT: &str = "x-wsproxy-expect";

/// Header with the retries that an instance made before it brought the request.
const RETRIES: &str = "x-wsproxy-retries";

/// Start of the paths of the listener.
const PATH: &str = "/_peer/";

/// Time for which a connection of another instance may be idle: longer than that instance keeps it, so that no request
/// meets its end.
const HEADER_TIMEOUT: Duration = Duration::from_secs(60);

/// Upper bound of the bytes that an instance adds to a head, besides a second copy of its host.
const ADDED_BYTES_MAX: usize = 8 << 10;

/// Most headers of a message between instances: those of any client or agent, and the ones that are added.
const HEADERS_MAX: usize = 256;

const LOOK_AGAIN: Duration = Duration::from_secs(2);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_url_is_the_address_unless_it_is_named() {
        let mut config = TunnelConfig::default();
        assert_eq!(url(&config), None);
        config.peer_bind = Some(([10, 0, 0, 1], 8081).into());
        assert_eq!(url(&config).as_deref(), Some("http://10.0.0.1:8081"));
        config.peer_tls = true;
        assert_eq!(url(&config).as_deref(), Some("https://10.0.0.1:8081"));
        config.peer_url = Some("https://gw-1.internal:8081".into());
        assert_eq!(url(&config).as_deref(), Some("https://gw-1.internal:8081"));
    }
}
