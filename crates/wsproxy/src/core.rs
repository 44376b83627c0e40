//! `Core`: the state that all parts of a running instance share. Names no endpoint family.

use std::{
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use tokio_util::{sync::CancellationToken, task::TaskTracker};
use wsproxy_conn::{Heartbeat, Profile, Runtime, clock::Micros, driver::TAKEN_BYTES_MAX};
use wsproxy_proto::{
    names::Names,
    rate::{ByteRate, Rate},
    ws::{frame::Role, receiver::Limits},
};

use crate::{
    auth::{api_keys::ApiKeys, fixed_keys::FixedKeys},
    bus::Bus,
    client::open_streams::OpenStreams,
    config::{Config, LimitsConfig, load::Origins},
    core::{
        admission::{Attempts, Resumes, Seats},
        caller::Texts,
        origins::AllowedOrigins,
        recent::Recent,
        sockets::Sockets,
        waiting::WaitingRoom,
    },
    hub::Hub,
    registry::lease::{self, Lease},
    store::Store,
    telemetry::{
        metrics::Metrics,
        report::Reports,
        throttle::{Throttle, Throttles},
    },
    traces::Tracer,
};

pub mod acks;
pub mod admission;
pub mod caller;
pub mod origins;
pub mod recent;
pub mod socket;
pub mod sockets;
pub mod waiting;

/// Shared state of a running instance.
pub struct Core {
    /// Validated configuration of the start. What a reload replaces is not read here: it has a field of its own.
    pub config: Config,
    /// Id of this instance.
    pub server_id: Arc<str>,
    /// Names of keys and channels.
    pub names: Names,
    /// Fan-out of messages to local clients.
    pub hub: Arc<Hub>,
    /// Bus below the hub, for its status.
    pub bus: Bus,
    /// Store of tokens, histories and token streams.
    pub store: Store,
    /// Timers and budget of all connections.
    pub runtime: Arc<Runtime>,
    /// Event streams; WebSockets are in `runtime`.
    pub event_streams: Arc<OpenStreams>,
    /// Seats for clients' connections.
    pub seats: Arc<Seats>,
    /// Seats for handshakes whose credentials are not checked yet.
    pub handshakes: Arc<Seats>,
    /// Sockets of the clients' port.
    pub sockets: Arc<Sockets>,
    /// Limit of attempts per client address.
    pub attempts: Arc<Attempts>,
    /// Limit of resumes per session and per user.
    pub resumes: Resumes,
    /// Requests that wait a moment for a peer.
    pub waiting_room: Arc<WaitingRoom>,
    /// Origins of browsers that may connect.
    pub allowed_origins: AllowedOrigins,
    /// Keys of JSON Web Tokens that the configuration names.
    pub jwt_keys: Arc<FixedKeys>,
    /// API keys of workers.
    pub api_keys: Arc<ApiKeys>,
    /// Throttle of log lines about workers' failed calls.
    pub api_failures: Throttle,
    /// Throttles of log lines that clients can cause at will, such as refused handshakes.
    pub lines: Throttles,
    /// Shared texts of clients' requests.
    pub texts: Texts,
    /// The last ended connections and refused handshakes.
    pub recent: Recent,
    /// Lease of this instance, once a family needs one.
    pub lease: OnceLock<Arc<Lease>>,
    /// Metrics of the instance.
    pub metrics: Metrics,
    /// Members of answers to operators beside the metrics.
    pub reports: Arc<Reports>,
    /// Traces, which are off unless a collector is configured.
    pub traces: Tracer,
    /// Tasks that must end before the process does.
    pub tasks: TaskTracker,
    /// Cancelled when HTTP followers must end.
    pub followers_end: CancellationToken,
    /// The instance was told to end. Load balancers see it at `/ready`; connections are still accepted.
    pub draining: AtomicBool,
    /// No further connection is accepted: `server.drain_delay` is over.
    pub closing: AtomicBool,
    /// Origins of the configuration's values, where they are known.
    pub origins: OnceLock<Origins>,
    /// Time of the start.
    pub started: Instant,
}

impl Core {
    /// Returns the lease of this instance. The first call starts it.
    pub fn lease(&self) -> &Arc<Lease> {
        self.lease.get_or_init(|| {
            let settings = lease::LeaseSettings::new(&self.config, &self.server_id, &self.names);
            Lease::start(settings, &self.bus)
        })
    }

    /// Returns whether the instance was told to end.
    pub fn is_draining(&self) -> bool {
        self.draining.load(Relaxed)
    }

    /// Returns whether no further connection is accepted.
    pub fn is_closing(&self) -> bool {
        self.closing.load(Relaxed)
    }

    /// Returns the time since the start.
    pub fn uptime(&self) -> Duration {
        self.started.elapsed()
    }
}

/// Makes the profile of an endpoint's connections.
#[must_use]
pub fn profile(config: &Config) -> Profile {
    let limits = &config.limits;
    let idle = config.heartbeat.idle_timeout;
    Profile {
        role: Role::Server,
        receive: Limits {
            message_bytes_max: limits.max_message_bytes,
            // `max_fragments` counts the first frame too; the codec counts the frames behind it.
            fragments_max: limits.max_fragments,
        },
        send_buffer_bytes: limits.send_buffer_bytes,
        low_water_bytes: limits.send_buffer_bytes / 4,
        reply_bytes_max: REPLY_BYTES_MAX,
        events_max: EVENTS_MAX,
        event_bytes_max: EVENT_BYTES_MAX,
        rate: message_rate(limits).into(),
        message_bytes: 0,
        byte_rate: byte_rate(limits).into(),
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

/// Returns the limit of the messages of one connection.
#[must_use]
pub fn message_rate(limits: &LimitsConfig) -> Option<Rate> {
    Rate::new(limits.messages_per_second, 1000, limits.message_burst)
}

/// Returns the limit of the bytes of one connection.
#[must_use]
pub fn byte_rate(limits: &LimitsConfig) -> Option<ByteRate> {
    ByteRate::new(limits.bytes_per_second, limits.bytes_burst, TAKEN_BYTES_MAX)
}

/// Upper bound of the events that wait for a connection's logic.
const EVENTS_MAX: usize = 1024;

/// Upper bound of their bytes.
const EVENT_BYTES_MAX: usize = 1024 * 1024;

/// Upper bound of waiting replies. Beyond it the client's socket is not read until the client reads.
const REPLY_BYTES_MAX: usize = 64 * 1024;

/// Upper bound of the duration of a close handshake.
const CLOSE_TIMEOUT: Micros = Micros(5_000_000);
