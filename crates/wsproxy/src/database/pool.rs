//! Connections to the database: PostgreSQL, or the embedded SQLite. Knows no table.

use std::{fs::OpenOptions, io, os::unix::fs::OpenOptionsExt, path::Path, time::Duration};

use sqlx::{
    ConnectOptions, Postgres, Sqlite,
    pool::{PoolConnection, PoolOptions},
    postgres::{PgConnectOptions, PgPool},
    sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePool, SqliteSynchronous},
};

/// Connections that are made when they are needed.
#[derive(Debug, Clone)]
pub enum Pool {
    /// A PostgreSQL, shared by all instances.
    Postgres(PgPool),
    /// A file of this instance.
    Sqlite(SqlitePools),
}

/// Connections to one SQLite file. Readers and the writer do not wait for each other.
#[derive(Debug, Clone)]
pub struct SqlitePools {
    /// Connections that only read.
    pub read: SqlitePool,
    /// The one connection that writes.
    pub write: SqlitePool,
}

/// Use of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// It only reads.
    Read,
    /// It writes, so that of SQLite it is the one writer.
    Write,
}

/// A connection that a caller holds for a moment.
#[derive(Debug)]
pub enum Connection {
    /// To a PostgreSQL.
    Postgres(PoolConnection<Postgres>),
    /// To the SQLite file.
    Sqlite(PoolConnection<Sqlite>),
}

impl Pool {
    /// Creates the pool of a PostgreSQL; connects to nothing.
    pub(super) fn postgres(options: PgConnectOptions, connections_max: u32) -> Self {
        let options = options.disable_statement_logging();
        Self::Postgres(pool_options(connections_max).connect_lazy_with(options))
    }

    /// Creates the pool of a SQLite file, and the file where it is absent.
    ///
    /// # Errors
    /// The file cannot be made, or opened.
    pub(super) fn sqlite(path: &Path) -> io::Result<Self> {
        // SQLite gives its further files, -wal and -shm, the mode of this one.
        let mut file = OpenOptions::new();
        file.create(true).append(true).mode(FILE_MODE).open(path)?;
        let options = SqliteConnectOptions::new()
            .filename(path)
            .journal_mode(SqliteJournalMode::Wal)
            // A revoked secret must stay revoked after a power failure.
            .synchronous(SqliteSynchronous::Full)
            .busy_timeout(SQLITE_BUSY_TIMEOUT)
            .disable_statement_logging();
        let read = options.clone().pragma("query_only", "true");
        Ok(Self::Sqlite(SqlitePools {
            read: pool_options(SQLITE_READERS).connect_lazy_with(read),
            write: pool_options(1).connect_lazy_with(options),
        }))
    }

    /// Returns the kind of the database, for log lines and `/health`.
    #[must_use]
    pub const fn kind(&self) -> &'static str {
        match self {
            Self::Postgres(_) => "postgresql",
            Self::Sqlite(_) => "sqlite",
        }
    }

    /// Takes a connection.
    ///
    /// # Errors
    /// No connection was free in time, or none can be made.
    pub(super) async fn acquire(&self, access: Access) -> Result<Connection, sqlx::Error> {
        match (self, access) {
            (Self::Postgres(pool), _) => pool.acquire().await.map(Connection::Postgres),
            (Self::Sqlite(pools), Access::Read) => {
                pools.read.acquire().await.map(Connection::Sqlite)
            }
            (Self::Sqlite(pools), Access::Write) => {
                pools.write.acquire().await.map(Connection::Sqlite)
            }
        }
    }

    /// Cuts all connections that nothing uses: after a restart of the server none of them is of use.
    pub(super) fn cut_idle(&self) {
        // A file has no server.
        if let Self::Postgres(pool) = self {
            while let Some(connection) = pool.try_acquire() {
                drop(connection.detach());
            }
        }
    }

    /// Returns whether the connections are closed, or about to be.
    pub(super) fn is_closed(&self) -> bool {
        match self {
            Self::Postgres(pool) => pool.is_closed(),
            Self::Sqlite(pools) => pools.write.is_closed(),
        }
    }

    /// Closes all connections, once they are not used any more.
    pub(super) async fn close(&self) {
        match self {
            Self::Postgres(pool) => pool.close().await,
            Self::Sqlite(pools) => {
                pools.read.close().await;
                pools.write.close().await;
            }
        }
    }
}

impl Connection {
    /// Cuts the connection, whatever state it is in: the pool makes another one.
    pub(super) fn cut(self) {
        match self {
            Self::Postgres(connection) => drop(connection.detach()),
            Self::Sqlite(connection) => drop(connection.detach()),
        }
    }
}

fn pool_options<DB: sqlx::Database>(connections_max: u32) -> PoolOptions<DB> {
    PoolOptions::new()
        .max_connections(connections_max)
        .acquire_timeout(ACQUIRE_TIMEOUT)
        .acquire_slow_threshold(LIFETIME)
        // A broken connection is found by its first statement, which is tried again.
        .test_before_acquire(false)
        .idle_timeout(IDLE_TIMEOUT)
        .max_lifetime(LIFETIME)
}

const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(2);
const SQLITE_BUSY_TIMEOUT: Duration = Duration::from_secs(5);
const SQLITE_READERS: u32 = 4;
const FILE_MODE: u32 = 0o600;
const IDLE_TIMEOUT: Duration = Duration::from_secs(600);
const LIFETIME: Duration = Duration::from_secs(1800);
