//! A database that is killed, frozen, full of other work, read-only or locked: handshakes fail fast, nothing hangs, and
//! all heals.

use std::time::{Duration, Instant};

use secrecy::ExposeSecret;
use serde_json::json;
use sqlx::{Connection, SqliteConnection, raw_sql};
use wsproxy::{
    config::Config,
    database::{error::DatabaseError, metrics::Operation, pool::Pool},
};

use super::{
    audit_log::TestDatabase,
    database::{NEW, Running, id},
};
use crate::{
    agents::stage::{Stage, call},
    support::{eventually, eventually_yes, gateway::Backend, postgres::PostgresServer},
};

fn config(server: &PostgresServer) -> Config {
    let mut config = Config::default();
    config.database.url = Some(server.url().into());
    config
}

async fn is_written(running: &Running, status: &str) {
    eventually_yes("the status is written", async || {
        running.database.show(&id("u1")).await.is_ok_and(|agent| agent.status == status)
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_postgres_is_a_503_until_it_is_back() {
    let mut server = PostgresServer::start().await;
    server.kill();
    let running = Running::start_away(&config(&server));
    let database = &running.database;
    assert_eq!(database.credential(&id("u1")).await.err(), Some(DatabaseError::Unavailable));
    server.restart().await;
    database.ready().await;
    let issued = database.issue(&id("u1"), NEW).await.unwrap();
    let secret = issued.secret.expose_secret();
    assert!(running.open("u1", secret).await.is_ok());

    // Every connection of the pool is broken, and a handshake does not notice.
    server.kill();
    server.restart().await;
    assert!(running.open("u1", secret).await.is_ok());

    server.kill();
    database.connected(&id("u1"));
    let begun = Instant::now();
    assert_eq!(database.credential(&id("u1")).await.err(), Some(DatabaseError::Unavailable));
    assert!(begun.elapsed() < Duration::from_millis(4500), "{:?}", begun.elapsed());
    assert!(!database.status().connected);
    server.restart().await;
    // The status was kept.
    is_written(&running, "connected").await;
    eventually_yes("it is up", async || database.status().connected).await;
    assert_eq!(database.counters().status_lost.value(), 0);
    running.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_that_comes_back_learns_who_is_gone() {
    let mut server = PostgresServer::start().await;
    let url = server.url();
    let stage =
        Stage::with(Backend::Memory, |config| config.database.url = Some(url.clone().into())).await;
    stage.add_user("u1").await;
    let database = stage.holder().families().agents.database.clone().unwrap();
    let sql = "UPDATE agent_credentials SET status = 'connected', last_seen = '2020-01-01'";
    server.query(sql).await;
    server.kill();
    // A change that cannot be written makes the instance notice.
    database.connected(&id("u2"));
    let failed_probes = || database.counters().errors[Operation::Probe as usize].value();
    eventually("the outage is noticed", || failed_probes() > 0).await;
    server.restart().await;
    eventually_yes("the row is corrected", async || {
        database.show(&id("u1")).await.is_ok_and(|agent| agent.status == "disconnected")
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_frozen_postgres_is_given_up_within_the_time_of_a_handshake() {
    let server = PostgresServer::start().await;
    let running = Running::start(&config(&server)).await;
    let database = &running.database;
    let issued = database.issue(&id("u1"), NEW).await.unwrap();
    server.stop();
    for _ in 0..12 {
        let begun = Instant::now();
        assert_eq!(database.credential(&id("u1")).await.err(), Some(DatabaseError::Unavailable));
        assert!(begun.elapsed() < Duration::from_millis(4800), "{:?}", begun.elapsed());
        if begun.elapsed() > Duration::from_secs(1) && !database.status().connected {
            break;
        }
    }
    // A handshake that gives up in the middle leaves no connection of no use behind.
    for _ in 0..20 {
        let hurry = Duration::from_millis(20);
        let _ = tokio::time::timeout(hurry, database.credential(&id("u1"))).await;
    }
    server.cont();
    eventually_yes("it answers again", async || {
        database.credential(&id("u1")).await.is_ok_and(|found| found.is_some())
    })
    .await;
    assert!(running.open("u1", issued.secret.expose_secret()).await.is_ok());
    running.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_frozen_postgres_does_not_hold_up_the_end() {
    let server = PostgresServer::start().await;
    let running = Running::start(&config(&server)).await;
    running.database.issue(&id("u1"), NEW).await.unwrap();
    running.database.connected(&id("u1"));
    server.stop();
    let begun = Instant::now();
    running.close().await;
    assert!(begun.elapsed() < Duration::from_secs(8), "{:?}", begun.elapsed());
    server.cont();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_read_only_postgres_opens_and_keeps_the_status() {
    let server = PostgresServer::start().await;
    let running = Running::start(&config(&server)).await;
    let database = &running.database;
    let issued = database.issue(&id("u1"), NEW).await.unwrap();
    let read_only = async |on: &str| {
        server.query(&format!("ALTER SYSTEM SET default_transaction_read_only = {on}")).await;
        server.query("SELECT pg_reload_conf()").await;
        let shown = async || server.query("SHOW default_transaction_read_only").await;
        eventually_yes("it took effect", async || shown().await == [[Some(on.to_owned())]]).await;
    };
    read_only("on").await;
    assert!(running.open("u1", issued.secret.expose_secret()).await.is_ok());
    database.connected(&id("u1"));
    let failed = || database.counters().errors[Operation::Status as usize].value();
    eventually_yes("a write failed", async || failed() > 0).await;
    assert!(running.open("u1", issued.secret.expose_secret()).await.is_ok());
    read_only("off").await;
    is_written(&running, "connected").await;
    assert_eq!(database.counters().status_lost.value(), 0);
    running.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_exhausted_pool_refuses_in_two_seconds() {
    let server = PostgresServer::shared().await;
    let mut config = Config::default();
    config.database.url = Some(server.url_of(&server.new_database().await).into());
    config.database.pool = 1;
    let running = Running::start(&config).await;
    let issued = running.database.issue(&id("u1"), NEW).await.unwrap();
    let Pool::Postgres(pool) = running.database.pool() else {
        panic!("it is a PostgreSQL");
    };
    let held = pool.acquire().await.unwrap();
    let begun = Instant::now();
    let refused = running.database.credential(&id("u1")).await.err();
    assert_eq!(refused, Some(DatabaseError::Unavailable));
    let took = begun.elapsed();
    assert!(took > Duration::from_millis(1900) && took < Duration::from_secs(4), "{took:?}");
    drop(held);
    eventually_yes("it is free", async || running.database.credential(&id("u1")).await.is_ok())
        .await;
    assert!(running.open("u1", issued.secret.expose_secret()).await.is_ok());
    running.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_locked_sqlite_opens_and_writes_when_it_is_free() {
    let place = TestDatabase::sqlite();
    let config = place.config();
    let running = Running::start(&config).await;
    let issued = running.database.issue(&id("u1"), NEW).await.unwrap();
    let url = format!("sqlite://{}", config.database.file().display());
    let mut other = SqliteConnection::connect(&url).await.unwrap();
    raw_sql("BEGIN IMMEDIATE").execute(&mut other).await.unwrap();
    running.database.connected(&id("u1"));
    for _ in 0..50 {
        let begun = Instant::now();
        assert!(running.open("u1", issued.secret.expose_secret()).await.is_ok());
        assert!(begun.elapsed() < Duration::from_secs(1), "readers wait for no writer");
    }
    let refused = || running.database.counters().errors[Operation::Status as usize].value() > 0;
    eventually_yes("a write is given up", async || refused()).await;
    raw_sql("ROLLBACK").execute(&mut other).await.unwrap();
    is_written(&running, "connected").await;
    assert_eq!(running.database.counters().status_lost.value(), 0);
    running.close().await;
}

/// Another process holds the lock for longer than a request has time.
#[tokio::test(flavor = "multi_thread")]
async fn a_secret_that_a_slow_database_may_store_is_not_retryable() {
    let stage = Stage::with(Backend::Memory, |config| {
        config.server.handshake_timeout = Duration::from_millis(700);
    })
    .await;
    let _agent = stage.agent("u-1").await;
    let path = stage.caller().gateway().config.database.file();
    let mut other =
        SqliteConnection::connect(&format!("sqlite://{}", path.display())).await.unwrap();
    raw_sql("BEGIN IMMEDIATE").execute(&mut other).await.unwrap();
    let asked = [
        ("POST", "/api/v1/agents/u-1/secrets", false),
        ("POST", "/api/v1/agents/u-1/secrets?replace=true", true),
        ("DELETE", "/api/v1/agents/u-1", true),
    ];
    for (method, path, retryable) in asked {
        let refused = stage.caller().api(method, path, "").await;
        let error = refused.json()["error"].clone();
        assert_eq!((refused.status, &error["code"]), (504, &json!("deadline")), "{refused:?}");
        assert_eq!(error["message"], "The database did not answer in time.");
        assert_eq!(error["retryable"], retryable, "{method} {path}");
    }
    raw_sql("ROLLBACK").execute(&mut other).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_shows_in_health_and_metrics_until_there_is_room() {
    let stage = Stage::start(Backend::Memory).await;
    let mut agent = stage.agent("u-1").await;
    let database = stage.caller().families().agents.database.clone().unwrap();
    let limit = async |pages: &str| {
        let Pool::Sqlite(pools) = database.pool() else { unreachable!() };
        let mut writer = pools.write.acquire().await.unwrap();
        let sql = sqlx::AssertSqlSafe(format!("PRAGMA max_page_count = {pages}"));
        raw_sql(sql).execute(&mut *writer).await.unwrap();
    };
    limit("1").await;
    let body = json!({ "tool": "t", "params": { "x": "y".repeat(50_000) } });
    let (answer, _) = tokio::join!(call(stage.caller(), "u-1", &body), agent.echo());
    assert_eq!(answer.status, 200);
    let writable = || stage.caller().metric("wsproxy_database_writable");
    eventually("writes fail", || writable() == 0.0).await;
    let health = stage.caller().api("GET", "/health", "").await;
    let seen = health.json();
    assert_eq!((health.status, &seen["status"]), (503, &json!("degraded")), "{seen}");
    let (connected, writable_there) =
        (&seen["database"]["connected"], &seen["database"]["writable"]);
    assert_eq!((connected, writable_there), (&json!(true), &json!(false)), "{seen}");
    limit("1000000").await;
    assert_eq!(stage.audited("u-1").await.outcome, "response");
    eventually("writes succeed", || writable() == 1.0).await;
    assert_eq!(stage.caller().api("GET", "/health", "").await.status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_of_sqlite_is_for_its_owner_only() {
    use std::os::unix::fs::PermissionsExt;
    let place = TestDatabase::sqlite();
    let config = place.config();
    let running = Running::start(&config).await;
    running.database.issue(&id("u1"), NEW).await.unwrap();
    let folder = config.database.file().parent().unwrap().to_owned();
    let mut names = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let entry = entry.unwrap();
        assert_eq!(entry.metadata().unwrap().permissions().mode() & 0o777, 0o600, "{entry:?}");
        names.push(entry.file_name().into_string().unwrap());
    }
    names.sort();
    assert_eq!(names, ["test.db", "test.db-shm", "test.db-wal"]);
    running.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_statement_is_counted_by_its_operation() {
    let server = PostgresServer::shared().await;
    let name = server.new_database().await;
    let mut config = Config::default();
    config.database.url = Some(server.url_of(&name).into());
    let running = Running::start(&config).await;
    let issued = running.database.issue(&id("u1"), NEW).await.unwrap();
    let hold = "BEGIN; SELECT 1 FROM agent_credentials FOR UPDATE; SELECT pg_sleep(2.5); COMMIT";
    let user = id("u1");
    let revoked = async || {
        // The other session has the lock first.
        let waits = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'PgSleep'";
        eventually_yes("the row is locked", async || {
            server.query_in(&name, waits).await == [[Some("1".to_owned())]]
        })
        .await;
        running.database.revoke(&user, Some(issued.id)).await
    };
    let (_, revoked) = tokio::join!(server.query_in(&name, hold), revoked());
    assert_eq!(revoked.unwrap().secrets, 1);
    let slow = &running.database.counters().slow;
    let counts = slow.each_ref().map(|counter| counter.value());
    assert_eq!((counts[Operation::Secrets as usize], counts.iter().sum()), (1, 1));
    running.close().await;
}
