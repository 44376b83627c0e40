//! Configuration of an agent in the types that it needs; knows neither files of settings nor flags.

use std::{sync::Arc, time::Duration};

use http::{HeaderValue, uri::PathAndQuery};
use rustls::{ClientConfig, pki_types::ServerName};
use wsproxy_conn::lane::LaneSettings;
use wsproxy_proto::{names::Id, tunnel::memory::MemoryLimits};

use crate::pauses::Pauses;
pub use crate::{credential::TokenSource, paths::Paths};

/// Configuration of an agent.
#[derive(Debug, Clone)]
pub struct AgentConfig {
    /// The gateway.
    pub gateway: GatewayConfig,
    /// Id of the agent, among those of its cluster.
    pub agent_id: Id,
    /// Rules for the requests that are served.
    pub service: Service,
    /// The HTTP service that answers them.
    pub upstream: UpstreamConfig,
    /// Probes of the upstream; `None`: there are none, and the gateway is told nothing.
    pub health: Option<HealthConfig>,
    /// Port for metrics; `None`: there is none.
    pub metrics_port: Option<u16>,
    /// Time that streams get which are in flight when the agent stops.
    pub drain: Duration,
    /// Waits between two lanes.
    pub pauses: Pauses,
    /// Settings of a lane.
    pub lane: LaneSettings,
    /// Bounds of the memory of all streams.
    pub memory: MemoryLimits,
}

/// Place and credential of the gateway.
#[derive(Debug, Clone)]
pub struct GatewayConfig {
    /// Name or address.
    pub host: String,
    /// TCP port.
    pub port: u16,
    /// Configuration of TLS; `None`: not encrypted.
    pub tls: Option<Arc<ClientConfig>>,
    /// Value of `Host`.
    pub host_header: HeaderValue,
    /// Path of the handshake.
    pub path: PathAndQuery,
    /// Credential. It is read again for every lane.
    pub token: TokenSource,
    /// Time for TCP, TLS and the handshake together.
    pub timeout: Duration,
}

/// Rules for the requests that an agent serves.
#[derive(Debug, Clone)]
pub struct Service {
    /// Id of the cluster.
    pub cluster: String,
    /// Paths that are served.
    pub paths: Paths,
    /// Whether the upstream sees the `Host` of the client in place of its own.
    pub preserve_host: bool,
    /// Whether answers are compressed on their way to the gateway.
    pub compresses: bool,
    /// The upstream's own `Host`.
    pub host: HeaderValue,
}

/// Place and credentials of the upstream.
#[derive(Debug, Clone)]
pub struct UpstreamConfig {
    /// Name or address.
    pub host: String,
    /// TCP port.
    pub port: u16,
    /// TLS; `None`: not encrypted.
    pub tls: Option<UpstreamTls>,
    /// Credential that every request carries.
    pub token: Option<TokenSource>,
}

/// TLS to the upstream.
#[derive(Debug, Clone)]
pub struct UpstreamTls {
    /// Trusted authorities, and the agent's own certificate.
    pub client: Arc<ClientConfig>,
    /// Name that the upstream's certificate must have.
    pub name: ServerName<'static>,
}

/// Probes of the upstream.
#[derive(Debug, Clone)]
pub struct HealthConfig {
    /// Path that is asked; `None`: only a connection is opened.
    pub path: Option<PathAndQuery>,
    /// Interval of the probes.
    pub interval: Duration,
}
