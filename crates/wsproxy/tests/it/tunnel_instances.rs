//! The tunnel over several instances: an agent at one of them, requests at another.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

use bytes::Bytes;
use tokio::{io::AsyncWriteExt as _, sync::mpsc};
use wsproxy::config::Config;
use wsproxy_conn::lane::{AcceptedStream, LaneSettings, Received};
use wsproxy_proto::tunnel::{code::Code, frame::Reset, headers::HeaderBlock};

use crate::support::{
    cluster_agent::{ClusterAgent, Name, answer, ask, config, head, lines, read_body, send_head},
    eventually, eventually_yes,
    gateway::TestInstance,
    http::{Response, request},
    killable::Killable,
    raw::Raw,
    redis_server::{Answer, RedisServer, free_port},
    soon,
    tls::{Files, Made, Tunnel as Encrypted},
};

mod faults;
mod hop;
mod operators;

/// The configuration of an instance that reaches others.
fn peered(redis: &RedisServer, name: &str) -> Config {
    let mut config = config(Some(&redis.url()));
    config.server.server_id = Some(name.into());
    config.tunnel.peer_bind = Some(([127, 0, 0, 1], free_port()).into());
    config.tunnel.peer_secret = Some(SECRET.into());
    config.tunnel.reconnect_grace = Duration::from_millis(100);
    config
}

/// Two instances; the agent is at the second one.
struct Pair {
    redis: RedisServer,
    one: TestInstance,
    two: TestInstance,
    agent: ClusterAgent,
}

impl Pair {
    async fn start() -> Self {
        Self::with(|_| {}, LaneSettings::default()).await
    }

    /// One whose instances have a configuration that `change` makes, and whose agent's lane has `settings`.
    async fn with(change: impl Fn(&mut Config), settings: LaneSettings) -> Self {
        let redis = RedisServer::start();
        let config = |name| {
            let mut config = peered(&redis, name);
            change(&mut config);
            config
        };
        let one = TestInstance::start(config("s1")).await;
        let two = TestInstance::start(config("s2")).await;
        let name = Name::default();
        let agent = ClusterAgent::named(two.address(), name, settings, serve).await.unwrap();
        Self { redis, one, two, agent }
    }

    async fn ask(&self, request: &str) -> Response {
        ask(&self.one, request).await
    }

    /// Waits until no stream is left at the agent.
    async fn wait_idle(&self) {
        eventually("nothing is left", || self.agent.lane.streams() == 0).await;
    }

    async fn drain(self) {
        self.one.drain().await;
        self.two.drain().await;
    }
}

/// Answers as the path says.
async fn serve(mut stream: AcceptedStream) {
    let path = String::from_utf8(stream.request.path.to_vec()).unwrap();
    match &*path {
        "/body" => {
            let body = read_body(&mut stream).await;
            answer(stream, 200, &format!("{} bytes", body.len())).await;
        }
        "/echo" => echo(stream).await,
        "/exec" => switched(stream).await,
        "/late" => {
            let _ = stream.body.read().await;
            stream.answer.reset(&Reset::new(Code::UpstreamTimeout));
        }
        "/refuse" => answer(stream, 413, "not read").await,
        "/trailers" => trailers(stream).await,
        "/silent" => {
            let _ = stream.body.read().await;
            stream.answer.gone().await;
        }
        "/endless" => {
            send_head(&mut stream, 200, false, &[]);
            while stream.answer.write(Bytes::from_static(&[b'x'; 1000])).await.is_ok() {}
        }
        "/broken" | "/broken-length" => {
            let length: &[_] = if path == "/broken" { &[] } else { &[("content-length", "1000")] };
            send_head(&mut stream, 200, false, length);
            stream.answer.write(Bytes::from_static(b"half")).await.unwrap();
            tokio::time::sleep(Duration::from_millis(50)).await;
            stream.answer.reset(&Reset::new(Code::UpstreamReset));
        }
        _ if path.starts_with("/to?") => {
            send_head(&mut stream, 302, true, &[("location", &path["/to?".len()..])]);
        }
        _ => {
            let headers = lines(stream.request.headers.headers());
            answer(stream, 200, &format!("{path}\n{headers}")).await;
        }
    }
}

async fn echo(mut stream: AcceptedStream) {
    send_head(&mut stream, 200, false, &[]);
    loop {
        match stream.body.read().await {
            Ok(Received::Data(bytes)) => stream.answer.write(bytes).await.unwrap(),
            Ok(_) => return stream.answer.finish().unwrap(),
            Err(_) => return,
        }
    }
}

async fn trailers(mut stream: AcceptedStream) {
    send_head(&mut stream, 200, false, &[("trailer", "x-sum")]);
    let mut sum = String::new();
    loop {
        match stream.body.read().await.unwrap() {
            Received::Data(bytes) => stream.answer.write(bytes).await.unwrap(),
            Received::Trailers(block) => {
                sum = lines(block.headers());
                break;
            }
            Received::End => break,
        }
    }
    let mut block = HeaderBlock::new();
    block.push(b"x-sum", sum.trim().as_bytes()).unwrap();
    stream.answer.finish_with_trailers(block.headers()).unwrap();
}

/// Greets, sends all back, and says goodbye behind the client's end.
async fn switched(mut stream: AcceptedStream) {
    send_head(&mut stream, 101, false, &[("connection", "upgrade"), ("upgrade", "SPDY/3.1")]);
    let _ = stream.answer.write(Bytes::from_static(b"early ")).await;
    loop {
        match stream.body.read().await {
            Ok(Received::Data(bytes)) => drop(stream.answer.write(bytes).await),
            Ok(_) => break,
            Err(_) => return,
        }
    }
    let _ = stream.answer.write(Bytes::from_static(b" bye")).await;
    let _ = stream.answer.finish();
}

#[tokio::test]
async fn a_request_reaches_an_agent_at_another_instance() {
    let pair = Pair::start().await;
    let headers = "X-B: 2\r\nX-Wsproxy-Peer: x\r\nAccept: a/b\r\n";
    let there = pair.ask(&head("GET", "/a//b%2Fc?x=1", headers)).await;
    assert_eq!(there.status, 200, "{there:?}");
    assert_eq!(there.header("x-wsproxy-source"), "upstream");
    let here = ask(&pair.two, &head("GET", "/a//b%2Fc?x=1", headers)).await;
    // The upstream sees no difference but ids.
    let known = |response: &Response| {
        let is_id = |line: &&str| line.starts_with("traceparent") || line.starts_with("x-request");
        let mut lines: Vec<_> =
            response.body.lines().filter(|line| !is_id(line)).map(str::to_owned).collect();
        lines.sort();
        lines
    };
    assert_eq!(known(&there), known(&here));
    assert!(there.body.contains("host: gateway.example\n") && !there.body.contains(SECRET));
    assert!(there.body.starts_with("/a//b%2Fc?x=1\n"));
    let mut raw = Raw::connect(pair.one.address()).await;
    raw.write(head("HEAD", "/", "").as_bytes()).await;
    let text = raw.read_until("\r\n\r\n").await;
    assert!(text.starts_with("HTTP/1.1 200") && text.ends_with("\r\n\r\n"), "{text}");
    // One connection serves one request after the other.
    let mut raw = Raw::connect(pair.one.address()).await;
    for _ in 0..3 {
        raw.write(head("GET", "/again", "").as_bytes()).await;
        assert_eq!(raw.response().await.status, 200);
    }
    assert_eq!(pair.one.metric("wsproxy_tunnel_forwarded_total"), 5.0);
    assert_eq!(pair.two.metric("wsproxy_tunnel_peer_requests_total"), 5.0);
    pair.drain().await;
}

#[tokio::test]
async fn bodies_and_trailers_pass_both_ways() {
    let pair = Pair::start().await;
    let mut raw = Raw::connect(pair.one.address()).await;
    raw.write(head("POST", "/echo", "Transfer-Encoding: chunked\r\n").as_bytes()).await;
    for word in ["one", "two"] {
        raw.write(format!("3\r\n{word}\r\n").as_bytes()).await;
        // The answer comes while the request is not whole.
        raw.read_until(word).await;
    }
    raw.write(b"0\r\n\r\n").await;
    raw.read_until("\r\n0\r\n\r\n").await;
    let mut raw = Raw::connect(pair.one.address()).await;
    let headers = "TE: trailers\r\nTrailer: x-a\r\nTransfer-Encoding: chunked\r\n";
    raw.write(head("POST", "/trailers", headers).as_bytes()).await;
    raw.write(b"4\r\nbody\r\n0\r\nx-a: 7\r\n\r\n").await;
    let text = raw.read_until("x-sum: x-a: 7\r\n\r\n").await;
    assert!(text.contains("\r\nbody\r\n"), "{text}");
    let body = vec![b'x'; 3_000_000];
    let mut raw = Raw::connect(pair.one.address()).await;
    raw.write(head("PUT", "/body", "Content-Length: 3000000\r\n").as_bytes()).await;
    raw.write(&body).await;
    assert_eq!(raw.response().await.body, "3000000 bytes");
    pair.wait_idle().await;
    pair.drain().await;
}

#[tokio::test]
async fn a_body_is_not_read_before_the_upstream_wants_it() {
    let pair = Pair::start().await;
    let expect = "Expect: 100-continue\r\nContent-Length: 5\r\n";
    let mut raw = Raw::connect(pair.one.address()).await;
    raw.write(head("POST", "/refuse", expect).as_bytes()).await;
    let refused = raw.response().await;
    assert_eq!((refused.status, &*refused.body), (413, "not read"));
    let mut raw = Raw::connect(pair.one.address()).await;
    raw.write(head("POST", "/body", expect).as_bytes()).await;
    // The agent reads without a word, so it takes a second.
    raw.read_until("100 Continue").await;
    raw.take();
    raw.write(b"12345").await;
    assert_eq!(raw.response().await.body, "5 bytes");
    pair.wait_idle().await;
    pair.drain().await;
}

#[tokio::test]
async fn upgraded_bytes_pass_early_and_behind_a_half_close() {
    let pair = Pair::start().await;
    let mut raw = Raw::connect(pair.one.address()).await;
    raw.write(format!("{}first ", head("GET", "/exec", UPGRADE)).as_bytes()).await;
    let answer = raw.response().await;
    assert_eq!((answer.status, answer.header("upgrade")), (101, "SPDY/3.1"));
    raw.write(b"second").await;
    raw.socket.shutdown().await.unwrap();
    while raw.read().await > 0 {}
    assert_eq!(raw.take(), b"early first second bye");
    pair.wait_idle().await;
    // A client that breaks off ends the stream.
    let mut raw = Raw::connect(pair.one.address()).await;
    raw.write(head("GET", "/exec", UPGRADE).as_bytes()).await;
    assert_eq!(raw.response().await.status, 101);
    raw.reset();
    pair.wait_idle().await;
    pair.drain().await;
}

#[tokio::test]
async fn a_client_that_leaves_ends_its_stream_at_the_other_instance() {
    let pair = Pair::start().await;
    let chunked = "Transfer-Encoding: chunked\r\n";
    for (method, path, headers, body) in [
        ("GET", "/silent", "", ""),
        ("POST", "/silent", chunked, "3\r\none\r\n"),
        ("GET", "/endless", "", ""),
        ("POST", "/echo", chunked, "3\r\none\r\n"),
    ] {
        let mut raw = Raw::connect(pair.one.address()).await;
        raw.write(format!("{}{body}", head(method, path, headers)).as_bytes()).await;
        eventually("the stream is open", || pair.agent.lane.streams() == 1).await;
        drop(raw);
        pair.wait_idle().await;
    }
    pair.drain().await;
}

#[tokio::test]
async fn a_broken_answer_stays_broken() {
    let pair = Pair::start().await;
    for path in ["/broken", "/broken-length"] {
        let mut raw = Raw::connect(pair.one.address()).await;
        raw.write(head("GET", path, "").as_bytes()).await;
        while raw.read().await > 0 {}
        let text = String::from_utf8_lossy(raw.rest()).into_owned();
        assert!(text.starts_with("HTTP/1.1 200") && text.contains("half"), "{text}");
        assert!(!text.ends_with("0\r\n\r\n"), "{path}: {text}");
        // A client that reads until the end of the connection gets an error.
        let mut raw = Raw::connect(pair.one.address()).await;
        raw.write(head("GET", path, "").replace("HTTP/1.1", "HTTP/1.0").as_bytes()).await;
        let mut buffer = [0; 1000];
        let failed = async {
            loop {
                match tokio::io::AsyncReadExt::read(&mut raw.socket, &mut buffer).await {
                    Ok(0) => return false,
                    Ok(_) => {}
                    Err(_) => return true,
                }
            }
        };
        assert!(soon("the end", failed).await, "{path}: the client takes a part for the whole");
    }
    pair.drain().await;
}

#[tokio::test]
async fn the_listener_serves_instances_and_local_lanes_only() {
    let redis = RedisServer::start();
    let (config_one, config_two) = (peered(&redis, "s1"), peered(&redis, "s2"));
    let addresses = [&config_one, &config_two].map(|config| config.tunnel.peer_bind.unwrap());
    let one = TestInstance::start(config_one).await;
    let two = TestInstance::start(config_two).await;
    let agent = ClusterAgent::start(two.address(), serve).await;
    let ask = async |at: usize, path: &str, secret: &str| {
        let headers = [("X-Wsproxy-Peer", &*format!("Bearer {secret}"))];
        request(addresses[at], "GET", path, &headers, b"").await
    };
    assert_eq!(ask(1, "/_peer/c1/x", SECRET).await.status, 200);
    assert_eq!(ask(1, "/_peer/c1/x", "other-secret").await.status, 401);
    assert_eq!(request(addresses[1], "GET", "/_peer/c1/x", &[], b"").await.status, 401);
    assert_eq!(ask(1, "/clusters/c1/proxy/x", SECRET).await.status, 404);
    // The lane is at the other instance, which gets no request from here.
    let absent = ask(0, "/_peer/c1/x", SECRET).await;
    assert_eq!((absent.status, absent.header("x-wsproxy-error")), (421, "no_lane"));
    // Other listeners know no such path.
    let headers = [("X-Wsproxy-Peer", &*format!("Bearer {SECRET}"))];
    assert_eq!(request(two.address(), "GET", "/_peer/c1/x", &headers, b"").await.status, 404);
    drop(agent);
    one.drain().await;
    two.drain().await;
}

#[tokio::test]
async fn an_instance_without_a_listener_serves_its_own_lanes_only() {
    let redis = RedisServer::start();
    let mut alone = config(Some(&redis.url()));
    alone.tunnel.reconnect_grace = Duration::ZERO;
    let alone = TestInstance::start(alone).await;
    let two = TestInstance::start(peered(&redis, "s2")).await;
    let _agent = ClusterAgent::start(two.address(), serve).await;
    let answer = ask(&alone, &head("GET", "/x", "")).await;
    assert_eq!((answer.status, answer.header("x-wsproxy-error")), (503, "cluster_offline"));
    alone.drain().await;
    two.drain().await;
}

#[tokio::test]
async fn instances_speak_tls_to_each_other() {
    let redis = RedisServer::start();
    let made = Made::new();
    let files = Files::new(&made);
    let secure = |name: &str| {
        let mut config = peered(&redis, name);
        files.put_into(&mut config);
        let port = config.tunnel.peer_bind.unwrap().port();
        config.tunnel.peer_tls = true;
        config.tunnel.peer_url = Some(format!("https://localhost:{port}"));
        config.tunnel.peer_ca_file = Some(files.certificate());
        config
    };
    let one = TestInstance::start(secure("s1")).await;
    let two = TestInstance::start(secure("s2")).await;
    let to_one = Encrypted::to(one.address(), made.trust()).await;
    let to_two = Encrypted::to(two.address(), made.trust()).await;
    let agent = ClusterAgent::start(to_two.address, serve).await;
    let mut raw = Raw::connect(to_one.address).await;
    raw.write(head("GET", "/x", "").as_bytes()).await;
    assert_eq!(raw.response().await.status, 200);
    let mut raw = Raw::connect(to_one.address).await;
    raw.write(format!("{}first ", head("GET", "/exec", UPGRADE)).as_bytes()).await;
    assert_eq!(raw.response().await.status, 101);
    raw.socket.shutdown().await.unwrap();
    while raw.read().await > 0 {}
    assert_eq!(raw.take(), b"early first  bye");
    // No request, and no secret, goes to an address without TLS.
    agent.cut();
    let plain = r#"{"server_id":"s2","peer":"http://127.0.0.1:1","boot_id":"b","number":1,"registration":1}"#;
    redis.call(&["HSET", "tunnel:c1", "plain", plain]);
    let told =
        plain.replacen('{', r#"{"event":"connected","cluster_id":"c1","agent_id":"plain","#, 1);
    redis.call(&["PUBLISH", "tunnels:events", &told]);
    eventually_yes("the lane is gone", async || {
        let mut raw = Raw::connect(to_one.address).await;
        raw.write(head("GET", "/x", "").as_bytes()).await;
        raw.response().await.status == 503
    })
    .await;
    one.drain().await;
    two.drain().await;
}

const UPGRADE: &str = "Connection: Upgrade\r\nUpgrade: SPDY/3.1\r\n";

const SECRET: &str = "secret-of-the-instances-0123456789";
