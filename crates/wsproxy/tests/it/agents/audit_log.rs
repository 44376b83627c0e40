//! An audit log for tests: over PostgreSQL or SQLite, with calls to write and rows to read.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime},
};

use sqlx::{AssertSqlSafe, Connection, Row, SqliteConnection, raw_sql};
use tempfile::TempDir;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use wsproxy::{
    audit::{
        Audit,
        row::{AuditRow, Stored},
    },
    config::Config,
    database::Database,
    telemetry::{metrics::Metrics, scrape::Source},
};
use wsproxy_proto::{agents::outcome::Outcome, names::Id};

use crate::support::{
    eventually,
    postgres::{Fields, PostgresServer},
};

/// A database of a test's own.
pub(super) enum TestDatabase {
    /// A database of this name.
    Postgres(Arc<PostgresServer>, String),
    /// A file in this folder.
    Sqlite(TempDir),
}

impl TestDatabase {
    /// One of each kind.
    pub(super) async fn both() -> [Self; 2] {
        [Self::postgres().await, Self::sqlite()]
    }

    pub(super) async fn postgres() -> Self {
        let server = PostgresServer::shared().await;
        let name = server.new_database().await;
        Self::Postgres(server, name)
    }

    pub(super) fn sqlite() -> Self {
        Self::Sqlite(tempfile::tempdir().unwrap())
    }

    /// A file on a file system of the test's own.
    pub(super) fn sqlite_in(folder: &Path) -> Self {
        Self::Sqlite(tempfile::tempdir_in(folder).unwrap())
    }

    /// A configuration on it.
    pub(super) fn config(&self) -> Config {
        let mut config = Config::default();
        match self {
            Self::Postgres(server, name) => {
                config.database.url = Some(server.url_of(name).into());
            }
            Self::Sqlite(_) => config.database.path = Some(self.file()),
        }
        config
    }

    pub(super) async fn query(&self, sql: &str) -> Vec<Fields> {
        match self {
            Self::Postgres(server, name) => server.query_in(name, sql).await,
            Self::Sqlite(_) => {
                let url = format!("sqlite://{}", self.file().display());
                let mut connection = SqliteConnection::connect(&url).await.unwrap();
                let rows = raw_sql(AssertSqlSafe(sql.to_owned())).fetch_all(&mut connection).await;
                let rows = rows.unwrap_or_else(|error| panic!("{error}: {sql}"));
                let fields = |row: &sqlx::sqlite::SqliteRow| {
                    (0..row.len()).map(|index| row.get_unchecked(index)).collect()
                };
                rows.iter().map(fields).collect()
            }
        }
    }

    /// The first field of each row.
    pub(super) async fn column(&self, sql: &str) -> Vec<Option<String>> {
        let rows = self.query(sql).await;
        rows.into_iter().map(|fields| fields.into_iter().next().flatten()).collect()
    }

    /// The one number that a query answers.
    pub(super) async fn number(&self, sql: &str) -> i64 {
        let column = self.column(sql).await;
        column.first().unwrap().as_deref().unwrap().parse().unwrap()
    }

    fn file(&self) -> PathBuf {
        match self {
            Self::Sqlite(folder) => folder.path().join("test.db"),
            Self::Postgres(..) => unreachable!("it has no file"),
        }
    }
}

/// A running audit log.
pub(super) struct Log {
    pub(super) audit: Arc<Audit>,
    pub(super) database: Arc<Database>,
    metrics: Metrics,
    background: TaskTracker,
    end: CancellationToken,
}

impl Log {
    /// Starts it, and waits until the tables are ready.
    pub(super) async fn start(config: &Config) -> Self {
        let log = Self::start_without_database(config);
        log.database.ready().await;
        log
    }

    /// Starts it while the database may be away.
    pub(super) fn start_without_database(config: &Config) -> Self {
        let (background, end) = (TaskTracker::new(), CancellationToken::new());
        let database = Database::start(config, &background, &end).unwrap();
        let audit = Audit::start(config, &"s-1".into(), &database, &background, &end);
        let metrics = Metrics::new();
        metrics.read([Arc::clone(&audit) as Arc<dyn Source>]);
        Self { audit, database, metrics, background, end }
    }

    /// Writes what waits, and ends.
    pub(super) async fn close(self) {
        self.audit.close().await;
        self.end.cancel();
        self.background.close();
        self.background.wait().await;
    }

    /// Number of rows with this outcome on the page of metrics.
    pub(super) fn rows(&self, outcome: &str) -> u64 {
        let text = self.metrics.text();
        let name = format!("wsproxy_audit_rows_total{{outcome=\"{outcome}\"}} ");
        let line = text.lines().find_map(|line| line.strip_prefix(&name));
        line.unwrap_or_else(|| panic!("{text}")).parse().unwrap()
    }

    /// Waits until all rows are written.
    #[track_caller]
    pub(super) fn written(&self) -> impl Future<Output = ()> {
        eventually("all rows are written", || self.audit.status().queued == 0)
    }

    /// Records a call of `u-1` whose result is this JSON.
    pub(super) fn record(&self, request: &str, result: &str) {
        self.record_call(request, self.audit.params(b"{}"), result.as_bytes());
    }

    /// The same with parameters, and any bytes.
    pub(super) fn record_call(&self, request: &str, params: Stored, result: &[u8]) {
        let (user, request) = (id("u-1"), id(request));
        let row = row(&user, &request, params);
        self.audit.record(AuditRow { result: Some(result), ..row });
    }
}

pub(super) fn id(text: &str) -> Id {
    Id::parse(text).unwrap()
}

/// A call that the agent answered.
pub(super) fn row<'a>(user: &'a Id, request: &'a Id, params: Stored) -> AuditRow<'a> {
    AuditRow {
        user,
        request,
        tool: "read_file",
        params,
        result: None,
        error: None,
        success: Some(true),
        outcome: Outcome::Response,
        execution_time: Some(b"12"),
        begun: SystemTime::now(),
        took: Duration::from_millis(15),
        caller: None,
        traceparent: None,
    }
}

/// The table of a log as an application made it, with rows of 2020.
pub(super) const FOREIGN_LOG: &str = "
    CREATE TABLE tool_execution_logs (
        id BIGSERIAL PRIMARY KEY, user_id TEXT NOT NULL, request_id TEXT NOT NULL, tool_name TEXT NOT NULL,
        params JSONB, result JSONB, success BOOLEAN, error TEXT, execution_time_ms INT,
        created_at TIMESTAMP DEFAULT now());
    INSERT INTO tool_execution_logs (user_id, request_id, tool_name, params, success, created_at)
        SELECT 'user_' || n, 'req_' || n, 'unknown', '{}', true, timestamp '2020-01-01' + n * interval '1 hour'
        FROM generate_series(1, 1000) AS n";
