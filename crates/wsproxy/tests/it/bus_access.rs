//! Access of the bus to Redis: passwords, permissions, TLS and Unix sockets, and what an operator is told.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use tokio::{io::AsyncWriteExt, net::TcpListener};
use wsproxy::{
    bus::publish::{BusError, Outcome},
    config,
};

use crate::support::{
    bus::{TestBus, config, message},
    eventually,
    redis_server::{Options, RedisServer},
    soon,
};

#[tokio::test]
async fn a_wrong_password_is_reported_and_recovers_once_mended() {
    let server =
        RedisServer::start_with(Options { password: Some("right".into()), ..Options::default() });
    let url = format!("redis://:sesame@127.0.0.1:{}", server.port());
    let bus = TestBus::on(&config(Some(&url)));
    eventually("the trouble is told", || bus.bus.status().last_error.is_some()).await;
    let told = format!("{:?}", bus.bus.status());
    assert!(told.contains("WRONGPASS") && !told.contains("sesame"), "{told}");
    server.call(&["CONFIG", "SET", "requirepass", "sesame"]);
    bus.ready().await;

    let none = TestBus::on(&config(Some(&format!("redis://127.0.0.1:{}", server.port()))));
    eventually("the trouble is told", || none.bus.status().last_error.is_some()).await;
    let told = none.bus.status().last_error.unwrap();
    assert!(told.contains("NOAUTH"), "{told}");
}

#[tokio::test]
async fn loss_and_recovery_are_logged_without_the_password() {
    let lines = Lines::of_this_thread();
    let password = Some("sesame".to_owned());
    let mut server = RedisServer::start_with(Options { password, ..Options::default() });
    let bus = TestBus::on(&config(Some(&server.url())));
    bus.subscribe(&["a"]).await;
    bus.ready().await;
    server.kill();
    eventually("attempts fail", || bus.bus.counters().connects_failed.value() > 9).await;
    server.restart();
    bus.seen.wait_for_recoveries(1).await;
    server.call(&["CONFIG", "SET", "requirepass", "other"]);
    server.call_as("other", &["CLIENT", "KILL", "TYPE", "pubsub"]);
    eventually("the trouble is told", || bus.bus.status().last_error.is_some()).await;
    let text = lines.text();
    let count = |words: &str| text.lines().filter(|line| line.contains(words)).count();
    assert_eq!(count("Every subscription is confirmed again"), 1, "{text}");
    assert_eq!(count("Lost Redis. link=\"subscribe\""), 1, "{text}");
    assert!(count("Cannot connect to Redis") <= 6, "{text}");
    assert!(!text.contains("sesame"), "{text}");
}

#[derive(Clone, Default)]
struct Lines(Arc<std::sync::Mutex<Vec<u8>>>);

thread_local! {
    /// The reader of this thread's log lines.
    static READER: std::cell::RefCell<Option<Lines>> = const { std::cell::RefCell::new(None) };
}

impl Lines {
    /// Collects the log lines of this thread from now on: one thread runs a test and all tasks of its bus.
    ///
    /// One subscriber serves all threads. With one for each, a line that another thread's test reaches first may
    /// be switched off for good.
    fn of_this_thread() -> Self {
        use tracing_subscriber::{Layer, filter::dynamic_filter_fn, fmt, layer::SubscriberExt};
        static START: std::sync::Once = std::sync::Once::new();
        START.call_once(|| {
            let is_read = dynamic_filter_fn(|_, _| READER.with_borrow(Option::is_some));
            let writer = || READER.with_borrow(|lines| lines.clone().unwrap_or_default());
            let layer = fmt::layer().with_ansi(false).with_writer(writer).with_filter(is_read);
            let subscriber = tracing_subscriber::registry().with(layer);
            tracing::subscriber::set_global_default(subscriber).unwrap();
        });
        let lines = Self::default();
        READER.set(Some(lines.clone()));
        lines
    }

    fn text(&self) -> String {
        String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
    }
}

impl std::io::Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[tokio::test]
async fn a_server_without_hello_is_refused_without_password_leak() {
    let arguments = ["--rename-command", "HELLO", ""].map(String::from).to_vec();
    let server = RedisServer::start_with(Options { arguments, ..Options::default() });
    let url = format!("redis://user:sesame@127.0.0.1:{}", server.port());
    let bus = TestBus::on(&config(Some(&url)));
    eventually("the trouble is told", || bus.bus.status().last_error.is_some()).await;
    let told = bus.bus.status().last_error.unwrap();
    assert!(told.contains("Redis 6") && !told.contains("sesame"), "{told}");
}

#[tokio::test]
async fn a_denied_channel_fails_its_caller_alone() {
    let mut server = RedisServer::start();
    let rules = |server: &RedisServer, channels: &str| {
        server.call(&[
            "ACL",
            "SETUSER",
            "gateway",
            "on",
            ">pw",
            "~*",
            "+@all",
            "resetchannels",
            channels,
            "&wsproxy:probe:*",
        ]);
    };
    rules(&server, "&session:*");
    let url = format!("redis://gateway:pw@127.0.0.1:{}", server.port());
    let bus = TestBus::on(&config(Some(&url)));
    bus.ready().await;
    let callers = (0..1500).map(|n| {
        let denied = n % 700 == 3;
        let channel = if denied { format!("other:{n}") } else { format!("session:{n}:down") };
        let bus = bus.bus.clone();
        async move { (denied, bus.subscribe(vec![channel.into()]).await) }
    });
    for (denied, result) in soon("all callers", futures_util::future::join_all(callers)).await {
        match result {
            Err(BusError::Refused(why)) if denied => assert!(why.contains("NOPERM"), "{why}"),
            result => assert!(!denied && result.is_ok(), "{denied} {result:?}"),
        }
    }
    assert_eq!(bus.bus.counters().subscribe_errors.value(), 3);
    assert_eq!(bus.outcome(message("session:5:down", "x")).await, Outcome::Received(1));
    // The denied are still wanted: they do not hold up a recovery, nor fail anybody else.
    server.kill();
    server.restart();
    rules(&server, "&session:*");
    bus.seen.wait_for_recoveries(1).await;
    bus.ready().await;
    assert_eq!(bus.outcome(message("session:1499:down", "x")).await, Outcome::Received(1));
    // With the permission they work.
    server.call(&["ACL", "SETUSER", "gateway", "allchannels"]);
    bus.subscribe(&["other:3"]).await;
    assert_eq!(bus.outcome(message("other:3", "x")).await, Outcome::Received(1));
}

#[tokio::test]
async fn tls_trusts_only_servers_of_the_ca_file() {
    let server = RedisServer::start_with(Options {
        tls: true,
        password: Some("pw".into()),
        ..Options::default()
    });
    let stranger = TestBus::on(&config(Some(&server.url())));
    let trusting =
        config::RedisConfig { ca_file: Some(server.ca_file()), ..config(Some(&server.url())) };
    let bus = TestBus::on(&trusting);
    bus.subscribe(&["a"]).await;
    let large = Bytes::from(vec![b'x'; 1_000_000]);
    assert_eq!(bus.outcome(message("a", large)).await, Outcome::Received(1));
    bus.seen.wait_for(1).await;
    soon("the store", bus.store.ping()).await.unwrap();
    eventually("the stranger is told", || stranger.bus.status().last_error.is_some()).await;
    let told = stranger.bus.status().last_error.unwrap();
    assert!(told.contains("certificate"), "{told}");
}

#[tokio::test]
async fn a_unix_socket_with_a_database_works() {
    let server = RedisServer::start();
    let bus = TestBus::on(&config(Some(&format!("{}?db=3", server.unix_url()))));
    bus.subscribe(&["a"]).await;
    assert_eq!(bus.outcome(message("a", "x")).await, Outcome::Received(1));
    bus.store.save("key", b"value", Duration::from_secs(60)).await.unwrap();
    assert_eq!(server.call(&["EXISTS", "key"]).integer(), 0);
    let keyspace = format!("{:?}", server.call(&["INFO", "keyspace"]));
    assert!(keyspace.contains("db3:keys=1"), "{keyspace}");
}

#[tokio::test]
async fn a_server_that_speaks_something_else_is_no_harm() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("redis://{}", listener.local_addr().unwrap());
    let rude = tokio::task::spawn(async move {
        let answers =
            [&b"HTTP/1.1 400 Bad Request\r\n\r\n"[..], b"*1000000000\r\n", b">3\r\n", b"+OK\r\n"];
        for answer in answers.iter().cycle() {
            let (mut stream, _) = listener.accept().await.unwrap();
            let _ = stream.write_all(answer).await;
        }
    });
    let bus = TestBus::on(&config(Some(&url)));
    eventually("attempts fail", || bus.bus.counters().connects_failed.value() > 12).await;
    assert!(!bus.bus.status().connected);
    bus.shutdown.cancel();
    bus.tasks.close();
    soon("the tasks end", bus.tasks.wait()).await;
    rude.abort();
}
