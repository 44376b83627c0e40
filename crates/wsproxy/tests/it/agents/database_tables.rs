//! Tables of the database: absent ones are created, those of an application stay as they are.

use std::{sync::Arc, time::Duration};

use secrecy::ExposeSecret;
use wsproxy::{
    config::Config,
    database::{Database, OpenError, error::SecretsError, migrate::NotReady, secrets::SecretId},
};

use super::{
    audit_log::TestDatabase,
    database::{NEW, Running, id},
};
use crate::support::{eventually_yes, postgres::PostgresServer};

/// A database with the tables of an application, and a configuration on it.
struct Application {
    server: Arc<PostgresServer>,
    name: String,
}

impl Application {
    async fn new() -> Self {
        let server = PostgresServer::shared().await;
        let name = server.new_database().await;
        server.query_in(&name, APPLICATION).await;
        Self { server, name }
    }

    /// A configuration of the owner of the tables.
    fn config(&self) -> Config {
        let mut config = Config::default();
        config.database.url = Some(self.server.url_of(&self.name).into());
        config
    }

    /// A configuration of a role that may read and write, but not create.
    async fn config_without_ddl(&self) -> Config {
        let role = format!("writer_{}", self.name);
        let sql = format!(
            "CREATE ROLE {role} LOGIN; ALTER ROLE {role} SET timezone = 'America/Lima'; \
             REVOKE CREATE ON SCHEMA public FROM PUBLIC; \
             GRANT SELECT, INSERT, UPDATE, DELETE ON agent_credentials, tool_execution_logs TO {role}; \
             GRANT USAGE ON SEQUENCE tool_execution_logs_id_seq TO {role}"
        );
        self.server.query_in(&self.name, &sql).await;
        let mut config = self.config();
        let url = self.server.url_of(&self.name).replace("postgres@", &format!("{role}@"));
        config.database.url = Some(url.into());
        config
    }

    async fn column(&self, sql: &str) -> Vec<String> {
        let rows = self.server.query_in(&self.name, sql).await;
        rows.into_iter().filter_map(|mut row| row.remove(0)).collect()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn tables_of_an_application_stay_as_they_are() {
    let application = Application::new().await;
    let before = application.column(SCHEMA).await;
    assert!(before.len() > 30, "{before:?}");
    let secret = "SELECT shared_secret FROM agent_credentials WHERE user_id = 'user_1'";
    let secret = application.column(secret).await.remove(0);
    for config in [application.config_without_ddl().await, application.config()] {
        let running = Running::start(&config).await;
        assert_eq!(running.open("user_1", &secret).await, Ok(SecretId::Clear));
        running.database.connected(&id("user_1"));
        eventually_yes("the status is written", async || {
            let agent = running.database.show(&id("user_1")).await.unwrap();
            agent.status == "connected"
        })
        .await;
        let sql = "SELECT abs(extract(epoch FROM (now() AT TIME ZONE 'UTC') - last_seen))::int \
                   FROM agent_credentials WHERE user_id = 'user_1'";
        let age: i32 = application.column(sql).await[0].parse().unwrap();
        assert!(age < 60, "{age}");
        running.close().await;
        assert_eq!(application.column(SCHEMA).await, before);
        application
            .column("UPDATE agent_credentials SET status = 'pending', last_seen = NULL")
            .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn without_the_right_to_create_agents_are_served_and_commands_tell_the_sql() {
    let application = Application::new().await;
    let running = Running::start(&application.config_without_ddl().await).await;
    let schema = running.database.schema().unwrap();
    assert!(!schema.has_secrets && !schema.log_has_outcome && !schema.log_has_index);
    let Err(SecretsError::NoTable(sql)) = running.database.issue(&id("u1"), NEW).await else {
        panic!("a secret was stored without its table");
    };
    assert!(sql.starts_with("CREATE TABLE agent_secrets"), "{sql}");
    // A user whose value is ours is refused, not opened by the hash.
    let value = "sha256$00112233445566778899aabbccddeeff$".to_owned() + &"0".repeat(64);
    let sql =
        format!("UPDATE agent_credentials SET shared_secret = '{value}' WHERE user_id = 'user_1'");
    application.column(&sql).await;
    assert!(running.open("user_1", &value).await.is_err());
    running.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn tables_that_the_gateway_may_not_read_count_as_absent() {
    let application = Application::new().await;
    let config = application.config_without_ddl().await;
    // The operator ran `migrate` as the owner, and granted nothing.
    Running::start(&application.config()).await.close().await;
    let running = Running::start(&config).await;
    assert!(!running.database.schema().unwrap().has_secrets);
    assert!(running.database.credential(&id("user_1")).await.unwrap().is_some());
    running.close().await;
    let role =
        application.column("SELECT rolname::text FROM pg_roles WHERE rolname LIKE 'writer_%'");
    let role = role.await.into_iter().find(|role| role.ends_with(&application.name)).unwrap();
    let grant = format!(
        "GRANT SELECT, INSERT, UPDATE, DELETE ON agent_secrets, wsproxy_migrations TO {role}"
    );
    application.column(&grant).await;
    let running = Running::start(&config).await;
    let issued = running.database.issue(&id("u1"), NEW).await.unwrap();
    assert!(running.open("u1", issued.secret.expose_secret()).await.is_ok());
    running.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_start_creates_the_absent_tables_beside_those_of_an_application() {
    let application = Application::new().await;
    let running = Running::start(&application.config()).await;
    let schema = running.database.schema().unwrap();
    assert!(schema.has_secrets && !schema.log_has_outcome);
    let issued = running.database.issue(&id("u1"), NEW).await.unwrap();
    assert!(running.open("u1", issued.secret.expose_secret()).await.is_ok());
    // The application deletes its row: the secrets go with it.
    application.column("DELETE FROM agent_credentials WHERE user_id = 'u1'").await;
    assert!(running.open("u1", issued.secret.expose_secret()).await.is_err());
    assert_eq!(application.column("SELECT count(*)::text FROM agent_secrets").await, ["0"]);
    running.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_operator_adds_columns_and_an_index() {
    let application = Application::new().await;
    let database = Database::open_unprepared(&application.config()).unwrap();
    let plan = database.plan(true).await.unwrap();
    let names: Vec<_> = plan.iter().map(|step| step.name).collect();
    let added = [
        "table agent_secrets",
        "table wsproxy_migrations",
        "row of wsproxy_migrations",
        "column outcome of tool_execution_logs",
        "column details of tool_execution_logs",
        "index of tool_execution_logs on created_at",
    ];
    assert_eq!(names, added);
    assert_eq!(application.column("SELECT to_regclass('agent_secrets')::text").await, [""; 0]);
    assert_eq!(database.migrate(true).await.unwrap(), plan);
    assert_eq!(database.migrate(true).await.unwrap(), []);
    database.close().await;
    let rows = "SELECT count(*)::text FROM tool_execution_logs WHERE outcome IS NULL";
    assert_eq!(application.column(rows).await, ["1000"]);
    let running = Running::start(&application.config()).await;
    let schema = running.database.schema().unwrap();
    assert!(schema.has_secrets && schema.log_has_outcome && schema.log_has_index);
    running.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn four_instances_that_start_together_make_the_tables_once() {
    for place in TestDatabase::both().await {
        let config = place.config();
        let start = || Running::start(&config);
        let (a, b, c, d) = tokio::join!(start(), start(), start(), start());
        assert_eq!(place.number("SELECT count(*) FROM wsproxy_migrations").await, 1);
        for running in [a, b, c, d] {
            let schema = running.database.schema().unwrap();
            assert!(schema.has_secrets && schema.log_has_outcome && schema.log_has_index);
            assert_eq!(running.database.counters().errors.each_ref().map(|c| c.value()), [0; 7]);
            running.close().await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_of_a_newer_version_is_refused() {
    for place in TestDatabase::both().await {
        Running::start(&place.config()).await.close().await;
        place.query("INSERT INTO wsproxy_migrations (version) VALUES (99)").await;
        let refused = Database::open(&place.config()).await.unwrap_err();
        let OpenError::NotReady(NotReady::Unusable(why)) = refused else { panic!("{refused:?}") };
        assert!(why.contains("schema 99"), "{why}");
        let running = Running::start_away(&place.config());
        let ready = tokio::time::timeout(Duration::from_secs(2), running.database.ready()).await;
        assert!(ready.is_err());
        assert!(running.database.credential(&id("u1")).await.is_err());
        assert!(!running.database.status().connected);
        // An operator goes back to the version before: no restart is needed.
        place.query("DELETE FROM wsproxy_migrations WHERE version = 99").await;
        running.database.ready().await;
        running.close().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn migrate_off_creates_nothing() {
    for place in TestDatabase::both().await {
        let mut config = place.config();
        config.database.migrate = false;
        let refused = Database::open(&config).await.unwrap_err().to_string();
        assert!(refused.contains("The table agent_credentials is absent"), "{refused}");
        assert!(refused.contains("CREATE TABLE agent_credentials"), "{refused}");
        config.database.migrate = true;
        Running::start(&config).await.close().await;
        config.database.migrate = false;
        Running::start(&config).await.close().await;
    }
    let application = Application::new().await;
    let mut config = application.config();
    config.database.migrate = false;
    let running = Running::start(&config).await;
    assert!(!running.database.schema().unwrap().has_secrets);
    assert_eq!(application.column("SELECT to_regclass('wsproxy_migrations')::text").await, [""; 0]);

    // An operator migrates while the gateway runs.
    let operator = Database::open_unprepared(&application.config()).unwrap();
    operator.migrate(false).await.unwrap();
    operator.close().await;
    running.database.look_again().await;
    let schema = running.database.schema().unwrap();
    assert!(schema.has_secrets && schema.log_has_outcome && !schema.log_has_index);
    running.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_schema_in_the_url_holds_the_tables() {
    let server = PostgresServer::shared().await;
    let name = server.new_database().await;
    server.query_in(&name, "CREATE SCHEMA \"App\"").await;
    let mut config = Config::default();
    config.database.url =
        Some(format!("{}?schema=App&connection_limit=1", server.url_of(&name)).into());
    let running = Running::start(&config).await;
    running.database.issue(&id("u1"), NEW).await.unwrap();
    running.close().await;
    let rows = server.query_in(&name, "SELECT count(*) FROM \"App\".agent_secrets").await;
    assert_eq!(rows, [[Some("1".to_owned())]]);
}

/// The tables of an existing application, with a user and its log.
const APPLICATION: &str = "
CREATE TABLE agent_credentials (
    user_id TEXT PRIMARY KEY, shared_secret TEXT NOT NULL UNIQUE,
    platform TEXT NOT NULL CHECK (platform IN ('win32', 'linux', 'darwin')),
    status TEXT NOT NULL DEFAULT 'pending' CHECK (status IN ('pending', 'connected', 'disconnected')),
    created_at TIMESTAMP NOT NULL DEFAULT NOW(), last_seen TIMESTAMP, metadata JSONB);
CREATE TABLE tool_execution_logs (
    id BIGSERIAL PRIMARY KEY, user_id TEXT NOT NULL, request_id TEXT NOT NULL, tool_name TEXT NOT NULL,
    params JSONB, result JSONB, success BOOLEAN, error TEXT, execution_time_ms INT,
    created_at TIMESTAMP NOT NULL DEFAULT NOW());
CREATE TABLE user_sessions (id BIGSERIAL PRIMARY KEY);
CREATE TABLE _sqlx_migrations (version BIGINT PRIMARY KEY, theirs TEXT);
INSERT INTO _sqlx_migrations VALUES (1, 'the application''s');
INSERT INTO agent_credentials (user_id, shared_secret, platform, created_at)
    SELECT 'user_' || n, md5(n::text) || md5((n + 1)::text), 'linux', '2020-01-01' FROM generate_series(1, 3) n;
INSERT INTO tool_execution_logs (user_id, request_id, tool_name, params, success, created_at)
    SELECT 'user_1', 'q-' || n, 'unknown', '{}', true, '2020-02-02' FROM generate_series(1, 1000) n;";

/// Everything about the application's tables that a start must not change.
const SCHEMA: &str = "
SELECT table_name || ' ' || column_name || ' ' || data_type || ' ' || is_nullable || ' ' || coalesce(column_default, '')
    FROM information_schema.columns WHERE table_schema = 'public'
    AND table_name NOT IN ('agent_secrets', 'wsproxy_migrations')
UNION ALL SELECT indexdef FROM pg_indexes WHERE schemaname = 'public'
    AND tablename NOT IN ('agent_secrets', 'wsproxy_migrations')
UNION ALL SELECT conrelid::regclass || ' ' || conname || ' ' || pg_get_constraintdef(oid) FROM pg_constraint
    WHERE conrelid IN ('agent_credentials'::regclass, 'tool_execution_logs'::regclass)
UNION ALL SELECT md5(string_agg(l::text, '' ORDER BY id)) FROM tool_execution_logs l
UNION ALL SELECT md5(string_agg(m::text, '')) FROM _sqlx_migrations m
UNION ALL SELECT md5(string_agg(concat(user_id, shared_secret, platform, created_at, metadata), '' ORDER BY user_id))
    FROM agent_credentials
ORDER BY 1";
