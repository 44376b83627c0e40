//! A Redis and gateways for the tool to measure, each a process that ends with the test.

use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use wsproxy::config::{
    environment::Environment,
    load::{ConfigSources, load},
};

/// A Redis with a configuration of its own.
pub(crate) struct Redis {
    child: Child,
    pub(crate) address: SocketAddr,
    /// Configuration with which the tool starts Redis again.
    pub(crate) conf: PathBuf,
    _folder: tempfile::TempDir,
}

/// A gateway.
pub(crate) struct Gateway {
    child: Child,
    pub(crate) address: SocketAddr,
}

impl Redis {
    pub(crate) fn start() -> Self {
        Self::keeping("appendonly no")
    }

    pub(crate) fn keeping(what: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let address = free_address();
        let conf = folder.path().join("redis.conf");
        let (port, dir) = (address.port(), folder.path().display());
        let text = format!("port {port}\nbind 127.0.0.1\ndir {dir}\nsave \"\"\n{what}\n");
        std::fs::write(&conf, text).unwrap();
        let child = Command::new("redis-server")
            .arg(&conf)
            .stdout(Stdio::null())
            .spawn()
            .expect("redis-server is installed");
        let redis = Self { child, address, conf, _folder: folder };
        until("redis-server answers", || TcpStream::connect(address).is_ok());
        redis
    }
}

impl Gateway {
    /// Starts a gateway with these environment variables, and waits until it is ready.
    pub(crate) fn start(redis: &Redis, settings: &[(&str, &str)]) -> Self {
        let address = free_address();
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "servers::gateway", "--ignored", "--nocapture"])
            .env(MARK, "1")
            .env("PORT", address.port().to_string())
            .env("REDIS_URL", format!("redis://{}", redis.address))
            .env("WSPROXY_SERVER__BIND", "127.0.0.1")
            .envs(settings.iter().copied())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let gateway = Self { child, address };
        until("the gateway is ready", || is_ready(address));
        gateway
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Redis {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Gateway {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
#[ignore = "the process that the other tests start as a gateway"]
fn gateway() {
    if std::env::var_os(MARK).is_none() {
        return;
    }
    let sources =
        ConfigSources { environment: Environment::of_process(), ..ConfigSources::default() };
    let loaded = load(sources.clone()).unwrap_or_else(|problems| panic!("{problems}"));
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let run = wsproxy::server::run(loaded.config, loaded.origins, sources);
    runtime.block_on(run).unwrap();
}

fn is_ready(address: SocketAddr) -> bool {
    let Ok(mut stream) = TcpStream::connect(address) else { return false };
    let request = b"GET /ready HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n";
    let mut answer = String::new();
    stream.write_all(request).is_ok()
        && stream.read_to_string(&mut answer).is_ok()
        && answer.starts_with("HTTP/1.1 200")
}

pub(crate) fn until_it_listens(address: SocketAddr) {
    until("it listens", || TcpStream::connect(address).is_ok());
}

pub(crate) fn free_address() -> SocketAddr {
    TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap()
}

fn until(what: &str, is_so: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !is_so() {
        assert!(Instant::now() < deadline, "it is not so that {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

const MARK: &str = "BENCH_TEST_GATEWAY";
