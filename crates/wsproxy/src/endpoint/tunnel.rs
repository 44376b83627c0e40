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
    config::{Config, tunnel::TunnelConfig},
    core::Core,
    telemetry::scrape::{Scrape, Source},
};

pub mod access;
pub mod breaker;
pub mod cache;
pub mod counters;
pub mod headers;
pub mod path;
pub mod patterns;
pub mod rate;
pub mod refusal;
pub mod waiting;

/// The tunnel of an instance.
#[derive(Debug)]
pub struct Tunnel {
    /// Whether this instance serves the tunnel.
    pub is_served: bool,
    /// Memory that all lanes share.
    pub memory: Arc<Memory>,
    /// Settings of each lane.
    pub lane: LaneSettings,
}

impl Tunnel {
    /// Starts the tunnel. Its tasks run on `background` until `end`.
    pub(super) fn start(
        core: &Arc<Core>,
        _background: &TaskTracker,
        _end: &CancellationToken,
    ) -> Arc<Self> {
        let config = &core.config.tunnel;
        let limits = MemoryLimits {
            bytes_max: config.memory as u64,
            growth_bytes_max: config.growth as u64,
            window: u32::try_from(config.window).unwrap_or(u32::MAX),
            window_max: u32::try_from(config.window_max).unwrap_or(u32::MAX),
        };
        Arc::new(Self {
            is_served: core.config.endpoints.tunnel,
            memory: Memory::new(limits),
            lane: lane_settings(config, &core.server_id),
        })
    }

    /// Puts the values of another configuration into force that a reload replaces: the tokens.
    #[expect(clippy::unused_self, reason = "lanes and clients have no table yet")]
    pub(super) const fn reload(&self, _config: &Config) {}

    /// Drains all lanes, until `deadline` at the latest.
    #[expect(clippy::unused_async, reason = "there are no lanes yet")]
    pub(super) async fn close(&self, _deadline: Instant) {}
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
