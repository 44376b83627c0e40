//! One client, user or address against all others: none gets more than its share.

use std::{
    net::SocketAddr,
    sync::atomic::{AtomicBool, Ordering::Relaxed},
    time::{Duration, Instant},
};

use flate2::{Compress, Compression, FlushCompress};
use serde_json::json;
use tokio::net::TcpSocket;

use crate::support::{
    client::Client,
    eventually,
    fault_proxy::{FaultProxy, Faults},
    gateway::{Backend, TestInstance, bearer, config, over_both},
    issuer::{Answer, Issuer, SigningKey, now},
    raw::{Raw, UPGRADE, frame},
    redis_server::RedisServer,
    soon,
    sse::Events,
};

over_both!(
    a_session_has_its_connections_and_no_more,
    compressed_messages_count_with_what_they_become,
    resumes_of_one_user_are_bounded,
);

/// Redis takes 20 MB a second, and one client has more for it than that.
#[tokio::test]
async fn a_flooding_client_leaves_the_publish_queue_to_others() {
    let server = RedisServer::start();
    let proxy = FaultProxy::start(server.port()).await;
    let mut config = config(Some(&server.url_on(proxy.port())));
    config.limits.messages_per_second = 0;
    // Neither limit of its own holds the client back.
    config.limits.bytes_per_second = 0;
    let queue_bytes = config.redis.publish_queue_bytes;
    let instance = TestInstance::start(config).await;
    let mut honest = instance.client("honest").await;
    let mut worker = instance.follow("session:honest:up").await;
    let mut flooder = Raw::connect(instance.address()).await;
    flooder.open("flooder", &instance.token("flooder").await).await;
    proxy.set(Faults { delay: Duration::from_millis(3), ..Faults::default() });
    let payload = format!("\"{}\"", "x".repeat(50_000));
    let (message, over) = (frame(0x81, payload.as_bytes()), AtomicBool::new(false));
    let flood = async {
        while !over.load(Relaxed) {
            flooder.write(&message).await;
        }
    };
    let measure = async {
        let paused = || instance.families().sessions.profile.stats.reads_paused.load(Relaxed);
        eventually("the flooder is not read", || paused() > 3).await;
        let (mut times, mut most) = (Vec::new(), 0);
        for n in 0..30 {
            let started = Instant::now();
            honest.send(n.to_string()).await;
            assert_eq!(worker.next().await, n.to_string());
            times.push(started.elapsed());
            most = most.max(instance.gateway().bus.status().queued_bytes);
        }
        over.store(true, Relaxed);
        times.sort_unstable();
        (times[times.len() / 2], most)
    };
    let ((), (median, most)) = tokio::join!(flood, measure);
    println!("{median:?} beside a flooding client, {most} bytes queued");
    assert!(most <= queue_bytes / 16, "{most} bytes waited of {queue_bytes}");
    // With the queue full it would be 700 ms and more.
    assert!(median < Duration::from_millis(250), "{median:?} beside a flooding client");
    assert_eq!(instance.metric("wsproxy_bus_publishes_refused_full_total"), 0.0);
}

async fn compressed_messages_count_with_what_they_become(backend: Backend) {
    let mut config = backend.config();
    config.limits.bytes_per_second = 1 << 20;
    config.limits.bytes_burst = 64 << 10;
    let instance = TestInstance::start(config).await;
    let mut worker = instance.follow("session:s:up").await;
    let mut raw = Raw::connect(instance.address()).await;
    let token = instance.token("s").await;
    let headers = format!(
        "Authorization: Bearer {token}\r\nSec-WebSocket-Extensions: permessage-deflate\r\n"
    );
    raw.upgrade("/agent/ws/s", &headers).await;
    let payload = format!("\"{}\"", "x".repeat(500_000));
    let mut compress = Compress::new(Compression::best(), false);
    let mut deflated = Vec::with_capacity(10_000);
    compress.compress_vec(payload.as_bytes(), &mut deflated, FlushCompress::Sync).unwrap();
    deflated.truncate(deflated.len() - 4);
    let message = frame(0xc1, &deflated);
    assert!(message.len() < 2000);
    let started = Instant::now();
    let send = async {
        for _ in 0..5 {
            raw.write(&message).await;
            // So that the gateway reads them one by one.
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    let receive = async {
        for _ in 0..5 {
            assert!(worker.next().await == payload);
        }
    };
    tokio::join!(send, receive);
    // 2.5 MB, of which the last message need not be earned before it is read.
    assert!(started.elapsed() > Duration::from_millis(1500), "{:?}", started.elapsed());
    assert!(instance.metric("wsproxy_reads_throttled_total{endpoint=\"sessions\"}") > 0.0);
    raw.frame(0x89, b"alive").await;
    assert_eq!(raw.next_frame().await.unwrap().payload, b"alive");
}

async fn a_session_has_its_connections_and_no_more(backend: Backend) {
    let mut config = backend.config();
    config.limits.connections_per_session = 2;
    let instance = TestInstance::start(config).await;
    let client = instance.client("s").await;
    let events = Events::session(&instance, "s", &[]).await;
    let token = instance.token("s").await;
    instance.refused("s", &token).await.assert_refused(429, "too_many_connections");
    let path = format!("/agent/ws/s?token={token}");
    let refused = Events::open(instance.address(), &path, &[]).await.err().unwrap();
    refused.assert_refused(429, "too_many_connections");
    assert_eq!(instance.refusals("too_many_connections"), 2.0);
    // A client without a token does not learn how many connections there are.
    instance.refused("s", "wrong").await.assert_refused(403, "invalid_token");
    let other = instance.client("other").await;
    assert!(instance.has_token("s").await);
    client.close().await;
    eventually("its seat is free", || instance.gateway().seats.taken() == 2).await;
    let again = instance.connect("s", &token).await.expect("there is room");
    drop((events, other, again));
    instance.wait_empty().await;
}

fn token_of(user: &str) -> String {
    let claims = json!({ "sub": user, "exp": now() + 600 });
    let key = jsonwebtoken::EncodingKey::from_secret(SECRET.as_bytes());
    jsonwebtoken::encode(&jsonwebtoken::Header::default(), &claims, &key).unwrap()
}

#[tokio::test]
async fn a_user_has_its_connections_and_no_more() {
    let instance = TestInstance::with(|config| {
        config.endpoints.events = true;
        config.jwt.secret_key = Some(SECRET.into());
        config.limits.connections_per_user = 3;
    })
    .await;
    let (address, token) = (instance.address(), token_of("u"));
    let connect = async || Client::connect(address, "/ws", &bearer(&token)).await;
    // Of those that come at once exactly as many get in as may.
    let all = futures_util::future::join_all((0..10).map(|_| connect())).await;
    let clients: Vec<_> = all.into_iter().filter_map(Result::ok).collect();
    assert_eq!(clients.len(), 3);
    let header = format!("Bearer {token}");
    let headers = [("authorization", header.as_str())];
    let refused = Events::open(address, "/ws", &headers).await.err().unwrap();
    refused.assert_refused(429, "too_many_connections");
    Client::connect(address, "/ws", &bearer(&token_of("v"))).await.unwrap().close().await;
    drop(clients);
    eventually("their seats are free", || instance.gateway().seats.taken() == 0).await;
    drop(Events::open(address, "/ws", &headers).await.expect("there is room"));
}

/// To read what was missed costs Redis much, and asks a client for nothing but a line.
async fn resumes_of_one_user_are_bounded(backend: Backend) {
    let mut config = backend.config();
    config.endpoints.events = true;
    config.jwt.secret_key = Some(SECRET.into());
    config.events.history = true;
    config.limits.resumes_per_second = 1;
    let instance = TestInstance::start(config).await;
    let attempt = async |user: &str, path: &str| {
        let token = format!("Bearer {}", token_of(user));
        instance.handshake(path, &[("authorization", &token)]).await
    };
    for path in ["/ws?last_event_id=0", "/ws?resume=frame", "/ws?last_event_id=1-2-00000001"] {
        let mut passed = 0;
        let refused = loop {
            let answer = attempt("u", path).await;
            if answer.status != 101 {
                break answer;
            }
            passed += 1;
            assert!(passed < 200, "{path}");
        };
        refused.assert_refused(429, "rate_limited");
        assert!(passed >= 5 || !path.ends_with("=0"), "five may come at once");
    }
    // Neither those who begin anew nor others pay for it.
    assert_eq!(attempt("u", "/ws").await.status, 101);
    assert_eq!(attempt("u", "/ws?last_event_id=").await.status, 101);
    assert_eq!(attempt("v", "/ws?last_event_id=0").await.status, 101);
    let counted = "wsproxy_handshakes_total{endpoint=\"events\",outcome=\"rate_limited\"}";
    assert_eq!(instance.metric(counted), 3.0);
    tokio::time::sleep(Duration::from_millis(1100)).await;
    assert_eq!(attempt("u", "/ws?last_event_id=0").await.status, 101);
}

/// Handshakes that wait for the keys of an issuer who does not answer.
#[tokio::test]
async fn handshakes_without_a_verdict_take_no_places_from_others() {
    let issuer = Issuer::start(Answer::Silence).await;
    let instance = TestInstance::with(|config| {
        config.endpoints.events = true;
        config.jwt.algorithms = vec![jsonwebtoken::Algorithm::ES256];
        config.jwt.jwks_url = Some(issuer.url());
        config.jwt.jwks_timeout = Duration::from_secs(20);
        config.server.handshake_timeout = Duration::from_secs(20);
        config.limits.max_connections = 4;
    })
    .await;
    let token = SigningKey::new("k").token();
    let request = format!("GET /ws HTTP/1.1\r\n{UPGRADE}Authorization: Bearer {token}\r\n\r\n");
    let mut waiting = Vec::new();
    for _ in 0..256 {
        let mut raw = Raw::connect(instance.address()).await;
        raw.write(request.as_bytes()).await;
        waiting.push(raw);
    }
    let handshakes = &instance.gateway().handshakes;
    eventually("all wait for a verdict", || handshakes.taken() == 256).await;
    assert_eq!(instance.gateway().seats.taken(), 0);
    assert_eq!(instance.metric("wsproxy_handshakes_waiting"), 256.0);
    let ready = instance.get("/ready").await;
    assert_eq!((ready.status, ready.json()["reason"].as_str()), (503, Some("handshakes")));
    let refused = instance.refused("s", "any").await;
    refused.assert_refused(503, "too_many_handshakes");
    drop(waiting.split_off(128));
    eventually("those that left wait no more", || handshakes.taken() == 128).await;
    let mut client = instance.client("s").await;
    instance.assert_serves(&mut client, "s").await;
    assert_eq!(instance.get("/ready").await.status, 200);
}

/// A socket from another address of this machine.
async fn connect_from(address: [u8; 4], target: SocketAddr) -> Raw {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind((address, 0).into()).unwrap();
    let mut raw = Raw::connect(target).await;
    raw.socket = socket.connect(target).await.unwrap();
    raw
}

/// Returns the number of connections that are still open.
fn open_ones(raws: &[Raw]) -> usize {
    let is_open = |raw: &&Raw| {
        let read = raw.socket.try_read(&mut [0; 1]);
        read.is_err_and(|error| error.kind() == std::io::ErrorKind::WouldBlock)
    };
    raws.iter().filter(is_open).count()
}

#[tokio::test]
async fn silent_sockets_of_one_address_do_not_keep_others_out() {
    // 528 sockets, of which one address may have a quarter silent.
    let instance = TestInstance::with(|config| {
        config.limits.max_connections = 16;
        config.server.header_timeout = Duration::from_secs(60);
    })
    .await;
    let mut client = instance.client("s").await;
    let mut silent = Vec::new();
    for n in 0..1000 {
        let mut raw = connect_from([127, 0, 0, 9], instance.address()).await;
        if n % 2 == 0 {
            // Half a head is none.
            raw.write(b"GET /health HTTP/1.1\r\nHost: ").await;
        }
        silent.push(raw);
    }
    eventually("most are closed", || open_ones(&silent) == 132).await;
    assert!(instance.metric("wsproxy_errors_total{kind=\"silent_socket\"}") >= 868.0);
    assert!(open_ones(&silent[868..]) == 132, "the newest stay");
    assert_eq!(instance.get("/ready").await.status, 200);
    instance.assert_serves(&mut client, "s").await;
    instance.client("other").await.close().await;
}

#[tokio::test]
async fn where_all_sockets_are_taken_the_oldest_silent_one_gives_way() {
    let instance = TestInstance::with(|config| {
        config.limits.max_connections = 16;
        config.server.header_timeout = Duration::from_secs(60);
        // As if all were sockets of our own proxies, which have no share.
        config.server.trusted_proxies = vec!["127.0.0.0/8".parse().unwrap()];
    })
    .await;
    let mut client = instance.client("s").await;
    let mut silent = Vec::new();
    for n in 0..700 {
        let mut raw = Raw::connect(instance.address()).await;
        if n % 2 == 0 {
            // A socket that waits for its next request is as silent as one before its first.
            raw.write(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n").await;
            assert_eq!(raw.response().await.status, 200);
        }
        silent.push(raw);
    }
    eventually("the oldest are closed", || open_ones(&silent) == 527).await;
    assert!(open_ones(&silent[..150]) == 0);
    instance.assert_serves(&mut client, "s").await;
    instance.client("other").await.close().await;
    assert_eq!(instance.get("/ready").await.status, 200);
    drop(silent);
    drop(client);
    soon("all sockets are given back", instance.wait_empty()).await;
    assert!(!instance.gateway().sockets.is_full());
}

const SECRET: &str = "0123456789abcdef0123456789abcdef";
