//! The configuration in the types that the code needs; knows nothing of files and environments.

pub mod api_key;
mod check;
pub mod environment;
pub mod host;
pub mod keys;
mod kind;
pub mod load;
pub mod origin;
pub mod problem;
pub mod render;
mod rule;

use std::{net::IpAddr, time::Duration};

use ipnet::IpNet;
use jsonwebtoken::Algorithm;
use secrecy::SecretString;

use self::{
    api_key::ApiKey,
    kind::{Kind, List, Raw},
    origin::OriginRule,
};

/// Everything an operator can set. One field per section of the file.
#[derive(Debug, Clone, Default)]
pub struct Config {
    /// `[server]`
    pub server: Server,
    /// `[admin]`
    pub admin: Admin,
    /// `[redis]`
    pub redis: Redis,
    /// `[limits]`
    pub limits: Limits,
    /// `[heartbeat]`
    pub heartbeat: Heartbeat,
    /// `[rate_limit]`
    pub rate_limit: RateLimit,
    /// `[compression]`
    pub compression: Compression,
    /// `[log]`
    pub log: Log,
    /// `[endpoints]`
    pub endpoints: Endpoints,
    /// `[sessions]`
    pub sessions: Sessions,
    /// `[events]`
    pub events: Events,
    /// `[history]`
    pub history: History,
    /// `[sse]`
    pub sse: Sse,
    /// `[jwt]`
    pub jwt: Jwt,
    /// `[api]`
    pub api: Api,
}

/// `[server]`: where clients arrive and how the instance ends.
#[derive(Debug, Clone)]
pub struct Server {
    /// Address to listen on.
    pub bind: IpAddr,
    /// Port to listen on; 0 takes a free one.
    pub port: u16,
    /// Name of the instance; `None`: a fresh id at every start.
    pub server_id: Option<String>,
    /// Worker threads; 0: one per core.
    pub threads: usize,
    /// Everything must have ended this long after the first signal.
    pub shutdown_timeout: Duration,
    /// How long `/ready` says 503, and clients are still taken, before listeners stop: load balancers need time to notice.
    pub drain_delay: Duration,
    /// Over which time connections are closed, so that they do not all come back at once.
    pub drain_spread: Duration,
    /// Deadline for all bus and store work of one handshake.
    pub handshake_timeout: Duration,
    /// A client must have sent its request head within this time.
    pub header_timeout: Duration,
    /// Largest request head, in bytes.
    pub header_bytes_max: usize,
    /// Addresses whose `X-Forwarded-For` or `Forwarded` is believed.
    pub trusted_proxies: Vec<IpNet>,
    /// Answer only requests that name this machine; no key sets it, `wsproxy dev` does.
    pub local_hosts_only: bool,
    /// Which header of a trusted proxy names the client.
    pub forwarded_header: ForwardedHeader,
    /// Browser origins that may connect, `https://app.example` or `https://*.example`; `*`: any. Empty: any.
    pub allowed_origins: Vec<OriginRule>,
}

/// Which header of a trusted proxy names the client.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ForwardedHeader {
    /// Either; where both are there they must name the same client.
    Auto,
    /// `X-Forwarded-For`, whatever `Forwarded` says.
    XForwardedFor,
    /// `Forwarded`, whatever `X-Forwarded-For` says.
    Forwarded,
}

/// `[admin]`: health, metrics and API on a port of their own.
#[derive(Debug, Clone, Default)]
pub struct Admin {
    /// Address; `None`: that of `[server]`.
    pub bind: Option<IpAddr>,
    /// Port for admin routes and API; `None`: they are served on the main port.
    pub port: Option<u16>,
}

/// `[redis]`: the bus. Without a URL the embedded one is used.
#[derive(Debug, Clone)]
pub struct Redis {
    /// `redis://`, `rediss://` or `unix://`; `None`: embedded bus. May hold a password, hence secret.
    pub url: Option<SecretString>,
    /// Put before every key and channel, with a colon.
    pub channel_prefix: String,
    /// Time to connect and authenticate.
    pub connect_timeout: Duration,
    /// A link on which nothing came for this long after a question is replaced.
    pub response_timeout: Duration,
    /// How often a message of the instance's own must come back.
    pub probe_interval: Duration,
    /// Bound of what waits to be published; beyond it clients' reads pause.
    pub publish_queue_bytes: usize,
    /// File with further CA certificates (PEM) for `rediss://`.
    pub ca_file: Option<std::path::PathBuf>,
}

/// `[limits]`: what one connection and the process may use.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Connections per instance; 0: as many as descriptors allow.
    pub max_connections: usize,
    /// Largest message, before and after inflating.
    pub max_message_bytes: usize,
    /// Most fragments of one message.
    pub max_fragments: u32,
    /// Bound of what waits for one client.
    pub send_buffer_bytes: usize,
    /// Bound of what waits for all clients; beyond it the worst offender goes.
    pub send_buffers_total_bytes: usize,
    /// Messages per second and connection; 0: no limit.
    pub messages_per_second: u32,
    /// How many of them may come at once.
    pub message_burst: u32,
    /// What the embedded store may hold.
    pub store_bytes: usize,
    /// The part of it that logs and token streams may take.
    pub store_logs_share: f64,
    /// Bytes per second and connection, inflated ones included; 0: no limit.
    pub bytes_per_second: usize,
    /// How many of them may come at once.
    pub bytes_burst: usize,
    /// Connections of one user of the event endpoint at this instance; 0: no limit.
    pub connections_per_user: usize,
    /// Connections of one session at this instance; 0: no limit.
    pub connections_per_session: usize,
    /// Resumes of one session or user per second; 0: no limit.
    pub resumes_per_second: u32,
}

/// `[heartbeat]`: how dead and idle connections are found.
#[derive(Debug, Clone)]
pub struct Heartbeat {
    /// A ping is sent when nothing arrived for this long.
    pub interval: Duration,
    /// A connection from which nothing arrived for this long is dead.
    pub timeout: Duration,
    /// A connection without data messages for this long is closed with 4003; zero: never.
    pub idle_timeout: Duration,
}

/// `[rate_limit]`: connection attempts per client address.
#[derive(Debug, Clone)]
pub struct RateLimit {
    /// Attempts per window; 0: no limit.
    pub max_requests: u32,
    /// The window.
    pub window: Duration,
}

/// `[compression]`: permessage-deflate.
#[derive(Debug, Clone)]
pub struct Compression {
    /// Negotiate it where the client offers it.
    pub enabled: bool,
    /// Messages shorter than this are sent as they are.
    pub threshold_bytes: usize,
    /// 1 (fast) to 9 (small).
    pub level: u32,
    /// Let clients keep their compression context between messages: costs up to 48 KB a connection.
    pub client_context_takeover: bool,
}

/// `[log]`
#[derive(Debug, Clone)]
pub struct Log {
    /// A level, or directives such as `info,wsproxy::bus=debug`.
    pub level: String,
    /// How lines look.
    pub format: LogFormat,
}

/// How log lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    /// Pretty where standard error is a terminal, else JSON.
    Auto,
    /// One JSON object per line.
    Json,
    /// For people.
    Pretty,
}

/// `[endpoints]`: which endpoint families are served.
#[derive(Debug, Clone)]
pub struct Endpoints {
    /// `/{agent_id}/ws/{session_id}`
    pub sessions: bool,
    /// `/ws`
    pub events: bool,
    /// `/echo`: answers every message with itself; for conformance suites.
    pub echo: bool,
}

/// `[sessions]`
#[derive(Debug, Clone)]
pub struct Sessions {
    /// What a client's message meets when no worker listens.
    pub no_receiver: NoReceiver,
    /// Most entries of `{session:<id>:up}:log`.
    pub up_log_entries_max: u64,
    /// Most bytes of that stream.
    pub up_log_bytes_max: usize,
    /// That log expires this long after its last entry.
    pub up_log_ttl: Duration,
    /// Invalid messages after which the connection is closed; 0: never.
    pub strikes_max: u32,
    /// How messages from workers are framed.
    pub down_frames: DownFrames,
    /// What clients are told after a loss of the bus.
    pub on_bus_loss: OnBusLoss,
    /// How long a token lives which the API or `wsproxy token` made.
    pub token_ttl: Duration,
    /// Clients can resume what workers publish with history.
    pub history: bool,
    /// Plain publishes of JSON with an `event_id` are taken into the history.
    pub capture: bool,
    /// Announcements of opened and closed sessions are kept in a log.
    pub events_log: bool,
    /// Most entries of an agent's log.
    pub events_log_entries_max: u64,
    /// How long an entry is held, and a log after its last entry.
    pub events_log_ttl: Duration,
    /// Whether JSON objects of the history carry their id.
    pub event_ids: EventIds,
}

/// Whether JSON objects of the history carry their id.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EventIds {
    /// As their first member, `event_id`.
    Json,
    /// They are sent as they are; ids are only in the envelope of the subprotocol.
    None,
}

/// `[history]`: bounds of the logs; workers that publish by script must give the same.
#[derive(Debug, Clone)]
pub struct History {
    /// Most entries of a log.
    pub entries_max: u64,
    /// Most bytes of a log.
    pub bytes_max: usize,
    /// How long an entry is held, and a log after its last entry.
    pub ttl: Duration,
}

impl History {
    /// As the bus wants them.
    #[must_use]
    pub const fn limits(&self) -> crate::bus::HistoryLimits {
        let Self { entries_max, bytes_max, ttl } = *self;
        crate::bus::HistoryLimits { entries_max, bytes_max: bytes_max as u64, ttl }
    }
}

/// `[events]`
#[derive(Debug, Clone)]
pub struct Events {
    /// Clients can resume; what workers publish with history is delivered without a gap.
    pub history: bool,
    /// Plain publishes with an `event_id` are taken into the history.
    pub capture: bool,
    /// Invalid messages after which a connection is closed; 0: never.
    pub strikes_max: u32,
    /// What clients are told after a loss of the bus where a channel has no history.
    pub on_bus_loss: OnBusLoss,
    /// A message that wants an `ack` is sent again after this time.
    pub ack_interval: Duration,
    /// How often it is sent before it is reported.
    pub ack_tries: u32,
    /// Most messages of a connection that wait for an `ack`.
    pub ack_queue: usize,
    /// How long the registry keeps what nobody refreshes.
    pub registry_ttl: Duration,
    /// The longest revocation that the API takes; at least as long as tokens live.
    pub revocation_ttl: Duration,
}

/// `[sse]`: server-sent events at the URLs of sessions and events.
#[derive(Debug, Clone)]
pub struct Sse {
    /// Answer `Accept: text/event-stream`.
    pub enabled: bool,
    /// A comment is sent when nothing else was for this long.
    pub keep_alive: Duration,
    /// What the client is told to wait before it reconnects.
    pub retry: Duration,
    /// Compress where the client accepts gzip.
    pub compression: bool,
}

/// What a client's message meets when no worker listens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NoReceiver {
    /// Nothing.
    Ignore,
    /// An `error` message with code `no_receiver`.
    Error,
    /// It is kept in `{session:<id>:up}:log`.
    Queue,
}

/// How messages from workers are framed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DownFrames {
    /// Text where the payload is UTF-8, else binary.
    Auto,
    /// Always text; what is not UTF-8 is dropped, counted and logged.
    Text,
    /// Always binary.
    Binary,
}

/// What clients are told after a loss of the bus.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnBusLoss {
    /// One `bus_recovered` message when it is back.
    Notice,
    /// Close code 1012, so that they reconnect.
    Close,
}

/// `[jwt]`: whose tokens are believed. Without any key none is.
#[derive(Debug, Clone)]
pub struct Jwt {
    /// The secret that the HS algorithms share with whoever issues tokens.
    pub secret_key: Option<SecretString>,
    /// The algorithms that are accepted; a token's header chooses among those of one key only.
    pub algorithms: Vec<Algorithm>,
    /// The issuer's public key, as PEM.
    pub public_key_file: Option<std::path::PathBuf>,
    /// Where the issuer publishes its public keys.
    pub jwks_url: Option<String>,
    /// How often they are fetched; a token with an unknown key has them fetched at once.
    pub jwks_refresh: Duration,
    /// Time for one fetch.
    pub jwks_timeout: Duration,
    /// File with further CA certificates (PEM) for `jwks_url`.
    pub ca_file: Option<std::path::PathBuf>,
    /// Who tokens must be for. Empty: they must not be for anybody in particular.
    pub audience: Vec<String>,
    /// Who must have issued tokens; `None`: anybody who has the key.
    pub issuer: Option<String>,
    /// By how much clocks may differ.
    pub leeway: Duration,
    /// The claim that names the user.
    pub user_claim: String,
    /// Refuse tokens that never expire.
    pub require_exp: bool,
    /// What tokens must say they are in their header (`typ`); `None`: anything.
    pub typ: Option<String>,
}

impl Jwt {
    /// The leeway in seconds, which is what tokens count in; a part of a second counts as one.
    #[must_use]
    pub const fn leeway_seconds(&self) -> u64 {
        self.leeway.as_secs() + (self.leeway.subsec_nanos() > 0) as u64
    }
}

/// `[api]`: HTTP for workers without Redis.
#[derive(Debug, Clone, Default)]
pub struct Api {
    /// Bearer keys with all scopes and no name; without any key the API answers 401 to everybody.
    pub keys: Vec<SecretString>,
    /// The file that `keys` were read from, where they were; no key of the configuration sets it.
    pub keys_file: Option<std::path::PathBuf>,
    /// Bearer keys with a name and scopes.
    pub key: Vec<ApiKey>,
}

/// The keys of the worker API in the text of a file; `None` where something in it is no key.
pub(crate) fn read_api_keys(text: &str) -> Option<Vec<SecretString>> {
    List(kind::Secret(rule::API_KEY)).read(&Raw::Text(text.into()))
}

impl Default for Server {
    fn default() -> Self {
        Self {
            bind: IpAddr::from([0, 0, 0, 0]),
            port: 8080,
            server_id: None,
            threads: 0,
            shutdown_timeout: Duration::from_secs(30),
            drain_delay: Duration::from_secs(3),
            drain_spread: Duration::from_secs(5),
            handshake_timeout: Duration::from_secs(5),
            header_timeout: Duration::from_secs(10),
            header_bytes_max: 16 * 1024,
            trusted_proxies: Vec::new(),
            local_hosts_only: false,
            forwarded_header: ForwardedHeader::Auto,
            allowed_origins: Vec::new(),
        }
    }
}

impl Default for Redis {
    fn default() -> Self {
        Self {
            url: None,
            channel_prefix: String::new(),
            connect_timeout: Duration::from_secs(3),
            response_timeout: Duration::from_secs(3),
            probe_interval: Duration::from_secs(1),
            publish_queue_bytes: 16 * 1024 * 1024,
            ca_file: None,
        }
    }
}

impl Default for Limits {
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

impl Default for Heartbeat {
    fn default() -> Self {
        Self {
            interval: Duration::from_secs(30),
            timeout: Duration::from_secs(60),
            idle_timeout: Duration::ZERO,
        }
    }
}

impl Default for RateLimit {
    fn default() -> Self {
        Self { max_requests: 0, window: Duration::from_secs(60) }
    }
}

impl Default for Compression {
    fn default() -> Self {
        Self { enabled: true, threshold_bytes: 1024, level: 1, client_context_takeover: false }
    }
}

impl Default for Log {
    fn default() -> Self {
        Self { level: "info".into(), format: LogFormat::Auto }
    }
}

impl Default for Endpoints {
    fn default() -> Self {
        Self { sessions: true, events: false, echo: false }
    }
}

impl Default for Sessions {
    fn default() -> Self {
        Self {
            no_receiver: NoReceiver::Ignore,
            up_log_entries_max: 1000,
            up_log_bytes_max: 1024 * 1024,
            up_log_ttl: Duration::from_secs(3600),
            strikes_max: 10,
            down_frames: DownFrames::Auto,
            on_bus_loss: OnBusLoss::Notice,
            token_ttl: Duration::from_secs(60),
            history: false,
            capture: false,
            events_log: false,
            events_log_entries_max: 10_000,
            events_log_ttl: Duration::from_secs(24 * 3600),
            event_ids: EventIds::Json,
        }
    }
}

impl Default for History {
    fn default() -> Self {
        Self { entries_max: 1000, bytes_max: 1024 * 1024, ttl: Duration::from_secs(3600) }
    }
}

impl Default for Events {
    fn default() -> Self {
        Self {
            history: true,
            capture: false,
            strikes_max: 10,
            on_bus_loss: OnBusLoss::Notice,
            ack_interval: Duration::from_secs(5),
            ack_tries: 3,
            ack_queue: 1000,
            registry_ttl: Duration::from_secs(3600),
            revocation_ttl: Duration::from_secs(24 * 3600),
        }
    }
}

impl Default for Sse {
    fn default() -> Self {
        Self {
            enabled: true,
            keep_alive: Duration::from_secs(15),
            retry: Duration::from_secs(1),
            compression: true,
        }
    }
}

impl Default for Jwt {
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
