//! The SQL database: credentials and status of agents, and the audit log. Knows neither the bus nor a connection.
//!
//! It is opened only where agents are served. Tables of an application are used as they are.

use std::{
    fmt,
    os::unix::fs::PermissionsExt,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
};

use tokio::sync::watch;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::warn;
use wsproxy_proto::names::Id;

use crate::{
    config::Config,
    database::{
        error::reveal,
        metrics::DatabaseCounters,
        migrate::NotReady,
        pool::Pool,
        schema::Schema,
        sql::Dialect,
        status::{AgentStatus, StatusQueue},
        supervisor::Rules,
        writes::Writes,
    },
    telemetry::throttle::Throttle,
};

pub mod adopt;
pub mod agents;
mod credentials;
pub mod error;
mod issue;
pub mod metrics;
pub mod migrate;
pub mod pool;
mod revoked;
pub mod schema;
pub mod secrets;
pub mod sql;
mod stale;
pub mod statement;
mod status;
mod supervisor;
pub mod url;
mod writes;

/// The database of an instance.
pub struct Database {
    pool: Pool,
    counters: DatabaseCounters,
    statuses: StatusQueue,
    /// Tables as they were found; `None` until they were looked at.
    schema: watch::Sender<Option<Arc<Schema>>>,
    /// Whether the last statement reached the database.
    answers: AtomicBool,
    writes: Writes,
    failures: Throttle,
}

/// The reason why a command has no database.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum OpenError {
    /// The configuration cannot be used.
    #[error("{0}")]
    Config(String),
    /// The database cannot be used now.
    #[error(transparent)]
    NotReady(#[from] NotReady),
}

/// State of the database, for `/health` and metrics.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DatabaseStatus {
    /// `postgresql` or `sqlite`.
    pub kind: &'static str,
    /// It answers, and its tables can be used.
    pub connected: bool,
    /// It takes what the gateway writes. A full disk, a lock or a read-only server makes it `false` until a write succeeds.
    pub writable: bool,
}

impl Database {
    /// Opens the database of a gateway. It connects and looks at the tables in the background, and tries for ever.
    ///
    /// # Errors
    /// The URL cannot be used, or the file cannot be made.
    pub fn start(
        config: &Config,
        background: &TaskTracker,
        end: &CancellationToken,
    ) -> Result<Arc<Self>, String> {
        let database = Arc::new(Self::new(config)?);
        if config.redis.url.is_some() && database.dialect() == Dialect::Sqlite {
            warn!(
                path = %config.database.file().display(),
                "Credentials of agents and the audit log are in a file of this instance, and other instances on the same \
                 Redis do not see it. Set database.url (DATABASE_URL) to share a PostgreSQL."
            );
        }
        let rules = Rules {
            migrate: config.database.migrate,
            is_alone: config.redis.url.is_none(),
            legacy: config.agents.legacy_secrets,
        };
        background.spawn(supervisor::run(Arc::clone(&database), rules, end.clone()));
        Ok(database)
    }

    /// Opens the database for a command: one attempt, without a background task.
    ///
    /// # Errors
    /// The configuration cannot be used, or [`NotReady`].
    pub async fn open(config: &Config) -> Result<Self, OpenError> {
        let database = Self::new(config).map_err(OpenError::Config)?;
        let schema = database.prepare(config.database.migrate).await?;
        database.schema.send_replace(Some(Arc::new(schema)));
        Ok(database)
    }

    /// Opens the database for `wsproxy migrate`: looks at nothing, and changes nothing.
    ///
    /// # Errors
    /// The configuration cannot be used.
    pub fn open_unprepared(config: &Config) -> Result<Self, OpenError> {
        Self::new(config).map_err(OpenError::Config)
    }

    fn new(config: &Config) -> Result<Self, String> {
        let settings = &config.database;
        let pool = match &settings.url {
            Some(url) => {
                let options = url::parse(reveal(url));
                let options =
                    options.map_err(|why| format!("database.url cannot be used: {why}"))?;
                Pool::postgres(options, settings.pool)
            }
            None => {
                let path = settings.file();
                open_file(&path)?
            }
        };
        Ok(Self {
            pool,
            counters: DatabaseCounters::default(),
            statuses: StatusQueue::default(),
            schema: watch::Sender::new(None),
            answers: AtomicBool::new(false),
            writes: Writes::default(),
            failures: Throttle::default(),
        })
    }

    /// Returns the connections, for parts with tables of their own. A [`statement::Statement`] gets one.
    #[must_use]
    pub const fn pool(&self) -> &Pool {
        &self.pool
    }

    /// Returns the counters.
    #[must_use]
    pub const fn counters(&self) -> &DatabaseCounters {
        &self.counters
    }

    /// Returns what is known of the tables; `None` until they were looked at.
    #[must_use]
    pub fn schema(&self) -> Option<Arc<Schema>> {
        self.schema.borrow().clone()
    }

    /// Resolves once the tables can be used.
    pub async fn ready(&self) -> Arc<Schema> {
        let mut schema = self.schema.subscribe();
        // The sender lives as long as `self`, so that waiting does not fail.
        let found = schema.wait_for(Option::is_some).await;
        found.ok().and_then(|schema| schema.clone()).unwrap_or_default()
    }

    /// Returns news of looks at the tables: at the start, and whenever the database has come back.
    pub(crate) fn looks(&self) -> watch::Receiver<Option<Arc<Schema>>> {
        let mut looks = self.schema.subscribe();
        looks.mark_changed();
        looks
    }

    /// Returns the state.
    #[must_use]
    pub fn status(&self) -> DatabaseStatus {
        let connected = self.answers.load(Relaxed) && self.schema.borrow().is_some();
        DatabaseStatus { kind: self.pool.kind(), connected, writable: !self.writes.fail() }
    }

    /// Notes that a user's agent is connected; written behind.
    pub fn connected(&self, user: &Id) {
        self.note(self.statuses.change(user, AgentStatus::Connected));
    }

    /// Notes that a user's agent is gone; written behind.
    pub fn disconnected(&self, user: &Id) {
        self.note(self.statuses.change(user, AgentStatus::Disconnected));
    }

    /// Notes a sign of life of a user's agent; written once a minute.
    pub fn seen(&self, user: &Id) {
        self.note(self.statuses.see(user));
    }

    /// Drops what waits of a user's connected agent, since its connection here has ended: another instance may write
    /// the end of a newer connection first.
    pub fn forget(&self, user: &Id) {
        self.statuses.forget(user);
    }

    fn dialect(&self) -> Dialect {
        match self.pool {
            Pool::Postgres(_) => Dialect::Postgres,
            Pool::Sqlite(_) => Dialect::Sqlite,
        }
    }

    fn note(&self, has_room: bool) {
        if !has_room {
            self.counters.status_lost.add(1);
        }
    }
}

impl fmt::Debug for Database {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Database").field("status", &self.status()).finish_non_exhaustive()
    }
}

fn open_file(path: &Path) -> Result<Pool, String> {
    let pool = Pool::sqlite(path)
        .map_err(|error| format!("database.path: {} cannot be opened: {error}", path.display()))?;
    let others = std::fs::metadata(path).map_or(0, |file| file.permissions().mode() & 0o077);
    if others != 0 {
        // An operator may have meant it, for example for backups.
        let path = path.display();
        warn!(%path, "Other users of this machine may read the credentials of agents: `chmod 600` the file and its -wal and -shm.");
    }
    Ok(pool)
}
