//! A PostgreSQL of a test's own, which can be killed, stopped, restarted and asked.

use std::{
    fs,
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        Arc, Weak,
        atomic::{AtomicU32, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, geteuid, kill_process};
use sqlx::{AssertSqlSafe, Connection, PgConnection, Row, raw_sql};
use tempfile::TempDir;
use tokio::sync::Mutex;

use super::redis_server::free_port;

/// A running server with the database `postgres` and the superuser `postgres`; dropping it kills it.
pub struct PostgresServer {
    directory: TempDir,
    port: u16,
    child: Option<Child>,
}

/// A row of an answer; `None` for no value.
pub type Fields = Vec<Option<String>>;

impl PostgresServer {
    /// A new, empty server on a free port.
    pub async fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let mut server = Self { port: free_port(), directory, child: None };
        if let Some(user) = user() {
            std::os::unix::fs::chown(server.directory.path(), Some(user), Some(user)).unwrap();
        }
        let data = server.data();
        let mut init = server.command("initdb");
        init.args([
            "--auth=trust",
            "--username=postgres",
            "--encoding=UTF8",
            "--locale=C",
            "--no-sync",
        ]);
        let init = init.arg("--pgdata").arg(&data).output().expect("PostgreSQL is installed");
        assert!(init.status.success(), "{}", String::from_utf8_lossy(&init.stderr));
        server.restart().await;
        server
    }

    /// A server that tests share which run at the same time, since the start of one takes a second. It ends with the
    /// last of them. A test has a database of its own there: [`Self::new_database`].
    pub async fn shared() -> Arc<Self> {
        static SHARED: Mutex<Weak<PostgresServer>> = Mutex::const_new(Weak::new());
        let mut shared = SHARED.lock().await;
        if let Some(server) = shared.upgrade() {
            return server;
        }
        let server = Arc::new(Self::start().await);
        *shared = Arc::downgrade(&server);
        server
    }

    /// Creates an empty database; answers its name.
    pub async fn new_database(&self) -> String {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = format!("test_{}", COUNT.fetch_add(1, Relaxed));
        self.query(&format!("CREATE DATABASE {name}")).await;
        name
    }

    /// Starts it again after [`Self::kill`], on the same port and with its data.
    pub async fn restart(&mut self) {
        assert!(self.child.is_none(), "it runs");
        let _ = fs::remove_file(self.data().join("postmaster.pid"));
        let mut command = self.command("postgres");
        command.arg("-D").arg(self.data()).arg("-k").arg(self.directory.path());
        for option in [
            "listen_addresses=127.0.0.1",
            &format!("port={}", self.port),
            // The machine does not lose its power in a test.
            "fsync=off",
            "full_page_writes=off",
            "shared_buffers=16MB",
            "max_connections=60",
            "autovacuum=off",
            "timezone=Asia/Tokyo",
        ] {
            command.args(["-c", option]);
        }
        let log = fs::OpenOptions::new().append(true).create(true).open(self.log()).unwrap();
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        let mut child = command.spawn().unwrap();
        let start = Instant::now();
        while PgConnection::connect(&self.url()).await.is_err() {
            // A process of the server before may still end, and then the new one does not start.
            if child.try_wait().unwrap().is_some() {
                child = command.spawn().unwrap();
            }
            let log = || fs::read_to_string(self.log()).unwrap_or_default();
            assert!(start.elapsed() < Duration::from_secs(20), "it does not start:\n{}", log());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        self.child = Some(child);
    }

    /// `postgres://postgres@127.0.0.1:port/postgres`
    pub fn url(&self) -> String {
        self.url_of("postgres")
    }

    /// The URL of another database.
    pub fn url_of(&self, database: &str) -> String {
        format!("postgres://postgres@127.0.0.1:{}/{database}", self.port)
    }

    /// The TCP port.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Runs statements in the database `postgres`; answers the rows of all of them.
    #[track_caller]
    pub fn query(&self, sql: &str) -> impl Future<Output = Vec<Fields>> {
        query(self.url(), sql.to_owned())
    }

    /// The same in another database.
    #[track_caller]
    pub fn query_in(&self, database: &str, sql: &str) -> impl Future<Output = Vec<Fields>> {
        query(self.url_of(database), sql.to_owned())
    }

    /// SIGKILL for all of its processes: no farewell.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            let processes = self.processes(child.id());
            for process in processes {
                let _ = kill_process(process, Signal::KILL);
            }
            let _ = child.wait();
        }
    }

    /// SIGSTOP for all of its processes: the kernel still answers for them, they do not.
    pub fn stop(&self) {
        self.signal(Signal::STOP);
    }

    /// SIGCONT.
    pub fn cont(&self) {
        self.signal(Signal::CONT);
    }

    fn signal(&self, signal: Signal) {
        let child = self.child.as_ref().expect("it runs").id();
        for process in self.processes(child) {
            let _ = kill_process(process, signal);
        }
    }

    /// The postmaster and its children, each in a process group of its own.
    fn processes(&self, postmaster: u32) -> Vec<Pid> {
        let children = format!("/proc/{postmaster}/task/{postmaster}/children");
        let children = fs::read_to_string(children).unwrap_or_default();
        let children = children.split_whitespace().filter_map(|pid| pid.parse().ok());
        [postmaster.cast_signed()].into_iter().chain(children).filter_map(Pid::from_raw).collect()
    }

    fn command(&self, program: &str) -> Command {
        let installed = folder().map(|folder| folder.join(program)).filter(|path| path.exists());
        let mut command = Command::new(installed.unwrap_or_else(|| program.into()));
        command.current_dir(self.directory.path());
        if let Some(user) = user() {
            command.uid(user).gid(user);
        }
        command
    }

    fn data(&self) -> PathBuf {
        self.directory.path().join("data")
    }

    fn log(&self) -> PathBuf {
        self.directory.path().join("log")
    }
}

impl Drop for PostgresServer {
    fn drop(&mut self) {
        self.kill();
    }
}

#[track_caller]
fn query(url: String, sql: String) -> impl Future<Output = Vec<Fields>> {
    let caller = std::panic::Location::caller();
    async move {
        let mut connection = PgConnection::connect(&url).await.unwrap();
        let rows = raw_sql(AssertSqlSafe(sql.clone())).fetch_all(&mut connection).await;
        let rows = rows.unwrap_or_else(|error| panic!("{caller}: {error}: {sql}"));
        let _ = connection.close().await;
        // Without a prepared statement all values come as text.
        let fields = |row: &sqlx::postgres::PgRow| {
            (0..row.len()).map(|index| row.get_unchecked(index)).collect()
        };
        rows.iter().map(fields).collect()
    }
}

/// The folder of the newest version that Debian's packages have installed.
fn folder() -> Option<PathBuf> {
    let versions = fs::read_dir("/usr/lib/postgresql").ok()?;
    let version = |path: &Path| path.file_name()?.to_str()?.parse::<u32>().ok();
    let newest = versions.flatten().map(|entry| entry.path()).max_by_key(|path| version(path))?;
    Some(newest.join("bin"))
}

/// The user under which it runs where the test is root's.
fn user() -> Option<u32> {
    if !geteuid().is_root() {
        return None;
    }
    let passwd = fs::read_to_string("/etc/passwd").unwrap();
    let line = passwd.lines().find(|line| line.starts_with("postgres:"));
    line.expect("the user postgres").split(':').nth(2).unwrap().parse().ok()
}
