//! What every part of a running instance shares; made once by `server.rs`.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use tokio_util::{sync::CancellationToken, task::TaskTracker};
use wsproxy_conn::{Heartbeat, Profile, Runtime, clock::Micros, driver::TAKEN_BYTES_MAX};
use wsproxy_proto::{
    names::Names,
    rate::{ByteRate, Rate},
    ws::receiver::Limits,
};

use crate::{
    auth::{api_keys::ApiKeys, jwt::JwtVerifier},
    bus::Bus,
    config::Config,
    endpoint::{caller::Texts, events::EventEndpoint, session::SessionEndpoint},
    http::{
        admission::{Attempts, Places, Resumes},
        sockets::Sockets,
        sse::open::OpenStreams,
    },
    hub::{Histories, Hub},
    registry::{Registry, lease::Lease, sessions::SessionLog},
    store::Store,
    telemetry::{
        metrics::Metrics,
        throttle::{Throttle, Throttles},
    },
};

/// A running instance.
pub struct Gateway {
    /// The configuration, validated.
    pub config: Config,
    /// Which instance this is.
    pub server_id: Arc<str>,
    /// How keys and channels are spelled.
    pub names: Names,
    /// Local fan-out.
    pub hub: Arc<Hub>,
    /// The transport below it, for its status only.
    pub bus: Bus,
    /// Keys that expire.
    pub store: Store,
    /// Timers and budget of all connections.
    pub runtime: Arc<Runtime>,
    /// The event streams, which are no links.
    pub event_streams: Arc<OpenStreams>,
    /// The places for connections of clients.
    pub places: Arc<Places>,
    /// The places for handshakes whose credentials are not checked yet.
    pub handshakes: Arc<Places>,
    /// The sockets on the port of clients.
    pub sockets: Arc<Sockets>,
    /// Attempts per client address.
    pub attempts: Attempts,
    /// Resumes per session and per user.
    pub resumes: Resumes,
    /// The keys of workers.
    pub api_keys: Arc<ApiKeys>,
    /// Failed calls of workers are logged through this.
    pub api_failures: Throttle,
    /// Refused handshakes, and what else clients can cause at will, are logged through this.
    pub lines: Throttles,
    /// What clients say of themselves.
    pub texts: Texts,
    /// Believes or refuses the tokens of the event endpoint; `None` where that is not served.
    pub jwt: Option<JwtVerifier>,
    /// Who is connected to the event endpoint; `None` where that is not served.
    pub registry: Option<Arc<Registry>>,
    /// The lease of this instance; `None` where nothing needs one.
    pub lease: Option<Arc<Lease>>,
    /// Where opened and closed sessions are kept; `None` where they are only announced.
    pub session_log: Option<Arc<SessionLog>>,
    /// `/{agent_id}/ws/{session_id}`
    pub sessions: Arc<SessionEndpoint>,
    /// `/ws`
    pub events: Arc<EventEndpoint>,
    /// The histories of sessions, where they have any.
    pub session_histories: Option<Arc<Histories>>,
    /// The histories of events, where they have any.
    pub event_histories: Option<Arc<Histories>>,
    /// What session connections have in common.
    pub session_profile: Arc<Profile>,
    /// What event connections have in common.
    pub event_profile: Arc<Profile>,
    /// What echo connections have in common.
    pub echo_profile: Arc<Profile>,
    /// Everything that is counted.
    pub metrics: Metrics,
    /// Tasks that must have ended before the process does.
    pub tasks: TaskTracker,
    /// Cancelled when HTTP followers must end.
    pub followers_end: CancellationToken,
    /// Whether it is ending, and takes no further connection.
    pub draining: AtomicBool,
    /// When it started.
    pub started: Instant,
}

impl Gateway {
    /// Whether no further connection is taken.
    pub fn is_draining(&self) -> bool {
        self.draining.load(Relaxed)
    }

    /// Time since the start.
    pub fn uptime(&self) -> Duration {
        self.started.elapsed()
    }
}

/// What the connections of an endpoint have in common under this configuration.
#[must_use]
pub fn profile(config: &Config) -> Profile {
    let limits = &config.limits;
    let idle = config.heartbeat.idle_timeout;
    Profile {
        receive: Limits {
            message_bytes_max: limits.max_message_bytes,
            // The first frame is a fragment too, and the codec counts those behind it.
            fragments_max: limits.max_fragments,
        },
        send_buffer_bytes: limits.send_buffer_bytes,
        reply_bytes_max: REPLY_BYTES_MAX,
        events_max: EVENTS_MAX,
        event_bytes_max: EVENT_BYTES_MAX,
        rate: Rate::new(limits.messages_per_second, 1000, limits.message_burst),
        byte_rate: ByteRate::new(limits.bytes_per_second, limits.bytes_burst, TAKEN_BYTES_MAX),
        heartbeat: Heartbeat::Frames,
        heartbeat_interval: config.heartbeat.interval.into(),
        heartbeat_timeout: config.heartbeat.timeout.into(),
        idle_timeout: if idle.is_zero() { Micros::NEVER } else { idle.into() },
        close_timeout: CLOSE_TIMEOUT,
        compress_from_bytes: config.compression.threshold_bytes,
        compress_level: config.compression.level,
        stats: wsproxy_conn::Stats::default(),
    }
}

/// What the connections of the event endpoint have in common.
#[must_use]
pub fn event_profile(config: &Config) -> Profile {
    Profile {
        heartbeat: Heartbeat::Messages,
        // Its heartbeats are messages, so that no connection is ever idle.
        idle_timeout: Micros::NEVER,
        // Whoever resumes may get all that three logs hold at once, and every message may want an `ack`.
        events_max: EVENTS_MAX.saturating_add(
            usize::try_from(config.history.entries_max).unwrap_or(usize::MAX).saturating_mul(3),
        ),
        event_bytes_max: config.limits.send_buffer_bytes.saturating_mul(2),
        ..profile(config)
    }
}

/// Most commands of workers and the like that may wait for a connection's handler.
const EVENTS_MAX: usize = 1024;

/// Most bytes of them.
const EVENT_BYTES_MAX: usize = 1024 * 1024;

/// A client that leaves so much unread which it caused itself is not read until it reads.
const REPLY_BYTES_MAX: usize = 64 * 1024;

/// How long a close handshake may take.
const CLOSE_TIMEOUT: Micros = Micros(5_000_000);
