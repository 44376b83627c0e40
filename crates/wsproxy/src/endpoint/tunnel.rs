//! The tunnel of an instance: lanes of cluster agents, and the requests that go over them.

use std::sync::Arc;

use tokio::time::Instant;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use wsproxy_conn::lane::LaneSettings;
use wsproxy_proto::tunnel::{
    lane::LaneConfig,
    memory::{Memory, MemoryLimits},
};

use crate::{
    auth::jwt::JwtVerifier,
    config::{Config, tunnel::TunnelConfig},
    core::Core,
    endpoint::tunnel::{
        clients::Credentials,
        lanes::{Lanes, Limits},
    },
    telemetry::scrape::{Scrape, Source},
};

pub mod clients;
pub mod connect;
pub mod deadlines;
pub mod exchange;
pub mod headers;
pub mod lanes;
pub mod path;
pub mod proxy;
pub mod refusal;

/// The tunnel of an instance.
pub struct Tunnel {
    /// Section `[tunnel]` of the configuration.
    config: TunnelConfig,
    credentials: Credentials,
    /// Lanes of this instance.
    lanes: Arc<Lanes>,
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
        Ok(Arc::new(Self {
            config: config.clone(),
            credentials: Credentials::new(config, jwt),
            lanes: Lanes::new(of_lanes),
            memory: Memory::new(limits),
            lane: lane_settings(config, &core.server_id),
        }))
    }

    /// Puts the values of another configuration into force that a reload replaces: the tokens.
    pub(super) fn reload(&self, config: &Config) {
        self.credentials.reload(&config.tunnel);
    }

    /// Drains all lanes, until `deadline` at the latest.
    pub(super) fn drain(&self, deadline: Instant) {
        let left = deadline.saturating_duration_since(Instant::now());
        self.lanes.drain(self.config.drain.min(left).into());
    }
}

impl Source for Tunnel {
    fn collect(&self, _scrape: &mut Scrape) {}
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
