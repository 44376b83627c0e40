//! `[tunnel]`: the configuration of the tunnel.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use secrecy::SecretString;

use crate::config::{
    keys::{DAY, HOUR, Key, key},
    kind::{Bytes, FilePath, Fraction, Number, OneOf, Optional, Secret, Switch, Time},
    rule,
    tables::Tables,
    tunnel::rows::{AgentToken, CacheRule, ClientToken, PatternRule, SocketAddress},
};

pub mod rows;

/// `[tunnel]`
#[derive(Debug, Clone)]
pub struct TunnelConfig {
    /// Tokens of cluster agents.
    pub agents: Vec<AgentToken>,
    /// A JSON Web Token with the claim `cluster` is a credential of an agent.
    pub agent_jwt: bool,
    /// Credential of clients.
    pub client_auth: ClientAuth,
    /// Tokens of clients.
    pub clients: Vec<ClientToken>,
    /// `Authorization` goes to the upstream where the credential came in another header.
    pub pass_authorization: bool,
    /// `Cookie` goes to the upstream.
    pub pass_cookies: bool,
    /// Window of each direction of a stream at its start, in bytes.
    pub window: usize,
    /// Widest window, in bytes.
    pub window_max: usize,
    /// Growth of all windows, in bytes.
    pub growth: usize,
    /// Memory of all streams without their growth, in bytes.
    pub memory: usize,
    /// Most streams of a lane.
    pub streams_max: u32,
    /// Most streams of a cluster at this instance.
    pub cluster_streams_max: u32,
    /// Largest body of a request, in bytes; 0: no limit.
    pub body_max: usize,
    /// Requests per second of one credential to one cluster; 0: no limit.
    pub requests_per_second: u32,
    /// Longest wait for a lane.
    pub wait: Duration,
    /// Most requests that wait for one cluster.
    pub cluster_waiting_max: usize,
    /// Most requests that wait.
    pub waiting_max: usize,
    /// Time after the loss of a cluster's last lane in which requests wait for another one.
    pub reconnect_grace: Duration,
    /// Time that an agent has for the head of an answer.
    pub head_timeout: Duration,
    /// Time that the gateway waits longer than the agent.
    pub head_margin: Duration,
    /// Time without a byte of a body after which a request ends.
    pub idle_timeout: Duration,
    /// Interval of a lane's pings.
    pub ping: Duration,
    /// Time without a byte after which a lane is dead.
    pub ping_timeout: Duration,
    /// Time of streams to end while their lane drains.
    pub drain: Duration,
    /// Window of the breaker.
    pub breaker_window: Duration,
    /// Share of failures that opens the breaker.
    pub breaker_ratio: f64,
    /// Fewest outcomes in the window that can open the breaker.
    pub breaker_min: u32,
    /// First time for which the breaker is open.
    pub breaker_open: Duration,
    /// Listener for other instances.
    pub peer_bind: Option<SocketAddr>,
    /// URL at which other instances reach that listener.
    pub peer_url: Option<String>,
    /// Secret that instances show each other.
    pub peer_secret: Option<SecretString>,
    /// Instances speak TLS to each other.
    pub peer_tls: bool,
    /// File of the CA certificates of other instances.
    pub peer_ca_file: Option<PathBuf>,
    /// The listener may be on a public address without TLS.
    pub peer_allow_insecure: bool,
    /// Patterns of paths, for metrics.
    pub patterns: Vec<PatternRule>,
    /// Patterns of answers that are kept.
    pub cache: Vec<CacheRule>,
}

impl TunnelConfig {
    /// Returns whether JSON Web Tokens are credentials.
    #[must_use]
    pub fn verifies_jwt(&self) -> bool {
        self.agent_jwt || self.client_auth == ClientAuth::Jwt
    }
}

/// Credential of clients.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ClientAuth {
    /// A token of `tunnel.clients`.
    Token,
    /// A JSON Web Token with the claim `clusters`.
    Jwt,
    /// None, on a loopback address.
    None,
}

impl Default for TunnelConfig {
    fn default() -> Self {
        Self {
            agents: Vec::new(),
            agent_jwt: false,
            client_auth: ClientAuth::Token,
            clients: Vec::new(),
            pass_authorization: false,
            pass_cookies: false,
            window: 32 << 10,
            window_max: 8 << 20,
            growth: 32 << 20,
            memory: 512 << 20,
            streams_max: 1024,
            cluster_streams_max: 2048,
            body_max: 0,
            requests_per_second: 0,
            wait: Duration::from_secs(10),
            cluster_waiting_max: 256,
            waiting_max: 1024,
            reconnect_grace: Duration::from_secs(10),
            head_timeout: Duration::from_secs(120),
            head_margin: Duration::from_secs(10),
            idle_timeout: Duration::from_secs(300),
            ping: Duration::from_secs(10),
            ping_timeout: Duration::from_secs(25),
            drain: Duration::from_secs(20),
            breaker_window: Duration::from_secs(10),
            breaker_ratio: 0.5,
            breaker_min: 20,
            breaker_open: Duration::from_secs(5),
            peer_bind: None,
            peer_url: None,
            peer_secret: None,
            peer_tls: false,
            peer_ca_file: None,
            peer_allow_insecure: false,
            patterns: Vec::new(),
            cache: Vec::new(),
        }
    }
}

/// The keys of this section, and the switch of the family.
#[rustfmt::skip]
pub const KEYS: &[Key] = &[
    key!(endpoints.tunnel, Switch, "/clusters/{cluster_id}/…: lanes of cluster agents, and requests to the services behind them."),
    key!(tunnel.agents, Tables, "Tokens with which cluster agents connect: [[tunnel.agents]] in the file. Several tables may name one cluster.").reloads(),
    key!(tunnel.agent_jwt, Switch, "A JSON Web Token ([jwt]) whose claim cluster names the cluster is a credential of an agent too."),
    key!(tunnel.client_auth, OneOf(&[("token", ClientAuth::Token), ("jwt", ClientAuth::Jwt), ("none", ClientAuth::None)]), "Credential of clients: token (of tunnel.clients), jwt (a JSON Web Token whose claim clusters is a list of cluster ids, each perhaps with a * at its end), or none, which needs a loopback address in server.bind."),
    key!(tunnel.clients, Tables, "Tokens with which clients open clusters: [[tunnel.clients]] in the file.").reloads(),
    key!(tunnel.pass_authorization, Switch, "Pass Authorization on to the upstream, where the client's credential came in X-Wsproxy-Authorization."),
    key!(tunnel.pass_cookies, Switch, "Pass Cookie on to the upstream."),
    key!(tunnel.window, Bytes(4 << 10, 1 << 20), "Bytes of each direction of a stream that may be on their way at its start."),
    key!(tunnel.window_max, Bytes(4 << 10, 256 << 20), "The same at most, once a fast reader waits for more."),
    key!(tunnel.growth, Bytes(0, 1 << 40), "Most bytes by which the windows of all streams may be wider than at their start."),
    key!(tunnel.memory, Bytes(1 << 20, 1 << 40), "Memory of all streams at the window of their start. It bounds their number: at 64 KiB each, 512MiB are 8192 streams."),
    key!(tunnel.streams_max, Number(1, 1_000_000), "Most streams of one lane. An agent may allow fewer."),
    key!(tunnel.cluster_streams_max, Number(1, 1_000_000), "Most streams of one cluster at this instance. Watches and upgraded connections may take three quarters of it, and of each lane."),
    key!(tunnel.body_max, Bytes(0, 1 << 50), "Largest body of a request; 413 beyond it. 0: no limit."),
    key!(tunnel.requests_per_second, Number(0, 1_000_000), "Requests per second of one client (the user of a JSON Web Token, else a token) to one cluster, and twice as many at once; 429 beyond it. 0: no limit."),
    key!(tunnel.wait, Time(0, 300_000), "Longest time for which a request waits for a lane."),
    key!(tunnel.cluster_waiting_max, Number(0, 1_000_000), "Most requests that wait for one cluster."),
    key!(tunnel.waiting_max, Number(0, 1_000_000), "Most requests that wait, of all clusters."),
    key!(tunnel.reconnect_grace, Time(0, HOUR), "Time after the loss of a cluster's last lane, and after the start, in which requests wait for a lane. Later they are refused at once."),
    key!(tunnel.head_timeout, Time(100, DAY), "Time that an agent has for the head of an answer. Not for watches, event streams and upgraded connections."),
    key!(tunnel.head_margin, Time(0, 300_000), "Time that the gateway waits longer than that, so that the agent's reason arrives."),
    key!(tunnel.idle_timeout, Time(100, DAY), "A request whose bodies pass no byte for this long ends. Not for watches, event streams and upgraded connections."),
    key!(tunnel.ping, Time(100, HOUR), "Interval of the pings on a lane."),
    key!(tunnel.ping_timeout, Time(100, HOUR), "A lane from which nothing arrived for this long is dead, and so is one that takes nothing for this long."),
    key!(tunnel.drain, Time(0, HOUR), "Time that streams have to end while their lane is being closed; at the end of the process at most until server.shutdown_timeout."),
    key!(tunnel.breaker_window, Time(1_000, HOUR), "Time over which failures of a cluster's upstream are counted."),
    key!(tunnel.breaker_ratio, Fraction, "Share of failures among the outcomes of that time from which on requests are refused for a while."),
    key!(tunnel.breaker_min, Number(1, 1_000_000), "Fewest outcomes for that."),
    key!(tunnel.breaker_open, Time(100, HOUR), "Time until one request is let through again. It doubles with each failure, to a minute."),
    key!(tunnel.peer_bind, Optional(SocketAddress), "Address and port at which other instances bring requests for the agents that are connected here. Not set: each instance serves only its own lanes."),
    key!(tunnel.peer_url, Optional(rule::PEER_URL), "URL at which other instances reach that listener. Not set: peer_bind, which then must be one address."),
    key!(tunnel.peer_secret, Optional(Secret(rule::API_KEY)), "Secret that instances show each other.").secret(),
    key!(tunnel.peer_tls, Switch, "Speak TLS between instances, with the certificate of [tls]."),
    key!(tunnel.peer_ca_file, Optional(FilePath), "CA certificates (PEM) that other instances' certificates are checked against, and no others. Not set: those of the system."),
    key!(tunnel.peer_allow_insecure, Switch, "Allow a peer_bind without TLS on an address that is neither loopback nor private, and requests in plain HTTP to other instances at such addresses."),
    key!(tunnel.patterns, Tables, "Patterns of paths under which metrics count requests, before other: [[tunnel.patterns]] in the file. Those of Kubernetes are built in."),
    key!(tunnel.cache, Tables, "Answers to GET that this instance keeps for a short time: [[tunnel.cache]] in the file. After a write, the old answer may be served until its ttl is over."),
];
