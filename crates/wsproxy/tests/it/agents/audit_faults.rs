//! The audit log while its database is away, frozen, full or too slow.

use std::{process::Command, time::Duration};

use tempfile::TempDir;
use tokio::time::Instant;
use wsproxy::{config::Config, database::metrics::Operation};

use super::audit_log::{Log, TestDatabase};
use crate::support::{
    eventually, eventually_yes,
    fault_proxy::{Cut, FaultProxy, Faults},
    postgres::PostgresServer,
};

fn config(url: String) -> Config {
    let mut config = TestDatabase::sqlite().config();
    config.database.url = Some(url.into());
    config
}

/// Asserts that exactly the rows `q-0` up to `q-{count - 1}` are there, each once.
async fn assert_once(server: &PostgresServer, count: usize) {
    let sql = "SELECT count(*), count(DISTINCT request_id) FROM tool_execution_logs";
    let count = Some(count.to_string());
    assert_eq!(server.query(sql).await, [[count.clone(), count]]);
}

/// Statements of the log that failed.
fn failures(log: &Log) -> u64 {
    log.database.counters().errors[Operation::Audit as usize].value()
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_wait_while_the_database_is_killed() {
    let mut server = PostgresServer::start().await;
    let log = Log::start(&config(server.url())).await;
    let mut count = 0;
    let mut record = |rows: usize| {
        for n in count..count + rows {
            log.record(&format!("q-{n}"), "1");
        }
        count += rows;
    };
    for _ in 0..3 {
        // Some are being written when it is killed.
        record(2000);
        server.kill();
        record(1000);
        server.restart().await;
    }
    log.written().await;
    assert_eq!(log.rows("written"), 9000);
    assert_once(&server, 9000).await;
    log.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_wait_while_the_database_is_frozen() {
    let server = PostgresServer::start().await;
    let log = Log::start(&config(server.url())).await;
    server.stop();
    let start = Instant::now();
    for n in 0..2000 {
        log.record(&format!("q-{n}"), "1");
    }
    assert!(start.elapsed() < Duration::from_secs(2), "recording never waits");
    // Longer than the bound of a statement, so that the first batch is given up and tried again.
    tokio::time::sleep(Duration::from_secs(11)).await;
    assert_eq!(log.audit.status().queued, 2000);
    server.cont();
    log.written().await;
    assert_once(&server, 2000).await;
    log.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unanswered_commit_writes_no_row_twice() {
    let server = PostgresServer::start().await;
    let proxy = FaultProxy::start(server.port()).await;
    let url = format!("postgres://postgres@127.0.0.1:{}/postgres", proxy.port());
    let log = Log::start(&config(url)).await;
    // The commit takes a second, and does not care for the connection.
    server
        .query(
            "CREATE FUNCTION wait() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN PERFORM pg_sleep(1); RETURN NULL; END';
             CREATE CONSTRAINT TRIGGER wait AFTER INSERT ON tool_execution_logs DEFERRABLE INITIALLY DEFERRED \
             FOR EACH ROW WHEN (NEW.request_id = 'q-0') EXECUTE FUNCTION wait()",
        )
        .await;
    let is_committing = async || {
        let sql = "SELECT 1 FROM pg_stat_activity WHERE query = 'COMMIT' AND state = 'active'";
        !server.query(sql).await.is_empty()
    };
    for faults in [
        Faults { refuse: true, ..Faults::default() },
        Faults { stall_down: true, ..Faults::default() },
    ] {
        server.query("TRUNCATE tool_execution_logs").await;
        for n in 0..100 {
            log.record(&format!("q-{n}"), "1");
        }
        eventually_yes("it commits", is_committing).await;
        proxy.set(faults);
        proxy.cut(Cut::Reset);
        eventually_yes("the commit is done", async || !is_committing().await).await;
        assert_eq!(log.audit.status().queued, 100);
        proxy.set(Faults::default());
        proxy.cut(Cut::Reset);
        log.written().await;
        assert_once(&server, 100).await;
    }
    log.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_newest_rows_are_dropped_when_the_queue_is_full() {
    let mut server = PostgresServer::start().await;
    let log = Log::start(&config(server.url())).await;
    server.kill();
    for n in 0..10_500 {
        log.record(&format!("q-{n}"), "1");
    }
    let status = log.audit.status();
    assert_eq!((status.queued, status.dropped), (10_000, 500));
    server.restart().await;
    log.written().await;
    assert_once(&server, 10_000).await;
    assert_eq!([log.rows("written"), log.rows("dropped")], [10_000, 500]);
    let large = format!("\"{}\"", "x".repeat(60_000));
    server.kill();
    (0..700).for_each(|n| log.record(&format!("large-{n}"), &large));
    let status = log.audit.status();
    assert!((500..560).contains(&status.queued), "32 MiB: {status:?}");
    server.restart().await;
    log.written().await;
    log.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_end_writes_what_waits_or_says_what_is_lost() {
    let mut server = PostgresServer::start().await;
    let log = Log::start(&config(server.url())).await;
    (0..3000).for_each(|n| log.record(&format!("q-{n}"), "1"));
    log.close().await;
    assert_once(&server, 3000).await;
    let log = Log::start(&config(server.url())).await;
    server.kill();
    (0..30).for_each(|n| log.record(&format!("r-{n}"), "1"));
    let start = Instant::now();
    log.audit.close().await;
    let took = start.elapsed();
    assert!(took >= Duration::from_secs(5) && took < Duration::from_secs(7), "{took:?}");
    assert_eq!([log.rows("lost"), log.rows("written")], [30, 0]);
    log.record("late", "1");
    assert_eq!(log.audit.status().queued, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_come_before_the_database_does() {
    let mut server = PostgresServer::start().await;
    server.kill();
    let idle = Log::start_without_database(&config(server.url()));
    let start = Instant::now();
    idle.audit.close().await;
    assert!(start.elapsed() < Duration::from_secs(4), "there is nothing to wait for");
    let log = Log::start_without_database(&config(server.url()));
    (0..100).for_each(|n| log.record(&format!("q-{n}"), "1"));
    server.restart().await;
    log.written().await;
    assert_once(&server, 100).await;
    log.close().await;
}

/// A small file system in memory; dropping it unmounts it. `None` where the test may not mount.
struct SmallDisk(TempDir);

impl SmallDisk {
    fn mount(bytes: &str) -> Option<Self> {
        let folder = tempfile::tempdir().unwrap();
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", &format!("size={bytes},mode=777"), "tmpfs"]);
        mount
            .arg(folder.path())
            .status()
            .is_ok_and(|status| status.success())
            .then_some(Self(folder))
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").args(["-l"]).arg(self.0.path()).status();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_wait_while_the_disk_is_full() {
    let Some(disk) = SmallDisk::mount("8m") else {
        eprintln!("skipped: no right to mount a file system");
        return;
    };
    let server = PostgresServer::start().await;
    let log = Log::start(&config(server.url())).await;
    let path = disk.0.path().join("space");
    std::fs::create_dir(&path).unwrap();
    let status = Command::new("chown").arg("postgres").arg(&path).status();
    assert!(status.unwrap().success());
    server.query(&format!("CREATE TABLESPACE small LOCATION '{}'", path.display())).await;
    server.query("ALTER TABLE tool_execution_logs SET TABLESPACE small").await;
    let filler =
        "CREATE TABLE filler TABLESPACE small AS SELECT n FROM generate_series(1, 200000) AS n";
    server.query(filler).await;
    // Random texts, which PostgreSQL cannot compress.
    for n in 0..3000 {
        let values: Vec<_> = (0..40).map(|_| format!("\"{:x}\"", rand::random::<u64>())).collect();
        log.record(&format!("q-{n}"), &format!("[{}]", values.join(",")));
    }
    eventually("the disk is full", || failures(&log) > 0).await;
    assert!(log.audit.status().queued > 0);
    assert_eq!([log.rows("refused"), log.rows("encoded")], [0, 0]);
    server.query("DROP TABLE filler").await;
    log.written().await;
    assert_once(&server, 3000).await;
    log.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_wait_while_sqlite_is_locked() {
    let database = TestDatabase::sqlite();
    let log = Log::start(&database.config()).await;
    let TestDatabase::Sqlite(folder) = &database else { unreachable!("it is one") };
    let url = format!("sqlite://{}", folder.path().join("test.db").display());
    let mut other = <sqlx::SqliteConnection as sqlx::Connection>::connect(&url).await.unwrap();
    sqlx::raw_sql("BEGIN EXCLUSIVE").execute(&mut other).await.unwrap();
    (0..1000).for_each(|n| log.record(&format!("q-{n}"), "1"));
    eventually("it is locked", || failures(&log) > 0).await;
    assert_eq!(log.audit.status().queued, 1000);
    sqlx::raw_sql("COMMIT").execute(&mut other).await.unwrap();
    log.written().await;
    assert_eq!(
        database.number("SELECT count(DISTINCT request_id) FROM tool_execution_logs").await,
        1000
    );
    assert_eq!(database.number("SELECT count(*) FROM tool_execution_logs").await, 1000);
    log.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_wait_while_the_disk_of_sqlite_is_full() {
    let Some(disk) = SmallDisk::mount("4m") else {
        eprintln!("skipped: no right to mount a file system");
        return;
    };
    let database = TestDatabase::sqlite_in(disk.0.path());
    let log = Log::start(&database.config()).await;
    log.record("q-0", "1");
    log.written().await;
    let filler = disk.0.path().join("filler");
    let mut file = std::fs::File::create(&filler).unwrap();
    while std::io::Write::write_all(&mut file, &[b'x'; 4096]).is_ok() {}
    let large = format!("\"{}\"", "x".repeat(10_000));
    (1..50).for_each(|n| log.record(&format!("q-{n}"), &large));
    eventually("the disk is full", || failures(&log) > 0).await;
    assert_eq!(log.audit.status().queued, 49);
    std::fs::remove_file(filler).unwrap();
    drop(file);
    log.written().await;
    assert_eq!([log.rows("written"), log.rows("refused")], [50, 0]);
    assert_eq!(database.number("SELECT count(*) FROM tool_execution_logs").await, 50);
    log.close().await;
}
