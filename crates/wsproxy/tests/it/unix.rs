//! A unix socket in place of a port: every transport over it, its file, and the addresses of clients.

use std::{
    fs,
    io::ErrorKind,
    net::SocketAddr,
    os::unix::fs::{FileTypeExt, PermissionsExt},
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use rustix::process::Signal;
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, copy_bidirectional},
    net::{TcpListener, UnixStream},
};
use wsproxy::{config::Config, server::Instance};

use crate::support::{
    binary::Binary,
    client::Client,
    eventually,
    gateway::{API_KEY, TestInstance, bearer, config},
    http,
    sse::Events,
};

/// A local port in front of a unix socket, as a proxy on the same machine has one.
async fn port_to(path: &Path) -> SocketAddr {
    let (listener, path) = (TcpListener::bind("127.0.0.1:0").await.unwrap(), path.to_owned());
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut client, _)) = listener.accept().await {
            let path = path.clone();
            tokio::spawn(async move {
                let mut gateway = UnixStream::connect(&path).await?;
                copy_bidirectional(&mut client, &mut gateway).await
            });
        }
    });
    address
}

struct OnSocket {
    folder: TempDir,
    path: PathBuf,
}

impl OnSocket {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("wsproxy.sock");
        Self { folder, path }
    }

    fn config(&self) -> Config {
        let mut config = config(None);
        config.server.unix = Some(self.path.clone());
        config
    }

    fn text(&self) -> &str {
        self.path.to_str().unwrap()
    }
}

#[tokio::test]
async fn clients_are_served_over_a_unix_socket() {
    let place = OnSocket::new();
    let instance = TestInstance::start(place.config()).await;
    let metadata = fs::metadata(&place.path).unwrap();
    assert!(metadata.file_type().is_socket());
    assert_eq!(metadata.permissions().mode() & 0o777, 0o660);
    let address = port_to(&place.path).await;
    let token = instance.token("s").await;
    let mut client = Client::connect(address, "/agent/ws/s", &bearer(&token)).await.unwrap();
    instance.assert_serves(&mut client, "s").await;
    let path = format!("/agent/ws/t?token={}", instance.token("t").await);
    let mut events = Events::open(address, &path, &[]).await.unwrap();
    instance.publish("session:t:down", "hello");
    assert_eq!(events.data().await, "hello");
    let key = format!("Bearer {API_KEY}");
    let info = http::request(address, "GET", "/api/v1/info", &[("authorization", &key)], b"").await;
    assert_eq!(info.json()["connections"]["active"].as_u64(), Some(2), "{info:?}");
    instance.drain().await;
    assert_eq!((client.closed().await.0, events.closed().await.0), (1012, 1012));
    assert!(!place.path.exists());
}

#[tokio::test]
async fn a_unix_proxy_names_clients_only_where_trusted() {
    for trusted in [true, false] {
        let place = OnSocket::new();
        let mut config = place.config();
        config.rate_limit.max_requests = 1;
        let networks = if trusted { "unix:" } else { "127.0.0.0/8" };
        config.server.trusted_proxies = vec![networks.parse().unwrap()];
        let _instance = TestInstance::start(config).await;
        let address = port_to(&place.path).await;
        let attempt = async |client: &str| {
            http::handshake(address, "/agent/ws/s", &[("x-forwarded-for", client)]).await.status
        };
        assert_eq!(attempt("192.0.2.1").await, 401);
        assert_eq!(attempt("192.0.2.2").await, if trusted { 401 } else { 429 });
        assert_eq!(attempt("192.0.2.1").await, 429);
    }
}

#[tokio::test]
async fn the_admin_port_stays_beside_a_unix_socket() {
    let place = OnSocket::new();
    let mut config = place.config();
    (config.admin.port, config.admin.bind) = (Some(0), Some([127, 0, 0, 1].into()));
    let instance = TestInstance::start(config).await;
    assert_eq!(instance.get("/metrics").await.status, 200);
    let clients = port_to(&place.path).await;
    let answer = http::request(clients, "GET", "/metrics", &[], b"").await;
    assert_eq!(answer.status, 404);
}

#[tokio::test]
async fn a_second_process_on_a_unix_socket_does_not_start() {
    let place = OnSocket::new();
    let instance = TestInstance::start(place.config()).await;
    let error = Instance::start(place.config(), |_, _| axum::Router::new()).await.err().unwrap();
    let text = format!("{error:#}");
    assert!(text.contains("cannot listen on unix:/") && text.contains("another process"), "{text}");
    let address = port_to(&place.path).await;
    assert_eq!(http::request(address, "GET", "/ready", &[], b"").await.status, 200);
    instance.drain().await;
    fs::write(&place.path, "data").unwrap();
    let error = Instance::start(place.config(), |_, _| axum::Router::new()).await.err().unwrap();
    assert!(format!("{error:#}").contains("no socket"), "{error:#}");
    assert_eq!(fs::read(&place.path).unwrap(), b"data");
    drop(place.folder);
}

#[tokio::test]
async fn a_peer_that_does_not_read_is_given_up() {
    let place = OnSocket::new();
    let mut config = place.config();
    config.server.header_timeout = Duration::from_millis(500);
    config.heartbeat.timeout = Duration::from_millis(500);
    let instance = TestInstance::start(config).await;
    // Answers: more than the socket takes.
    let socket = UnixStream::connect(&place.path).await.unwrap();
    let request = b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n".repeat(200);
    eventually("its socket is closed", || {
        let written = socket.try_write(&request);
        written.is_err_and(|error| error.kind() == ErrorKind::BrokenPipe)
    })
    .await;
    // An event stream.
    let mut socket = UnixStream::connect(&place.path).await.unwrap();
    let path = format!("/agent/ws/s?token={}", instance.token("s").await);
    let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\nAccept: text/event-stream\r\n\r\n");
    socket.write_all(request.as_bytes()).await.unwrap();
    let mut status = [0; 15];
    socket.read_exact(&mut status).await.unwrap();
    assert_eq!(&status, b"HTTP/1.1 200 OK");
    for _ in 0..40 {
        instance.publish("session:s:down", "x".repeat(16 * 1024));
    }
    instance.wait_empty().await;
}

#[tokio::test]
async fn health_asks_over_the_unix_socket() {
    let place = OnSocket::new();
    let environment = [
        ("PORT", ""),
        ("WSPROXY_SERVER__BIND", ""),
        ("WSPROXY_SERVER__UNIX", place.text()),
        ("WSPROXY_SERVER__UNIX_MODE", "0600"),
    ];
    let health = |arguments: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_wsproxy"));
        command.env_clear().env("WSPROXY_SERVER__UNIX", place.text());
        command.arg("health").args(arguments).output().unwrap().status.code()
    };
    let mut binary = Binary::start_on_socket(&environment).await;
    eventually("it is healthy", || health(&[]) == Some(0)).await;
    let url = format!("http://unix:{}:/ready", place.text());
    assert_eq!(health(&["--url", &url]), Some(0));
    // A process that is killed leaves its file, which the next one replaces.
    binary.signal(Signal::KILL);
    binary.exited().await;
    assert!(place.path.exists());
    assert_eq!(health(&[]), Some(1));
    let mut binary = Binary::start_on_socket(&environment).await;
    eventually("it is healthy again", || health(&[]) == Some(0)).await;
    binary.signal(Signal::TERM);
    assert!(binary.exited().await.success());
    assert!(!place.path.exists());
}
