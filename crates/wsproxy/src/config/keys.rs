//! The table of all keys: the one place that says what can be set, how, and what it means.
//!
//! Loading, `config example`, `config show`, the flags and `docs/configuration.md` are read off it.

use super::{
    Config, DownFrames, EventIds, ForwardedHeader, LogFormat, NoReceiver, OnBusLoss,
    api_key::ApiKeyTables,
    environment::PREFIX,
    kind::{
        Address, Bytes, File, Kind, List, Network, Number, OneOf, Optional, Raw, Seconds, Secret,
        Share, Switch, Time,
    },
    origin::OriginKind,
    rule,
};

/// One key of the file.
#[derive(Debug)]
pub struct Key {
    /// Its section.
    pub section: &'static str,
    /// Its name there.
    pub name: &'static str,
    /// One or two sentences.
    pub doc: &'static str,
    /// The short name in the environment.
    pub alias: Option<Alias>,
    /// The flag of the command line.
    pub flag: Option<Flag>,
    /// Never shown; may be read from a file that `NAME_FILE` names.
    pub secret: bool,
    pub(super) allowed: fn() -> String,
    pub(super) explain: fn(&Raw) -> Option<String>,
    pub(super) read: fn(&mut Config, &Raw) -> bool,
    pub(super) write: fn(&Config) -> String,
}

/// A flag of the command line.
#[derive(Debug, Clone, Copy)]
pub struct Flag {
    /// Its name, without dashes.
    pub name: &'static str,
    /// The name of its value in the help.
    pub value: &'static str,
}

/// A short name in the environment, beside the one that begins with [`PREFIX`].
#[derive(Debug, Clone, Copy)]
pub struct Alias {
    /// Its name.
    pub name: &'static str,
    /// The unit of a bare number, where it is not that of the key.
    pub unit: &'static str,
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

    const fn alias(mut self, name: &'static str) -> Self {
        self.alias = Some(Alias { name, unit: "" });
        self
    }

    const fn alias_ms(mut self, name: &'static str) -> Self {
        self.alias = Some(Alias { name, unit: "ms" });
        self
    }

    const fn flag(mut self, name: &'static str, value: &'static str) -> Self {
        self.flag = Some(Flag { name, value });
        self
    }

    const fn secret(mut self) -> Self {
        self.secret = true;
        self
    }
}

/// A key whose value is the field of the same name, or the one that is named.
macro_rules! key {
    ($section:ident.$name:ident, $kind:expr, $doc:literal) => {
        key!($section.$name => $name, $kind, $doc)
    };
    ($section:ident.$name:ident => $field:ident, $kind:expr, $doc:literal) => {
        Key {
            section: stringify!($section),
            name: stringify!($name),
            doc: $doc,
            alias: None,
            flag: None,
            secret: false,
            allowed: || allowed(&$kind, |config| &config.$section.$field),
            explain: |raw| explain(&$kind, |config| &config.$section.$field, raw),
            read: |config, raw| {
                let value = $kind.read(raw);
                value.map(|value| config.$section.$field = value).is_some()
            },
            write: |config| $kind.write(&config.$section.$field),
        }
    };
}

/// An endpoint family that this version does not have: configurations may already switch it off.
const fn absent(name: &'static str) -> Key {
    Key {
        section: "endpoints",
        name,
        doc: "Not in this version.",
        alias: None,
        flag: None,
        secret: false,
        allowed: || "false, since this endpoint is not in this version".into(),
        explain: |_| None,
        read: |_, raw| Switch.read(raw) == Some(false),
        write: |_| "false".into(),
    }
}

/// The field tells which [`Kind`] is meant where one serves several types.
fn allowed<T, K: Kind<T>>(kind: &K, _: fn(&Config) -> &T) -> String {
    kind.allowed()
}

fn explain<T, K: Kind<T>>(kind: &K, _: fn(&Config) -> &T, raw: &Raw) -> Option<String> {
    kind.explain(raw)
}

/// The sections, in the order of the file.
pub static SECTIONS: &[(&str, &str)] = &[
    ("server", "Where clients arrive and how the instance ends."),
    ("admin", "Health, metrics and the API, on a port of their own where one is set."),
    ("redis", "The bus. Without a URL the embedded one is used: one instance, nothing to install."),
    ("limits", "What one connection and the process may use."),
    ("heartbeat", "How dead and idle connections are found."),
    ("rate_limit", "Connection attempts per client address."),
    ("compression", "permessage-deflate."),
    ("log", "What is logged, to standard error."),
    ("endpoints", "Which endpoint families are served."),
    ("sessions", "The session endpoint, /{agent_id}/ws/{session_id}."),
    ("events", "The event endpoint, /ws."),
    (
        "history",
        "Bounds of each channel's history. Workers that publish by script must give the same.",
    ),
    ("sse", "Server-sent events, at the URLs of sessions and events."),
    (
        "jwt",
        "Whose JSON Web Tokens are believed: those signed with a shared secret, or with a private key whose public half is in a file or published as a JWKS.",
    ),
    ("api", "HTTP for workers without Redis, below /api/v1."),
];

/// Variables of endpoints which this version does not have. A deployment may set them for other
/// services, so they are accepted, named once in the log, and ignored.
pub static IGNORED: &[&str] = &["DATABASE_URL"];

/// Keys of earlier versions, each with what to do instead: a configuration that sets one must not lose silently what
/// its operator wanted.
pub(super) static REMOVED: &[(&str, &str)] = &[(
    "sessions.sse_token",
    "was removed: the token itself says its kind now. One that begins with \"sse.\" opens event streams until it \
     expires (`wsproxy token --event-stream`), every other token opens one connection or event stream, once",
)];

/// Every key, by section.
#[rustfmt::skip]
pub static KEYS: &[Key] = &[
    key!(server.bind, Address, "Address to listen on.").flag("bind", "ADDRESS"),
    key!(server.port, Number(0, 65_535), "Port to listen on; 0 takes a free one.").flag("port", "PORT").alias("PORT"),
    key!(server.server_id, Optional(rule::SERVER_ID), "Name of the instance, for its own channels and the events of sessions. Not set: a fresh one at every start.").flag("server-id", "ID").alias("SERVER_ID"),
    key!(server.threads, Number(0, 1024), "Worker threads; 0: one per core.").flag("threads", "NUMBER"),
    key!(server.shutdown_timeout, Time(1_000, HOUR), "Everything must have ended this long after the first signal.").flag("shutdown-timeout", "TIME"),
    key!(server.drain_delay, Time(0, HOUR), "How long /ready says 503, and clients are still taken, before listeners stop: twice the time in which load balancers notice. `dev` takes 0."),
    key!(server.drain_spread, Time(0, HOUR), "Over which time connections are closed at the end, so that they do not all come back at once."),
    key!(server.handshake_timeout, Time(100, 300_000), "Deadline for all work on the bus and stores of one handshake; 504 beyond it."),
    key!(server.header_timeout, Time(100, 300_000), "A client must have sent its request head within this time."),
    key!(server.header_bytes_max, Bytes(1 << 10, 1 << 20), "Largest request head."),
    key!(server.trusted_proxies, List(Network), "Load balancers whose X-Forwarded-For or Forwarded is believed."),
    key!(server.forwarded_header, OneOf(&[("auto", ForwardedHeader::Auto), ("x-forwarded-for", ForwardedHeader::XForwardedFor), ("forwarded", ForwardedHeader::Forwarded)]), "Which of the two these load balancers write, so that the other one, which a client may have written, is ignored; auto: either, and where both are there they must name the same client."),
    key!(server.allowed_origins, List(OriginKind), "Browser origins that may connect. Empty: any."),

    key!(admin.bind, Optional(Address), "Address of the port below. Not set: that of [server]."),
    key!(admin.port, Optional(Number(0, 65_535)), "Port for health, metrics and API. Not set: they are served on the main port.").flag("metrics-port", "PORT").alias("METRICS_PORT"),

    key!(redis.url, Optional(Secret(rule::REDIS_URL)), "Redis that carries messages between instances and workers. Not set: the embedded bus. On a command line others can read it; prefer the environment or a file.").flag("redis-url", "URL").alias("REDIS_URL").secret(),
    key!(redis.channel_prefix, rule::PREFIX, "Put before every key and channel, with a colon, so that several deployments can share one Redis. Databases separate keys only: their channels are the same.").flag("channel-prefix", "PREFIX").alias("REDIS_CHANNEL_PREFIX"),
    key!(redis.connect_timeout, Time(100, 300_000), "Time to connect and authenticate."),
    key!(redis.response_timeout, Time(100, 300_000), "A connection to Redis on which nothing came for this long after a question is replaced."),
    key!(redis.probe_interval, Time(100, 300_000), "How often a message of the instance's own must come back over each connection; every tenth time also over a new one."),
    key!(redis.publish_queue_bytes, Bytes(64 << 10, 4 << 30), "Bound of what waits to be published; beyond it reading from clients pauses."),
    key!(redis.ca_file, Optional(File), "Further CA certificates (PEM) for rediss://."),

    key!(limits.max_connections, Number(0, 100_000_000), "Connections per instance; 0: as many as descriptors allow.").flag("max-connections", "NUMBER"),
    key!(limits.max_message_bytes, Bytes(1, 16 << 20), "Largest message, before and after inflating; close code 1009 beyond it."),
    key!(limits.max_fragments, Number(1, 131_072), "Most fragments of one message."),
    key!(limits.send_buffer_bytes, Bytes(1 << 10, 1 << 30), "Bound of what waits for one client; beyond it the connection is closed with 1008."),
    key!(limits.send_buffers_total_bytes, Bytes(1 << 20, 1 << 40), "Bound of what waits for all clients; beyond it the worst offender is closed."),
    key!(limits.messages_per_second, Number(0, 1_000_000), "Messages per second and connection; 0: no limit."),
    key!(limits.message_burst, Number(1, 1_000_000), "How many of them may come at once."),
    key!(limits.store_bytes, Bytes(1 << 20, 1 << 40), "What the embedded store may hold (without Redis)."),
    key!(limits.store_logs_share, Share, "The part of it that logs and token streams may take; the rest is for tokens."),
    key!(limits.bytes_per_second, Bytes(0, 16 << 30), "Bytes per second and connection, counted as they come and what compressed messages grow by; reading pauses beyond it. 0: no limit."),
    key!(limits.bytes_burst, Bytes(0, 16 << 30), "How many of them may come at once."),
    key!(limits.connections_per_user, Number(0, 100_000_000), "Connections of one user of the event endpoint at one instance, WebSockets and event streams together; 429 beyond it. 0: no limit."),
    key!(limits.connections_per_session, Number(0, 100_000_000), "Connections of one session at one instance, WebSockets and event streams together; 429 beyond it. 0: no limit."),
    key!(limits.resumes_per_second, Number(0, 1_000_000), "Resumes of one session, or of one user of the event endpoint, per second, and five times as many at once; 429 beyond it. 0: no limit."),

    key!(heartbeat.interval, Time(100, HOUR), "A ping is sent when nothing arrived for this long.").alias_ms("HEARTBEAT_INTERVAL"),
    key!(heartbeat.timeout, Time(100, DAY), "A connection from which nothing arrived for this long is dead.").alias_ms("HEARTBEAT_TIMEOUT"),
    key!(heartbeat.idle_timeout, Time(0, 30 * DAY), "A connection without data messages for this long is closed with 4003; 0: never."),

    key!(rate_limit.max_requests, Number(0, 100_000_000), "Attempts per address and window; 0: no limit. Behind a proxy set server.trusted_proxies too.").alias("RATE_LIMIT_MAX_REQUESTS"),
    key!(rate_limit.window_seconds => window, Seconds(1, 86_400), "The window, in seconds.").alias("RATE_LIMIT_WINDOW_SECONDS"),

    key!(compression.enabled, Switch, "Negotiate it where the client offers it."),
    key!(compression.threshold_bytes, Bytes(0, 16 << 20), "Messages shorter than this are sent as they are."),
    key!(compression.level, Number(1, 9), "1 (fast) to 9 (small)."),
    key!(compression.client_context_takeover, Switch, "Let clients keep their compression context between messages: costs up to 48 KB a connection."),

    key!(log.level, rule::LEVEL, "How much is logged.").flag("log-level", "LEVEL").alias("LOG_LEVEL"),
    key!(log.format, OneOf(&[("auto", LogFormat::Auto), ("json", LogFormat::Json), ("pretty", LogFormat::Pretty)]), "How lines look; auto: pretty on a terminal, else JSON.").flag("log-format", "FORMAT"),

    key!(endpoints.sessions, Switch, "/{agent_id}/ws/{session_id}"),
    key!(endpoints.events, Switch, "/ws; needs a key in [jwt]."),
    key!(endpoints.echo, Switch, "/echo: answers every message with itself; for conformance suites."),
    absent("rooms"),
    absent("agents"),
    absent("tunnel"),

    key!(sessions.no_receiver, OneOf(&[("ignore", NoReceiver::Ignore), ("error", NoReceiver::Error), ("queue", NoReceiver::Queue)]), "What a client's message meets when no worker listens: nothing, an error message, or the stream {session:<id>:up}:log."),
    key!(sessions.up_log_entries_max, Number(1, 1_000_000), "Most entries of that stream."),
    key!(sessions.up_log_bytes_max, Bytes(1 << 10, 1 << 30), "Most bytes of that stream."),
    key!(sessions.up_log_ttl, Time(1_000, 30 * DAY), "It expires this long after its last entry."),
    key!(sessions.strikes_max, Number(0, 1_000_000), "Invalid messages after which a connection is closed; 0: never."),
    key!(sessions.down_frames, OneOf(&[("auto", DownFrames::Auto), ("text", DownFrames::Text), ("binary", DownFrames::Binary)]), "How messages from workers are framed; auto: text where they are UTF-8, else binary."),
    key!(sessions.on_bus_loss, OneOf(&[("notice", OnBusLoss::Notice), ("close", OnBusLoss::Close)]), "What clients are told after a loss of the bus: one bus_recovered message, or close code 1012."),
    key!(sessions.token_ttl, Time(1_000, DAY), "How long a token lives which the API or `wsproxy token` made."),

    key!(sessions.history, Switch, "Clients can resume what workers publish with history, over instances and restarts."),
    key!(sessions.capture, Switch, "Take plain publishes of JSON with an event_id into the history too."),
    key!(sessions.events_log, Switch, "Keep announcements of opened and closed sessions in the stream {agent:{agent_id}:sessions}:log, at least once, also for an instance that was killed."),
    key!(sessions.events_log_entries_max, Number(1, 10_000_000), "Most entries of such a log."),
    key!(sessions.events_log_ttl, Time(1_000, 30 * DAY), "How long an entry is held, and a log after its last entry."),
    key!(sessions.event_ids, OneOf(&[("json", EventIds::Json), ("none", EventIds::None)]), "Whether JSON objects of the history carry their id as first member event_id; without it only the subprotocol wsproxy.id.v1 tells ids."),

    key!(events.history, Switch, "Clients can resume, over instances and restarts."),
    key!(events.capture, Switch, "Take plain publishes with an event_id into the history too."),
    key!(events.strikes_max, Number(0, 1_000_000), "Invalid messages after which a connection is closed; 0: never."),
    key!(events.on_bus_loss, OneOf(&[("notice", OnBusLoss::Notice), ("close", OnBusLoss::Close)]), "What clients are told after a loss of the bus where there is no history: one bus_recovered message, or close code 1012."),
    key!(events.ack_interval, Time(100, HOUR), "A message that wants an ack is sent again after this time.").alias("MESSAGE_RETRY_INTERVAL"),
    key!(events.ack_tries, Number(1, 100), "How often it is sent before it is reported."),
    key!(events.ack_queue, Number(1, 100_000), "Most messages of a connection that wait for an ack.").alias("MESSAGE_QUEUE_SIZE"),
    key!(events.registry_ttl, Time(10_000, 30 * DAY), "How long the registry keeps what nobody refreshes."),
    key!(events.revocation_ttl, Time(1_000, 400 * DAY), "The longest revocation (revoke_seconds) that the API takes; a longer one is refused. At least as long as tokens live."),

    key!(history.entries_max, Number(1, 1_000_000), "Most entries of a log."),
    key!(history.bytes_max, Bytes(1 << 10, 1 << 30), "Most bytes of a log."),
    key!(history.ttl, Time(1_000, 30 * DAY), "How long an entry is held, and a log after its last entry."),

    key!(sse.enabled, Switch, "Answer Accept: text/event-stream."),
    key!(sse.keep_alive, Time(100, HOUR), "A comment is sent when nothing else was for this long, so that proxies keep the stream open."),
    key!(sse.retry, Time(0, HOUR), "How long a client is told to wait before it reconnects; each is told another time, from half of this to one and a half of it."),
    key!(sse.compression, Switch, "Compress where the client accepts gzip."),

    key!(jwt.secret_key, Optional(Secret(rule::JWT_SECRET)), "The secret that the HS algorithms share with whoever issues tokens: at least 16 bytes, better 32 random ones; for HS384 at least 48 and for HS512 at least 64.").alias("SECRET_KEY").secret(),
    key!(jwt.algorithms, List(OneOf(rule::JWT_ALGORITHMS)), "The algorithms that are accepted. HS… need jwt.secret_key, all others jwt.public_key_file or jwt.jwks_url.").alias("ALGORITHM"),
    key!(jwt.public_key_file, Optional(File), "The issuer's public key: PEM, RSA of 2048 bits or more, EC P-256 or P-384, or Ed25519."),
    key!(jwt.jwks_url, Optional(rule::JWKS_URL), "Where the issuer publishes its public keys."),
    key!(jwt.jwks_refresh, Time(10_000, 7 * DAY), "How often they are fetched. A token signed with an unknown key has them fetched at once, every 10 seconds at most."),
    key!(jwt.jwks_timeout, Time(100, 60_000), "Time for one fetch. While the issuer cannot be reached the keys that are known stay in use."),
    key!(jwt.ca_file, Optional(File), "Further CA certificates (PEM) for jwt.jwks_url."),
    key!(jwt.audience, List(rule::CLAIM), "Tokens must be for one of these (aud). Empty: tokens that are for somebody in particular are refused."),
    key!(jwt.issuer, Optional(rule::CLAIM), "Tokens must be issued by this one (iss). Not set: by anybody who has the key."),
    key!(jwt.leeway, Time(0, 300_000), "By how much the issuer's clock may differ from ours: a token is good until its exp and this, from its nbf less this, and an iat that is further ahead is refused."),
    key!(jwt.user_claim, rule::CLAIM, "The claim that names the user: 1 to 128 letters, digits and -_.~@+=|, or an integer."),
    key!(jwt.require_exp, Switch, "Refuse tokens that never expire."),
    key!(jwt.typ, Optional(rule::TYP), "Tokens must say in their header that they are of this type (typ), such as \"at+jwt\"; compared without regard to case, with or without \"application/\". Not set: of any."),

    key!(api.keys, List(Secret(rule::API_KEY)), "Bearer keys with all scopes. Without any key the API answers 401 to everybody.").secret(),
    key!(api.key, ApiKeyTables, "Bearer keys with a name, which logs and metrics show, and scopes: [[api.key]] in the file. A secret_file is read again every few seconds.").secret(),
];

const HOUR: u64 = 3_600_000;
const DAY: u64 = 24 * HOUR;

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn names_are_unique_and_sections_known() {
        let mut seen = HashSet::new();
        for key in KEYS {
            assert!(seen.insert(key.path()), "{}", key.path());
            assert!(key.alias.is_none_or(|alias| seen.insert(alias.name.into())));
            assert!(key.flag.is_none_or(|flag| seen.insert(format!("--{}", flag.name))));
            assert!(SECTIONS.iter().any(|(section, _)| *section == key.section));
        }
    }
}
