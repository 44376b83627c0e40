//! The tunnel of an instance: lanes of cluster agents, and the requests that go over them.

use std::sync::Arc;

use tokio::time::Instant;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use wsproxy_conn::lane::LaneSettings;
use wsproxy_proto::{
    names::Id,
    tunnel::{
        lane::LaneConfig,
        memory::{Memory, MemoryLimits},
    },
};

use crate::{
    auth::jwt::JwtVerifier,
    config::{Config, tunnel::TunnelConfig},
    core::Core,
    endpoint::tunnel::{
        breaker::{Breakers, Rules},
        cache::Cache,
        clients::Credentials,
        counters::TunnelCounters,
        lanes::{Lanes, Limits},
        patterns::Pattern,
        peers::{PeerCounters, Peers},
        rate::Rates,
        waiting::Room,
    },
    http::listener::tls::TlsListener,
    registry::{
        metrics::collect_lanes,
        tunnel::{LaneCounters, LaneRegistry},
    },
    telemetry::scrape::{Scrape, Source},
};

pub mod access;
pub mod api;
pub mod breaker;
pub mod cache;
pub mod clients;
pub mod connect;
pub mod counters;
pub mod deadlines;
pub mod exchange;
mod gauges;
pub mod headers;
pub mod lanes;
mod pages;
pub mod path;
pub mod patterns;
pub mod peers;
pub mod proxy;
pub mod rate;
pub mod refusal;
mod search;
mod spans;
mod stalls;
pub mod waiting;

/// The tunnel of an instance.
pub struct Tunnel {
    /// Section `[tunnel]` of the configuration.
    config: TunnelConfig,
    credentials: Credentials,
    /// Lanes of this instance.
    lanes: Arc<Lanes>,
    /// Lanes of other instances; `None`: the tunnel is not served.
    peers: Option<Arc<Peers>>,
    /// Requests that wait for a lane.
    room: Arc<Room>,
    breakers: Arc<Breakers>,
    rates: Rates,
    cache: Arc<Cache>,
    /// Patterns of paths that the configuration names.
    patterns: Vec<Pattern>,
    counters: Arc<TunnelCounters>,
    /// Memory that all lanes share.
    memory: Arc<Memory>,
    /// Settings of each lane.
    lane: LaneSettings,
}

impl Tunnel {
    /// Starts the tunnel. Its tasks run on `background` until `end`.
    ///
    /// # Errors
    /// A sentence for the operator: a file of `[jwt]` cannot be used.
    pub(super) fn start(
        core: &Arc<Core>,
        background: &TaskTracker,
        end: &CancellationToken,
    ) -> Result<Arc<Self>, String> {
        let Config { tunnel: config, jwt, endpoints, .. } = &core.config;
        let verifies = endpoints.tunnel && config.verifies_jwt();
        let jwt = verifies
            .then(|| JwtVerifier::new(jwt, &core.jwt_keys, background, end.clone()))
            .transpose()?;
        let limits = MemoryLimits {
            bytes_max: config.memory as u64,
            growth_bytes_max: config.growth as u64,
            window: u32::try_from(config.window).unwrap_or(u32::MAX),
            window_max: u32::try_from(config.window_max).unwrap_or(u32::MAX),
        };
        let of_lanes = Limits {
            lane: config.streams_max as usize,
            cluster: config.cluster_streams_max as usize,
            reconnect_grace: config.reconnect_grace,
        };
        let room = Room::new(waiting::Limits {
            cluster_max: config.cluster_waiting_max,
            max: config.waiting_max,
        });
        let (lanes, waiting) = (Lanes::new(of_lanes), Arc::clone(&room));
        lanes.tell(move |cluster| waiting.changed(cluster));
        let peers = endpoints.tunnel.then(|| {
            let url = peers::url(config);
            let registry = LaneRegistry::start(core.lease(), &core.hub, &core.bus, url);
            let told = Arc::clone(&lanes);
            registry.tell(move |cluster| told.changed(cluster));
            Peers::new(config, registry, background)
        });
        Ok(Arc::new(Self {
            peers: peers.transpose()?,
            config: config.clone(),
            credentials: Credentials::new(config, jwt),
            lanes,
            room,
            breakers: Breakers::new(Rules::new(config)),
            rates: Rates::new(config.requests_per_second),
            cache: Cache::new(&config.cache),
            patterns: config.patterns.iter().map(|rule| Pattern::new(&rule.pattern)).collect(),
            counters: Arc::default(),
            memory: Memory::new(limits),
            lane: lane_settings(config, &core.server_id),
        }))
    }

    /// Puts the values of another configuration into force that a reload replaces: the tokens.
    pub(super) fn reload(&self, config: &Config) {
        self.credentials.reload(&config.tunnel);
    }

    /// Opens the listener for other instances, where the configuration has one.
    ///
    /// # Errors
    /// Another process listens there, or the address does not belong to this machine.
    pub(super) fn listen(
        self: &Arc<Self>,
        core: &Arc<Core>,
        tls: Option<Arc<TlsListener>>,
        sockets_max: usize,
    ) -> std::io::Result<()> {
        match &self.peers {
            Some(peers) => peers::listen(peers, self, core, tls, sockets_max),
            None => Ok(()),
        }
    }

    /// Returns whether a lane of a cluster at another instance is expected.
    fn expects(&self, cluster: &Id) -> bool {
        let grace = self.config.reconnect_grace;
        self.peers.as_ref().is_some_and(|peers| peers.expects(cluster, grace))
    }

    /// Removes the lanes of this instance from the registry. They must have ended by then.
    pub(super) async fn close(&self) {
        if let Some(peers) = &self.peers {
            peers.registry.close().await;
        }
    }

    /// Drains all lanes, until `deadline` at the latest.
    pub(super) fn drain(&self, deadline: Instant) {
        let left = deadline.saturating_duration_since(Instant::now());
        self.lanes.drain(self.config.drain.min(left).into());
        if let Some(peers) = &self.peers {
            peers.close();
        }
    }
}

impl Source for Tunnel {
    fn collect(&self, scrape: &mut Scrape) {
        self.counters.collect(scrape);
        gauges::collect(self, scrape);
        if let Some(peers) = &self.peers {
            peers.collect(scrape);
        } else {
            collect_lanes(&LaneCounters::default(), 0, scrape);
            peers::collect(&PeerCounters::default(), scrape);
        }
    }
}

fn lane_settings(config: &TunnelConfig, server_id: &str) -> LaneSettings {
    let micros = |time: std::time::Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
    let protocol = LaneConfig {
        streams_max: config.streams_max,
        ping: micros(config.ping),
        silence_max: micros(config.ping_timeout),
        drain_ms: u32::try_from(config.drain.as_millis()).unwrap_or(u32::MAX),
        instance: server_id.to_owned(),
        build: env!("CARGO_PKG_VERSION").to_owned(),
        ..LaneConfig::default()
    };
    LaneSettings { protocol, write_timeout: config.ping_timeout, ..LaneSettings::default() }
}
