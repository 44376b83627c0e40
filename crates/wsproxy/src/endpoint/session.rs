//! Sessions: a channel each way between the clients of a session and its workers. State that all sessions share.

use std::sync::Arc;

use tokio_util::{sync::CancellationToken, task::TaskTracker};
use wsproxy_conn::Profile;
use wsproxy_proto::names::Names;

use crate::{
    config,
    core::{self, Core},
    hub::track::Histories,
    logic::upstream::UpstreamCounters,
    registry::sessions::{self, SessionLog},
    telemetry::{counter::Counter, throttle::Throttle},
};

pub mod announcements;
pub mod api;
pub mod entrance;
pub mod logic;
mod metrics;
pub mod token_streams;

/// The session family of an instance.
pub struct Sessions {
    /// Section `[sessions]` of the configuration.
    config: config::sessions::SessionsConfig,
    /// Names of channels and keys.
    names: Names,
    /// Id of this instance.
    server_id: Arc<str>,
    /// Settings and counters that all connections share.
    pub profile: Arc<Profile>,
    /// Histories of sessions; `None` if `sessions.history` is off.
    histories: Option<Arc<Histories>>,
    /// Log of opened and closed sessions; `None`: they are only announced.
    pub log: Option<Arc<SessionLog>>,
    /// Counters that the metrics read.
    counters: SessionCounters,
}

impl Sessions {
    /// Starts the family: the log of sessions, and the reaper of token streams.
    pub(super) fn start(
        core: &Arc<Core>,
        background: &TaskTracker,
        end: &CancellationToken,
    ) -> Arc<Self> {
        let (config, names) = (&core.config, &core.names);
        let logs = config.endpoints.sessions && config.sessions.events_log;
        let log = logs.then(|| {
            let limits = sessions::SessionLogLimits::new(&config.sessions);
            SessionLog::start(limits, &core.hub, &core.bus, core.lease())
        });
        let histories = config.sessions.history.then(|| {
            Arc::new(Histories {
                limits: config.history.limits(),
                names: names.clone(),
                clock: None,
                unresumable_prefix: None,
                adopt_plain: config.sessions.capture,
            })
        });
        if histories.is_some() {
            background.spawn(token_streams::reap(Arc::clone(core), end.clone()));
        }
        Arc::new(Self {
            config: config.sessions.clone(),
            names: names.clone(),
            server_id: Arc::clone(&core.server_id),
            profile: Arc::new(core::profile(config)),
            histories,
            log,
            counters: SessionCounters::default(),
        })
    }

    /// Writes the entries that still wait for the log.
    pub(super) async fn close(&self) {
        if let Some(log) = &self.log {
            log.close().await;
        }
    }
}

/// Counters of sessions, beyond those of each connection.
#[derive(Debug, Default)]
pub struct SessionCounters {
    /// Messages of clients.
    pub upstream: UpstreamCounters,
    /// Workers' commands that were invalid.
    pub bad_commands: Counter,
    /// Announcements of opened and closed sessions that the bus did not take.
    pub unannounced: Counter,
    /// Throttle of log lines about lost announcements.
    pub unannounced_lines: Throttle,
    /// Throttle of log lines about invalid commands.
    pub bad_command_lines: Throttle,
}
