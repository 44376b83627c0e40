//! The table of all keys: the one place that has their names, values and descriptions.
//!
//! Loading, `config example`, `config show`, the flags and `docs/reference/configuration.md` are made from it.

use super::{
    Config, ForwardedHeader, LogFormat, agents,
    api_key::ApiKeyTables,
    database, echo,
    environment::PREFIX,
    events,
    kind::{
        Bytes, FileMode, FilePath, Fraction, IpAddress, List, Number, OneOf, Optional, Raw,
        Seconds, Secret, SocketPath, Switch, Time, ValueKind,
    },
    origin::OriginKind,
    peer::Proxy,
    rooms, rule, sessions, traces, tunnel, tunnel_agent,
};

/// A key of the file.
#[derive(Debug)]
pub struct Key {
    /// Section of the key.
    pub section: &'static str,
    /// Name in the section.
    pub name: &'static str,
    /// Description, in one or two sentences.
    pub doc: &'static str,
    /// The short name in the environment.
    pub alias: Option<Alias>,
    /// The flag of the command line.
    pub flag: Option<Flag>,
    /// Set for values that are never shown; the variable `NAME_FILE` can name a file that has the value.
    pub secret: bool,
    /// Whether a reload puts a changed value into force. Every other key needs a restart.
    pub reloads: bool,
    pub(super) allowed: fn() -> String,
    pub(super) explain: fn(&Raw) -> Option<String>,
    pub(super) read: fn(&mut Config, &Raw) -> bool,
    pub(super) write: fn(&Config) -> String,
    pub(super) is_same: fn(&Config, &Config) -> bool,
    /// Puts the value of the second configuration into the first one.
    pub(super) copy: fn(&mut Config, &Config),
}

/// A flag of the command line.
#[derive(Debug, Clone, Copy)]
pub struct Flag {
    /// Name of the flag, without dashes.
    pub name: &'static str,
    /// The name of its value in the help.
    pub value: &'static str,
}

/// A short name in the environment, beside the one that begins with [`PREFIX`].
#[derive(Debug, Clone, Copy)]
pub struct Alias {
    /// Name of the variable.
    pub name: &'static str,
    /// Name of a more specific variable, which wins over this one.
    pub over: Option<&'static str>,
    /// The unit of a bare number, where it is not that of the key.
    pub unit: &'static str,
    /// Whether the variable is read. One that deployments share with other services is read only where a part that is
    /// on needs it.
    pub(super) is_read: fn(&Config) -> bool,
}

/// All keys.
pub fn all() -> impl Iterator<Item = &'static Key> {
    TABLE.iter().copied().flatten()
}

/// Returns whether a variable is that of a key. Of a secret whose file has a key of its own, that key has the variable.
pub(super) fn is_env(name: &str) -> bool {
    all().any(|key| key.env() == name)
}

impl Alias {
    /// Returns the variables, those that win first.
    pub(super) fn names(self) -> impl Iterator<Item = &'static str> {
        self.over.into_iter().chain([self.name])
    }
}

impl Key {
    /// `section.name`.
    #[must_use]
    pub fn path(&self) -> String {
        format!("{}.{}", self.section, self.name)
    }

    /// The environment variable.
    #[must_use]
    pub fn env(&self) -> String {
        format!("{PREFIX}{}__{}", self.section, self.name).to_ascii_uppercase()
    }

    /// The environment variable that names a file with the value of a secret.
    #[must_use]
    pub fn file_env(&self) -> String {
        format!("{}_FILE", self.env())
    }

    /// Completes the sentence "must be …".
    #[must_use]
    pub fn allowed(&self) -> String {
        (self.allowed)()
    }

    /// The value in `config`, as TOML; secrets as `***`.
    #[must_use]
    pub fn write(&self, config: &Config) -> String {
        (self.write)(config)
    }

    pub(super) const fn alias(self, name: &'static str) -> Self {
        self.alias_where(name, |_| true)
    }

    /// A short name that is read only where agents are served: other services of a deployment have it too.
    pub(super) const fn alias_of_agents(self, name: &'static str) -> Self {
        self.alias_where(name, |config| config.endpoints.agents)
    }

    pub(super) const fn alias_ms(self, name: &'static str) -> Self {
        self.alias(name).in_ms()
    }

    /// A short name that is read only where `is_read` says so.
    pub(super) const fn alias_where(
        mut self,
        name: &'static str,
        is_read: fn(&Config) -> bool,
    ) -> Self {
        self.alias = Some(Alias { name, over: None, unit: "", is_read });
        self
    }

    /// Adds a more specific short name, which wins over the other one.
    pub(super) const fn over(mut self, name: &'static str) -> Self {
        if let Some(alias) = &mut self.alias {
            alias.over = Some(name);
        }
        self
    }

    /// Takes bare numbers in short names for milliseconds.
    pub(super) const fn in_ms(mut self) -> Self {
        if let Some(alias) = &mut self.alias {
            alias.unit = "ms";
        }
        self
    }

    pub(super) const fn flag(mut self, name: &'static str, value: &'static str) -> Self {
        self.flag = Some(Flag { name, value });
        self
    }

    pub(super) const fn secret(mut self) -> Self {
        self.secret = true;
        self
    }

    /// A key whose changed value a reload puts into force.
    pub(super) const fn reloads(mut self) -> Self {
        self.reloads = true;
        self
    }
}

/// A key whose value is the field of the same name, or the one that is named.
macro_rules! key {
    ($section:ident.$name:ident, $kind:expr, $doc:literal) => {
        $crate::config::keys::key!($section.$name => $name, $kind, $doc)
    };
    ($section:ident.$name:ident => $field:ident, $kind:expr, $doc:literal) => {
        $crate::config::keys::Key {
            section: stringify!($section),
            name: stringify!($name),
            doc: $doc,
            alias: None,
            flag: None,
            secret: false,
            reloads: false,
            allowed: || $crate::config::keys::allowed(&$kind, |config| &config.$section.$field),
            explain: |raw| $crate::config::keys::explain(&$kind, |config| &config.$section.$field, raw),
            read: |config, raw| {
                let value = $crate::config::kind::ValueKind::read(&$kind, raw);
                value.map(|value| config.$section.$field = value).is_some()
            },
            write: |config| $crate::config::kind::ValueKind::write(&$kind, &config.$section.$field),
            is_same: |one, other| {
                $crate::config::kind::ValueKind::is_same(&$kind, &one.$section.$field, &other.$section.$field)
            },
            copy: |to, from| to.$section.$field.clone_from(&from.$section.$field),
        }
    };
}

pub(super) use key;

/// Returns the allowed values of a kind. The field selects the [`ValueKind`] where one type implements several.
pub(super) fn allowed<T, K: ValueKind<T>>(kind: &K, _: fn(&Config) -> &T) -> String {
    kind.allowed()
}

pub(super) fn explain<T, K: ValueKind<T>>(
    kind: &K,
    _: fn(&Config) -> &T,
    raw: &Raw,
) -> Option<String> {
    kind.explain(raw)
}

/// The sections, in the order of the file.
pub static SECTIONS: &[(&str, &str)] = &[
    ("server", "The clients' port, handshakes, and the end of the instance."),
    ("admin", "A port of its own for health, metrics and the worker API."),
    ("tls", "TLS 1.2 and 1.3 on the listeners. Without a certificate they speak plain HTTP."),
    (
        "redis",
        "The bus. Without a URL it is the embedded one: for one instance, nothing to install.",
    ),
    ("limits", "Limits of one connection and of the instance."),
    ("heartbeat", "Detection of dead and idle connections."),
    ("rate_limit", "Connection attempts per client address."),
    ("compression", "permessage-deflate."),
    ("log", "The log on standard error."),
    (
        "traces",
        "Traces of handshakes, calls of the API, joins of rooms and calls of tools, sent to a collector of OpenTelemetry. Off without a URL.",
    ),
    ("endpoints", "The endpoint families that are served."),
    ("sessions", "The session endpoint, /{agent_id}/ws/{session_id}."),
    ("events", "The event endpoint, /ws."),
    ("rooms", "Rooms, /ws/{room_id}: members who see each other come, go, move and speak."),
    ("agents", "Users' agents: one connection for each user, and calls of tools on it."),
    (
        "tunnel",
        "The tunnel: private HTTP services, reached over connections that cluster agents beside them open.",
    ),
    (
        "tunnel_agent",
        "The cluster agent, `wsproxy agent`: the gateway that it dials, and the service that answers. A gateway reads none of these keys.",
    ),
    (
        "database",
        "The SQL database with credentials of agents and the audit log. Opened only where agents are served.",
    ),
    ("audit", "The log of calls to agents, in the database."),
    (
        "history",
        "Bounds of each channel's history. Workers that publish by script must use the same values.",
    ),
    ("sse", "Server-sent events, at the URLs of sessions and events."),
    (
        "jwt",
        "The JSON Web Tokens that are accepted: signed with a shared secret, or with a private key whose public key is in a file or published as a JWKS.",
    ),
    ("api", "The worker API over HTTP, below /api/v1."),
];

/// Keys of earlier versions, each with advice. A configuration that sets one is refused, since ignoring the key
/// would silently drop a wish of the operator.
pub(super) static REMOVED: &[(&str, &str)] = &[(
    "sessions.sse_token",
    "was removed: the token itself says its kind now. One that begins with \"sse.\" opens event streams until it \
     expires (`wsproxy token --event-stream`), every other token opens one connection or event stream, once",
)];

/// Every key, in groups. The order counts within a section only.
static TABLE: &[&[Key]] = &[
    SHARED,
    sessions::KEYS,
    events::KEYS,
    rooms::KEYS,
    agents::KEYS,
    tunnel::KEYS,
    database::KEYS,
    traces::KEYS,
    tunnel_agent::KEYS,
    echo::KEYS,
];

/// Keys that belong to no single endpoint family.
#[rustfmt::skip]
const SHARED: &[Key] = &[
    key!(server.bind, IpAddress, "Address to listen on.").flag("bind", "ADDRESS"),
    key!(server.port, Number(0, 65_535), "Port to listen on; 0 takes a free one.").flag("port", "PORT").alias("PORT"),
    key!(server.unix, Optional(SocketPath), "Unix socket to listen on in place of bind and port, for a proxy on the same machine. A file that a dead process left is replaced; no other file is.").flag("unix", "PATH"),
    key!(server.unix_mode, FileMode, "Permissions of the unix socket's file: processes that may write it may connect."),
    key!(server.reuse_port, Switch, "Several processes of one user may listen on the port, and the kernel shares new connections out among them: for a restart without a refused client. A process with unix takes the socket over from the one before. Does not hold for admin.port."),
    key!(server.server_id, Optional(rule::SERVER_ID), "Name of the instance, in its own channels and in announcements. Not set: a new one at every start.").flag("server-id", "ID").alias("SERVER_ID"),
    key!(server.threads, Number(0, 1024), "Worker threads; 0: one per core.").flag("threads", "NUMBER"),
    key!(server.shutdown_timeout, Time(1_000, HOUR), "The process ends at the latest this long after the first signal.").flag("shutdown-timeout", "TIME"),
    key!(server.drain_delay, Time(0, HOUR), "Time after the signal in which /ready says 503 and clients are still accepted: twice the time that load balancers need to notice. 0 for `dev`, and where it is not set beside reuse_port."),
    key!(server.drain_spread, Time(0, HOUR), "Time over which connections are closed at the end, so that clients do not all come back at once."),
    key!(server.handshake_timeout, Time(100, 300_000), "Deadline for all work on the bus and stores of one handshake; 504 beyond it."),
    key!(server.header_timeout, Time(100, 300_000), "A client must have sent its request head within this time."),
    key!(server.header_bytes_max, Bytes(1 << 10, 1 << 20), "Largest request head."),
    key!(server.trusted_proxies, List(Proxy), "Proxies whose X-Forwarded-For or Forwarded is used as the client's address. \"unix:\" stands for all processes that may open server.unix."),
    key!(server.proxy_protocol, Switch, "Trusted proxies begin each connection to the clients' port with a header of the PROXY protocol, version 1 or 2: the address in it counts as that of the socket. A trusted proxy without one is refused, and so is a header of any other peer. Not for admin.port."),
    key!(server.forwarded_header, OneOf(&[("auto", ForwardedHeader::Auto), ("x-forwarded-for", ForwardedHeader::XForwardedFor), ("forwarded", ForwardedHeader::Forwarded)]), "The header that these proxies write; the other one is ignored, since a client may have written it. auto: either; if both are present they must name the same client."),
    key!(server.allowed_origins, List(OriginKind), "Browser origins that may connect. Empty: any.").reloads(),

    key!(admin.bind, Optional(IpAddress), "Address of `admin.port`. Not set: server.bind."),
    key!(admin.port, Optional(Number(0, 65_535)), "Port for health, metrics and the worker API. Not set: the clients' port serves them.").flag("metrics-port", "PORT").alias("METRICS_PORT"),

    key!(tls.certificate, Optional(FilePath), "File with the certificate, and behind it those of its issuers (PEM). With it the clients' port speaks TLS only. The file is read again every few seconds.").reloads(),
    key!(tls.key, Optional(FilePath), "File with the certificate's key (PEM, without a password). The file is read again every few seconds.").reloads(),
    key!(tls.admin, Switch, "Speak TLS on `admin.port` too."),
    key!(tls.handshakes_max, Number(64, 1_000_000), "TLS handshakes that may be under way at once on one port; beyond it the oldest is closed for a new one."),

    key!(redis.url, Optional(Secret(rule::REDIS_URL)), "The Redis between instances and workers. Not set: the embedded bus. Other users of the machine can read a command line: prefer the environment or a file.").flag("redis-url", "URL").alias("REDIS_URL").secret(),
    key!(redis.sentinel_username, Optional(rule::REDIS_USER), "User at the sentinels, whose users are not those of the Redis. Not set: `default`."),
    key!(redis.sentinel_password, Optional(Secret(rule::REDIS_PASSWORD)), "Password at the sentinels. Not set: no login there.").secret(),
    key!(redis.channel_prefix, rule::PREFIX, "Prefix of every key and channel, followed by a colon, so that several deployments can share one Redis. Databases are not enough: they separate keys, but not channels.").flag("channel-prefix", "PREFIX").alias("REDIS_CHANNEL_PREFIX"),
    key!(redis.connect_timeout, Time(100, 300_000), "Time to connect and authenticate."),
    key!(redis.response_timeout, Time(100, 300_000), "A connection to Redis that does not answer a request for this long is replaced."),
    key!(redis.probe_interval, Time(100, 300_000), "Interval of the probes: over each connection a message of the instance must come back; every tenth time also over a new connection."),
    key!(redis.publish_queue_bytes, Bytes(64 << 10, 4 << 30), "Upper bound of messages that wait to be published; beyond it reading from clients pauses."),
    key!(redis.ca_file, Optional(FilePath), "Further CA certificates (PEM) for rediss://, rediss+sentinel:// and rediss+cluster://."),

    key!(limits.max_connections, Number(0, 100_000_000), "Connections per instance; 0: as many as descriptors allow.").flag("max-connections", "NUMBER"),
    key!(limits.max_message_bytes, Bytes(1, 16 << 20), "Largest message, before and after inflating; close code 1009 beyond it."),
    key!(limits.max_fragments, Number(1, 131_072), "Most fragments of one message."),
    key!(limits.send_buffer_bytes, Bytes(1 << 10, 1 << 30), "Upper bound of data that waits for one client; beyond it the connection is closed with 1008."),
    key!(limits.send_buffers_total_bytes, Bytes(1 << 20, 1 << 40), "Upper bound of data that waits for all clients; beyond it the connection with most data is closed."),
    key!(limits.messages_per_second, Number(0, 1_000_000), "Messages per second and connection; 0: no limit.").reloads(),
    key!(limits.message_burst, Number(1, 1_000_000), "Messages that may come at once.").reloads(),
    key!(limits.store_bytes, Bytes(1 << 20, 1 << 40), "Upper bound of the embedded store (without Redis)."),
    key!(limits.store_logs_share, Fraction, "Share of the embedded store for logs and token streams; the rest is for tokens."),
    key!(limits.bytes_per_second, Bytes(0, 16 << 30), "Bytes per second and connection, as received, plus the growth of compressed messages; beyond it reading pauses. 0: no limit.").reloads(),
    key!(limits.bytes_burst, Bytes(0, 16 << 30), "Bytes that may come at once.").reloads(),
    key!(limits.connections_per_user, Number(0, 100_000_000), "Connections of one user of the event endpoint at one instance, WebSockets and event streams together; 429 beyond it. 0: no limit."),
    key!(limits.connections_per_session, Number(0, 100_000_000), "Connections of one session at one instance, WebSockets and event streams together; 429 beyond it. 0: no limit."),
    key!(limits.resumes_per_second, Number(0, 1_000_000), "Resumes of one session, or of one user of the event endpoint, per second, and five times as many at once; 429 beyond it. 0: no limit.").reloads(),

    key!(heartbeat.interval, Time(100, HOUR), "A ping is sent when nothing arrived for this long.").alias_ms("HEARTBEAT_INTERVAL"),
    Key {
        read: |config, raw| {
            let timeout = Time(100, DAY).read(raw);
            config.heartbeat.timeout_is_set |= timeout.is_some();
            timeout.map(|timeout| config.heartbeat.timeout = timeout).is_some()
        },
        is_same: |one, other| {
            let value = |config: &Config| (config.heartbeat.timeout, config.heartbeat.timeout_is_set);
            value(one) == value(other)
        },
        ..key!(heartbeat.timeout, Time(100, DAY), "A connection from which nothing arrived for this long is closed with 4002. While this is not set, it is 90 s for users' agents.").alias_ms("HEARTBEAT_TIMEOUT")
    },
    key!(heartbeat.idle_timeout, Time(0, 30 * DAY), "A connection without data messages for this long is closed with 4003; 0: never."),

    Key {
        read: |config, raw| {
            let attempts = Number(0, 100_000_000).read(raw);
            config.rate_limit.max_requests_is_set |= attempts.is_some();
            attempts.map(|attempts| config.rate_limit.max_requests = attempts).is_some()
        },
        is_same: |one, other| {
            let value = |config: &Config| (config.rate_limit.max_requests, config.rate_limit.max_requests_is_set);
            value(one) == value(other)
        },
        copy: |to, from| {
            to.rate_limit.max_requests = from.rate_limit.max_requests;
            to.rate_limit.max_requests_is_set = from.rate_limit.max_requests_is_set;
        },
        ..key!(rate_limit.max_requests, Number(0, 100_000_000), "Attempts per address and window; 0: no limit. While this is not set, it is 60 for rooms, which count apart and by user where a token is valid. Behind a proxy set server.trusted_proxies too.").alias("RATE_LIMIT_MAX_REQUESTS").reloads()
    },
    key!(rate_limit.window_seconds => window, Seconds(1, 86_400), "Length of the window in seconds.").alias("RATE_LIMIT_WINDOW_SECONDS").reloads(),

    key!(compression.enabled, Switch, "Compress (permessage-deflate) where the client offers it."),
    key!(compression.threshold_bytes, Bytes(0, 16 << 20), "Messages shorter than this are sent as they are."),
    key!(compression.level, Number(1, 9), "Level from 1 (fast) to 9 (small)."),
    key!(compression.client_context_takeover, Switch, "Let clients keep their compression context between messages: costs up to 48 KB a connection."),

    key!(log.level, rule::LEVEL, "Level of the log, or a filter.").flag("log-level", "LEVEL").alias("LOG_LEVEL").reloads(),
    key!(log.format, OneOf(&[("auto", LogFormat::Auto), ("json", LogFormat::Json), ("pretty", LogFormat::Pretty)]), "Format of the lines; auto: pretty on a terminal, else JSON.").flag("log-format", "FORMAT"),
    key!(log.summary_interval, Time(0, DAY), "Interval of the line that sums up connections and calls of agents; 0: there is none."),

    key!(history.entries_max, Number(1, 1_000_000), "Most entries of a log."),
    key!(history.bytes_max, Bytes(1 << 10, 1 << 30), "Most bytes of a log."),
    key!(history.ttl, Time(1_000, 30 * DAY), "Lifetime of an entry, and of a log after its last entry."),

    key!(sse.enabled, Switch, "Answer Accept: text/event-stream."),
    key!(sse.keep_alive, Time(100, HOUR), "A comment is sent after this long without other data, so that proxies keep the stream open."),
    key!(sse.retry, Time(0, HOUR), "Pause that clients are told before they reconnect; for each client a random time from half of this to one and a half of it."),
    key!(sse.compression, Switch, "Compress where the client accepts gzip."),

    key!(jwt.secret_key, Optional(Secret(rule::JWT_SECRET)), "The secret that HS algorithms share with the issuer: at least 16 bytes, better 32 random ones; for HS384 at least 48 and for HS512 at least 64.").alias("SECRET_KEY").secret().reloads(),
    key!(jwt.algorithms, List(OneOf(rule::JWT_ALGORITHMS)), "Accepted algorithms. HS… need jwt.secret_key, all others jwt.public_key_file or jwt.jwks_url.").alias("ALGORITHM"),
    key!(jwt.public_key_file, Optional(FilePath), "The issuer's public key: PEM, RSA of 2048 bits or more, EC P-256 or P-384, or Ed25519.").reloads(),
    key!(jwt.jwks_url, Optional(rule::JWKS_URL), "URL of the issuer's public keys (JWKS)."),
    key!(jwt.jwks_refresh, Time(10_000, 7 * DAY), "Interval of fetching these keys. A token signed with an unknown key causes a fetch at once, every 10 seconds at most."),
    key!(jwt.jwks_timeout, Time(100, 60_000), "Time for one fetch. While the issuer cannot be reached, the known keys stay in use."),
    key!(jwt.ca_file, Optional(FilePath), "Further CA certificates (PEM) for jwt.jwks_url."),
    key!(jwt.audience, List(rule::CLAIM), "Tokens must name one of these as audience (aud). Empty: tokens with an audience are refused."),
    key!(jwt.issuer, Optional(rule::CLAIM), "Required issuer of tokens (iss). Not set: any issuer that has the key."),
    key!(jwt.leeway, Time(0, 300_000), "Tolerated difference of the issuer's clock: a token is good until its exp plus this, and from its nbf minus this; an iat that is further ahead is refused."),
    key!(jwt.user_claim, rule::CLAIM, "The claim that names the user: 1 to 128 letters, digits and -_.~@+=|, or an integer."),
    key!(jwt.require_exp, Switch, "Refuse tokens that never expire."),
    key!(jwt.typ, Optional(rule::TYP), "Required type in the header (typ), such as \"at+jwt\"; compared without regard to case, with or without \"application/\". Not set: any type."),

    key!(api.keys, List(Secret(rule::API_KEY)), "Bearer keys with all scopes. Without any key the API answers every call with 401.").secret().reloads(),
    key!(api.key, ApiKeyTables, "Bearer keys with a name, which logs and metrics show, and scopes: [[api.key]] in the file. A secret_file is read again every few seconds.").secret().reloads(),
];

pub(super) const HOUR: u64 = 3_600_000;
pub(super) const DAY: u64 = 24 * HOUR;

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn names_are_unique_and_sections_known() {
        let mut seen = HashSet::new();
        for key in all() {
            assert!(seen.insert(key.path()), "{}", key.path());
            // One short name may set the same key of several families, and each key once.
            let alias = key.alias.map(|alias| format!("{} {}", key.section, alias.name));
            assert!(alias.is_none_or(|alias| seen.insert(alias)));
            // `wsproxy agent` has flags of its own.
            let command = if key.section == "tunnel_agent" { "agent" } else { "serve" };
            let flag = key.flag.map(|flag| format!("{command} --{}", flag.name));
            assert!(flag.is_none_or(|flag| seen.insert(flag)));
            assert!(SECTIONS.iter().any(|(section, _)| *section == key.section));
        }
    }
}
