//! The configuration in the types that the code needs; knows nothing of files and environments.

pub mod agents;
pub mod api_key;
pub mod change;
mod check;
pub mod database;
pub mod echo;
pub mod endpoints;
pub mod environment;
pub mod events;
pub mod host;
pub mod keys;
mod kind;
pub mod load;
pub mod origin;
pub mod peer;
pub mod problem;
pub mod render;
pub mod rooms;
mod rule;
pub mod sessions;
mod tables;
pub mod traces;
pub mod tunnel;
pub mod tunnel_agent;

use std::{net::IpAddr, time::Duration};

use jsonwebtoken::Algorithm;
use secrecy::SecretString;

use self::{
    agents::AgentsConfig,
    api_key::ApiKey,
    database::{AuditConfig, DatabaseConfig},
    endpoints::EndpointsConfig,
    events::EventsConfig,
    kind::{List, Raw, ValueKind},
    origin::OriginRule,
    peer::TrustedProxy,
    rooms::RoomsConfig,
    sessions::SessionsConfig,
    traces::TracesConfig,
    tunnel::TunnelConfig,
    tunnel_agent::TunnelAgentConfig,
};

/// The configuration of an instance, with a field for each section of the file.
#[derive(Debug, Clone, Default)]
pub struct Config {
    /// `[server]`
    pub server: ServerConfig,
    /// `[admin]`
    pub admin: AdminConfig,
    /// `[tls]`
    pub tls: TlsConfig,
    /// `[redis]`
    pub redis: RedisConfig,
    /// `[limits]`
    pub limits: LimitsConfig,
    /// `[heartbeat]`
    pub heartbeat: HeartbeatConfig,
    /// `[rate_limit]`
    pub rate_limit: RateLimit,
    /// `[compression]`
    pub compression: CompressionConfig,
    /// `[log]`
    pub log: LogConfig,
    /// `[traces]`
    pub traces: TracesConfig,
    /// `[endpoints]`
    pub endpoints: EndpointsConfig,
    /// `[sessions]`
    pub sessions: SessionsConfig,
    /// `[events]`
    pub events: EventsConfig,
    /// `[rooms]`
    pub rooms: RoomsConfig,
    /// `[agents]`
    pub agents: AgentsConfig,
    /// `[tunnel]`
    pub tunnel: TunnelConfig,
    /// `[tunnel_agent]`
    pub tunnel_agent: TunnelAgentConfig,
    /// `[database]`
    pub database: DatabaseConfig,
    /// `[audit]`
    pub audit: AuditConfig,
    /// `[history]`
    pub history: HistoryConfig,
    /// `[sse]`
    pub sse: SseConfig,
    /// `[jwt]`
    pub jwt: JwtConfig,
    /// `[api]`
    pub api: ApiConfig,
}

/// `[server]`: the clients' port, handshakes, and the end of the instance.
#[derive(Debug, Clone)]
pub struct ServerConfig {
    /// Address to listen on.
    pub bind: IpAddr,
    /// Port to listen on; 0 takes a free one.
    pub port: u16,
    /// Unix socket to listen on in place of `bind` and `port`.
    pub unix: Option<std::path::PathBuf>,
    /// Permissions of the unix socket's file.
    pub unix_mode: u32,
    /// Share the port with other processes, or take the unix socket over from one.
    pub reuse_port: bool,
    /// Name of the instance; `None`: a new id at every start.
    pub server_id: Option<String>,
    /// Worker threads; 0: one per core.
    pub threads: usize,
    /// The process ends at the latest this long after the first signal.
    pub shutdown_timeout: Duration,
    /// Time after the signal in which `/ready` says 503 and clients are still accepted: load balancers need time to
    /// notice.
    pub drain_delay: Duration,
    /// Time over which connections are closed at the end, so that clients do not all come back at once.
    pub drain_spread: Duration,
    /// Deadline for all bus and store work of one handshake.
    pub handshake_timeout: Duration,
    /// A client must have sent its request head within this time.
    pub header_timeout: Duration,
    /// Largest request head, in bytes.
    pub header_bytes_max: usize,
    /// Proxies whose `X-Forwarded-For` or `Forwarded` is used as the client's address.
    pub trusted_proxies: Vec<TrustedProxy>,
    /// These proxies begin each connection with a header of the PROXY protocol.
    pub proxy_protocol: bool,
    /// Answer only requests whose host is this machine. No key sets this, only `wsproxy dev`.
    pub local_hosts_only: bool,
    /// The header of a trusted proxy that names the client.
    pub forwarded_header: ForwardedHeader,
    /// Browser origins that may connect, `https://app.example` or `https://*.example`; `*`: any. Empty: any.
    pub allowed_origins: Vec<OriginRule>,
}

/// The header of a trusted proxy that names the client.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ForwardedHeader {
    /// Either; if both are present they must name the same client.
    Auto,
    /// `X-Forwarded-For`, whatever `Forwarded` says.
    XForwardedFor,
    /// `Forwarded`, whatever `X-Forwarded-For` says.
    Forwarded,
}

/// `[admin]`: health, metrics and API on a port of their own.
#[derive(Debug, Clone, Default)]
pub struct AdminConfig {
    /// Address of `port`; `None`: `server.bind`.
    pub bind: Option<IpAddr>,
    /// Port for admin routes and API; `None`: the clients' port serves them.
    pub port: Option<u16>,
}

/// `[tls]`: encryption of the listeners; none without a certificate.
#[derive(Debug, Clone)]
pub struct TlsConfig {
    /// File with the certificate and those of its issuers, as PEM.
    pub certificate: Option<std::path::PathBuf>,
    /// File with the key of the certificate, as PEM.
    pub key: Option<std::path::PathBuf>,
    /// The admin port encrypts too.
    pub admin: bool,
    /// Handshakes that may be under way at once on one port.
    pub handshakes_max: usize,
}

impl Config {
    /// Returns whether an endpoint that is on takes JSON Web Tokens, so that the keys of `[jwt]` are needed.
    #[must_use]
    pub fn verifies_jwt(&self) -> bool {
        let EndpointsConfig { events, rooms, tunnel, .. } = self.endpoints;
        events || rooms || (tunnel && self.tunnel.verifies_jwt())
    }
}

impl TlsConfig {
    /// Returns the files of the certificate and of its key.
    #[must_use]
    pub fn files(&self) -> Option<(&std::path::Path, &std::path::Path)> {
        self.certificate.as_deref().zip(self.key.as_deref())
    }
}

/// `[redis]`: the bus. Without a URL the embedded one is used.
#[derive(Debug, Clone)]
pub struct RedisConfig {
    /// URL, `redis://`, `rediss://`, `unix://`, `redis+sentinel://`, `rediss+sentinel://`, `redis+cluster://` or
    /// `rediss+cluster://`; secret, since it may hold a
    /// password. `None`: embedded bus.
    pub url: Option<SecretString>,
    /// User at the sentinels; `None`: `default`.
    pub sentinel_username: Option<String>,
    /// Password at the sentinels; `None`: no login there.
    pub sentinel_password: Option<SecretString>,
    /// Prefix of every key and channel, followed by a colon.
    pub channel_prefix: String,
    /// Time to connect and authenticate.
    pub connect_timeout: Duration,
    /// A connection to Redis that does not answer a request for this long is replaced.
    pub response_timeout: Duration,
    /// Interval of the probes: messages of the instance that must come back over each connection.
    pub probe_interval: Duration,
    /// Upper bound of messages that wait to be published; beyond it reading from clients pauses.
    pub publish_queue_bytes: usize,
    /// File with further CA certificates (PEM) for `rediss://`.
    pub ca_file: Option<std::path::PathBuf>,
}

/// `[limits]`: limits of one connection and of the instance.
#[derive(Debug, Clone)]
pub struct LimitsConfig {
    /// Connections per instance; 0: as many as descriptors allow.
    pub max_connections: usize,
    /// Largest message, before and after inflating.
    pub max_message_bytes: usize,
    /// Most fragments of one message.
    pub max_fragments: u32,
    /// Upper bound of data that waits for one client.
    pub send_buffer_bytes: usize,
    /// Upper bound of data that waits for all clients; beyond it the connection with most data is closed.
    pub send_buffers_total_bytes: usize,
    /// Messages per second and connection; 0: no limit.
    pub messages_per_second: u32,
    /// Messages that may come at once.
    pub message_burst: u32,
    /// Upper bound of the embedded store.
    pub store_bytes: usize,
    /// Share of the embedded store for logs and token streams.
    pub store_logs_share: f64,
    /// Bytes per second and connection, inflated ones included; 0: no limit.
    pub bytes_per_second: usize,
    /// Bytes that may come at once.
    pub bytes_burst: usize,
    /// Connections of one user of the event endpoint at this instance; 0: no limit.
    pub connections_per_user: usize,
    /// Connections of one session at this instance; 0: no limit.
    pub connections_per_session: usize,
    /// Resumes of one session or user per second; 0: no limit.
    pub resumes_per_second: u32,
}

/// `[heartbeat]`: detection of dead and idle connections.
#[derive(Debug, Clone)]
pub struct HeartbeatConfig {
    /// A ping is sent when nothing arrived for this long.
    pub interval: Duration,
    /// A connection from which nothing arrived for this long is closed with 4002.
    pub timeout: Duration,
    /// An operator set `timeout`, so that it holds for families with a default of their own too.
    pub timeout_is_set: bool,
    /// A connection without data messages for this long is closed with 4003; zero: never.
    pub idle_timeout: Duration,
}

/// `[rate_limit]`: connection attempts per client address.
#[derive(Debug, Clone)]
pub struct RateLimit {
    /// Attempts per window; 0: no limit.
    pub max_requests: u32,
    /// An operator set `max_requests`, so that it holds for families with a default of their own too.
    pub max_requests_is_set: bool,
    /// Length of the window.
    pub window: Duration,
}

/// `[compression]`: permessage-deflate.
#[derive(Debug, Clone)]
pub struct CompressionConfig {
    /// Compress where the client offers it.
    pub enabled: bool,
    /// Messages shorter than this are sent as they are.
    pub threshold_bytes: usize,
    /// Level from 1 (fast) to 9 (small).
    pub level: u32,
    /// Let clients keep their compression context between messages: costs up to 48 KB a connection.
    pub client_context_takeover: bool,
}

/// `[log]`
#[derive(Debug, Clone)]
pub struct LogConfig {
    /// A level, or directives such as `info,wsproxy::bus=debug`.
    pub level: String,
    /// Format of the lines.
    pub format: LogFormat,
    /// Interval of the line that sums up the instance; zero: there is none.
    pub summary_interval: Duration,
}

/// Format of log lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    /// Pretty where standard error is a terminal, else JSON.
    Auto,
    /// A JSON object for each line.
    Json,
    /// Shorter lines for people.
    Pretty,
}

/// The place of positions in messages of the history.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EventIds {
    /// JSON objects carry their position as first member `event_id`.
    Json,
    /// Only the envelope of the subprotocol `wsproxy.id.v1` carries positions.
    None,
}

/// `[history]`: bounds of the logs; workers that publish by script must use the same values.
#[derive(Debug, Clone)]
pub struct HistoryConfig {
    /// Most entries of a log.
    pub entries_max: u64,
    /// Most bytes of a log.
    pub bytes_max: usize,
    /// Lifetime of an entry, and of a log after its last entry.
    pub ttl: Duration,
}

impl HistoryConfig {
    /// Returns the limits in the type of the bus.
    #[must_use]
    pub const fn limits(&self) -> wsproxy_proto::history::HistoryLimits {
        let Self { entries_max, bytes_max, ttl } = *self;
        wsproxy_proto::history::HistoryLimits { entries_max, bytes_max: bytes_max as u64, ttl }
    }
}

/// `[sse]`: server-sent events at the URLs of sessions and events.
#[derive(Debug, Clone)]
pub struct SseConfig {
    /// Answer `Accept: text/event-stream`.
    pub enabled: bool,
    /// A comment is sent after this long without other data.
    pub keep_alive: Duration,
    /// Pause that clients are told before they reconnect.
    pub retry: Duration,
    /// Compress where the client accepts gzip.
    pub compression: bool,
}

/// Treatment of a client's message when no worker listens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NoReceiver {
    /// The message is ignored.
    Ignore,
    /// The client gets an `error` message with code `no_receiver`.
    Error,
    /// The message is kept in the stream `{session:<id>:up}:log`.
    Queue,
}

/// Framing of messages from workers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DownFrames {
    /// Text where the payload is UTF-8, else binary.
    Auto,
    /// Always text; a payload that is not UTF-8 is dropped, counted and logged.
    Text,
    /// Always binary.
    Binary,
}

/// Treatment of clients after a loss of the bus.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnBusLoss {
    /// Clients get one `bus_recovered` message when the bus is back.
    Notice,
    /// Clients are closed with 1012, so that they reconnect.
    Close,
}

/// `[jwt]`: the JSON Web Tokens that are accepted; none without a key.
#[derive(Debug, Clone)]
pub struct JwtConfig {
    /// The secret that HS algorithms share with the issuer.
    pub secret_key: Option<SecretString>,
    /// Accepted algorithms. The header of a token chooses only among those that fit the key.
    pub algorithms: Vec<Algorithm>,
    /// The issuer's public key, as PEM.
    pub public_key_file: Option<std::path::PathBuf>,
    /// URL of the issuer's public keys (JWKS).
    pub jwks_url: Option<String>,
    /// Interval of fetching these keys; a token signed with an unknown key causes a fetch at once.
    pub jwks_refresh: Duration,
    /// Time for one fetch.
    pub jwks_timeout: Duration,
    /// File with further CA certificates (PEM) for `jwks_url`.
    pub ca_file: Option<std::path::PathBuf>,
    /// Accepted audiences: a token must name one of them in `aud`. Empty: tokens with an audience are refused.
    pub audience: Vec<String>,
    /// Required issuer of tokens (`iss`); `None`: any issuer that has the key.
    pub issuer: Option<String>,
    /// Tolerated difference of the issuer's clock.
    pub leeway: Duration,
    /// The claim that names the user.
    pub user_claim: String,
    /// Refuse tokens that never expire.
    pub require_exp: bool,
    /// Required type in the header of tokens (`typ`); `None`: any type.
    pub typ: Option<String>,
}

impl JwtConfig {
    /// Returns whether there is a key that can verify tokens.
    #[must_use]
    pub const fn has_key(&self) -> bool {
        self.secret_key.is_some() || self.public_key_file.is_some() || self.jwks_url.is_some()
    }

    /// Returns the leeway in seconds, rounded up, since tokens count in seconds.
    #[must_use]
    pub const fn leeway_seconds(&self) -> u64 {
        self.leeway.as_secs() + (self.leeway.subsec_nanos() > 0) as u64
    }
}

/// `[api]`: HTTP for workers without Redis.
#[derive(Debug, Clone, Default)]
pub struct ApiConfig {
    /// Bearer keys with all scopes and no name. Without any key the API answers every call with 401.
    pub keys: Vec<SecretString>,
    /// The file from which `keys` were read, if any. No key of the configuration sets this.
    pub keys_file: Option<std::path::PathBuf>,
    /// Bearer keys with a name and scopes.
    pub key: Vec<ApiKey>,
}

/// Reads the keys of the worker API from the text of a file; `None` if a part of it is no key.
pub(crate) fn read_api_keys(text: &str) -> Option<Vec<SecretString>> {
    List(kind::Secret(rule::API_KEY)).read(&Raw::Text(text.into()))
}

impl Default for ServerConfig {
    fn default() -> Self {
        Self {
            bind: IpAddr::from([0, 0, 0, 0]),
            port: 8080,
            unix: None,
            unix_mode: 0o660,
            reuse_port: false,
            server_id: None,
            threads: 0,
            shutdown_timeout: Duration::from_secs(30),
            drain_delay: Duration::from_secs(5),
            drain_spread: Duration::from_secs(5),
            handshake_timeout: Duration::from_secs(5),
            header_timeout: Duration::from_secs(10),
            header_bytes_max: 16 * 1024,
            trusted_proxies: Vec::new(),
            proxy_protocol: false,
            local_hosts_only: false,
            forwarded_header: ForwardedHeader::Auto,
            allowed_origins: Vec::new(),
        }
    }
}

impl Default for TlsConfig {
    fn default() -> Self {
        Self { certificate: None, key: None, admin: false, handshakes_max: 1024 }
    }
}

impl Default for RedisConfig {
    fn default() -> Self {
        Self {
            url: None,
            sentinel_username: None,
            sentinel_password: None,
            channel_prefix: String::new(),
            connect_timeout: Duration::from_secs(3),
            response_timeout: Duration::from_secs(3),
            probe_interval: Duration::from_secs(1),
            publish_queue_bytes: 16 * 1024 * 1024,
            ca_file: None,
        }
    }
}

impl Default for LimitsConfig {
    fn default() -> Self {
        Self {
            max_connections: 0,
            max_message_bytes: 1024 * 1024,
            max_fragments: 1024,
            send_buffer_bytes: 10 * 1024 * 1024,
            send_buffers_total_bytes: 1024 * 1024 * 1024,
            messages_per_second: 100,
            message_burst: 200,
            store_bytes: 256 * 1024 * 1024,
            store_logs_share: 0.8,
            bytes_per_second: 4 * 1024 * 1024,
            bytes_burst: 8 * 1024 * 1024,
            connections_per_user: 0,
            connections_per_session: 64,
            resumes_per_second: 20,
        }
    }
}

impl Default for HeartbeatConfig {
    fn default() -> Self {
        Self {
            interval: Duration::from_secs(30),
            timeout: Duration::from_secs(60),
            timeout_is_set: false,
            idle_timeout: Duration::ZERO,
        }
    }
}

impl HeartbeatConfig {
    /// Returns the timeout of a family whose default is `own`.
    #[must_use]
    pub const fn timeout_or(&self, own: Duration) -> Duration {
        if self.timeout_is_set { self.timeout } else { own }
    }
}

impl Default for RateLimit {
    fn default() -> Self {
        Self { max_requests: 0, max_requests_is_set: false, window: Duration::from_secs(60) }
    }
}

impl RateLimit {
    /// Returns the attempts per window of a family whose default is `own`.
    #[must_use]
    pub const fn max_requests_or(&self, own: u32) -> u32 {
        if self.max_requests_is_set { self.max_requests } else { own }
    }
}

impl Default for CompressionConfig {
    fn default() -> Self {
        Self { enabled: true, threshold_bytes: 1024, level: 1, client_context_takeover: false }
    }
}

impl Default for LogConfig {
    fn default() -> Self {
        Self {
            level: "info".into(),
            format: LogFormat::Auto,
            summary_interval: Duration::from_secs(60),
        }
    }
}

impl Default for HistoryConfig {
    fn default() -> Self {
        Self { entries_max: 1000, bytes_max: 1024 * 1024, ttl: Duration::from_secs(3600) }
    }
}

impl Default for SseConfig {
    fn default() -> Self {
        Self {
            enabled: true,
            keep_alive: Duration::from_secs(15),
            retry: Duration::from_secs(1),
            compression: true,
        }
    }
}

impl Default for JwtConfig {
    fn default() -> Self {
        Self {
            secret_key: None,
            algorithms: vec![Algorithm::HS256],
            public_key_file: None,
            jwks_url: None,
            jwks_refresh: Duration::from_secs(600),
            jwks_timeout: Duration::from_secs(3),
            ca_file: None,
            audience: Vec::new(),
            issuer: None,
            leeway: Duration::from_secs(5),
            user_claim: "sub".into(),
            require_exp: true,
            typ: None,
        }
    }
}
