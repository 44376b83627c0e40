//! The connection between two instances: deadlines, repetitions, full lanes, the cache, large heads.

use std::{net::SocketAddr, sync::Mutex, time::Instant};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpListener,
};
use wsproxy::config::{peer::TrustedProxy, tunnel::rows::CacheRule};
use wsproxy_proto::tunnel::lane::LaneConfig;

use super::*;

fn one_stream() -> LaneSettings {
    let protocol = LaneConfig { streams_max: 1, ..LaneConfig::default() };
    LaneSettings { protocol, ..LaneSettings::default() }
}

fn code(answer: &Response) -> (u16, &str) {
    (answer.status, answer.header("x-wsproxy-error"))
}

/// An instance whose listener for others is the test's own: it reads the heads of requests, and answers each with
/// `answer` before it closes the connection.
struct Fake {
    instance: TestInstance,
    _agent: ClusterAgent,
    heads: Arc<Mutex<Vec<String>>>,
}

impl Fake {
    async fn start(redis: &RedisServer, agent: &str, answer: &'static str) -> Self {
        let mut config = peered(redis, "fake");
        let listener = TcpListener::bind(SocketAddr::from(([127, 0, 0, 1], 0))).await.unwrap();
        config.tunnel.peer_url = Some(format!("http://{}", listener.local_addr().unwrap()));
        let heads = Arc::new(Mutex::new(Vec::new()));
        let seen = Arc::clone(&heads);
        tokio::spawn(async move {
            while let Ok((mut socket, _)) = listener.accept().await {
                let mut head = Vec::new();
                while !head.ends_with(b"\r\n\r\n") {
                    head.push(socket.read_u8().await.unwrap());
                }
                seen.lock().unwrap().push(String::from_utf8(head).unwrap());
                socket.write_all(answer.as_bytes()).await.unwrap();
            }
        });
        let instance = TestInstance::start(config).await;
        let name = Name { agent, ..Name::default() };
        let settings = LaneSettings::default();
        let agent = ClusterAgent::named(instance.address(), name, settings, serve).await.unwrap();
        Self { instance, _agent: agent, heads }
    }

    fn heads(&self) -> Vec<String> {
        std::mem::take(&mut *self.heads.lock().unwrap())
    }
}

#[tokio::test]
async fn a_slow_upload_over_an_instance_has_no_fixed_end() {
    let short = |config: &mut Config| {
        config.tunnel.head_timeout = Duration::from_millis(500);
        config.tunnel.head_margin = Duration::from_millis(100);
        config.tunnel.idle_timeout = Duration::from_secs(3);
    };
    let pair = Pair::with(short, LaneSettings::default()).await;
    for headers in ["Content-Length: 16\r\n", "Transfer-Encoding: chunked\r\n"] {
        let mut raw = Raw::connect(pair.one.address()).await;
        raw.write(head("PUT", "/body", headers).as_bytes()).await;
        let piece: &[u8] = if headers.starts_with('C') { b"x" } else { b"1\r\nx\r\n" };
        for _ in 0..16 {
            tokio::time::sleep(Duration::from_millis(450)).await;
            raw.write(piece).await;
        }
        if piece.len() > 1 {
            raw.write(b"0\r\n\r\n").await;
        }
        let answer = raw.response().await;
        assert_eq!((answer.status, &*answer.body), (200, "16 bytes"));
    }
    // The reason of the instance with the lane arrives.
    for headers in ["", "Content-Length: 1\r\n"] {
        let mut raw = Raw::connect(pair.one.address()).await;
        raw.write(head("PUT", "/silent", headers).as_bytes()).await;
        if !headers.is_empty() {
            raw.write(b"x").await;
        }
        let answer = raw.response().await;
        assert_eq!(code(&answer), (504, "gateway_timeout"));
        assert_eq!(answer.header("content-type"), "application/json");
    }
    pair.wait_idle().await;
    pair.drain().await;
}

#[tokio::test]
async fn timeouts_of_forwarded_uploads_do_not_open_the_breaker() {
    let pair = Pair::with(|config| config.tunnel.breaker_min = 2, LaneSettings::default()).await;
    for _ in 0..5 {
        let mut raw = Raw::connect(pair.one.address()).await;
        raw.write(head("PUT", "/late", "Content-Length: 8\r\n").as_bytes()).await;
        raw.write(b"x").await;
        assert_eq!(code(&raw.response().await), (504, "upstream_timeout"));
    }
    // Both instances tell the reason.
    for instance in [&pair.one, &pair.two] {
        let labels = r#"cluster="c1",pattern="other",code="upstream_timeout""#;
        let metric = format!("wsproxy_tunnel_requests_total{{{labels}}}");
        eventually("all are counted", || instance.metric(&metric) == 5.0).await;
    }
    assert_eq!(pair.ask(&head("GET", "/x", "")).await.status, 200);
    pair.drain().await;
}

#[tokio::test]
async fn a_get_whose_instance_breaks_off_is_sent_once_more() {
    let redis = RedisServer::start();
    let one = TestInstance::start(peered(&redis, "s1")).await;
    let fake = Fake::start(&redis, "node-1", "").await;
    // There is no other instance, so the same one gets it again, marked.
    assert_eq!(code(&ask(&one, &head("GET", "/x", "")).await), (502, "lane_lost"));
    let heads = fake.heads();
    let is_marked = |head: &String| head.contains("x-wsproxy-retries: 0 1\r\n");
    assert_eq!(heads.iter().map(is_marked).collect::<Vec<_>>(), [false, true], "{heads:?}");
    assert_eq!(code(&ask(&one, &head("POST", "/x", "")).await), (502, "lane_lost"));
    assert_eq!(fake.heads().len(), 1);
    // An upgrade may run a command.
    let upgrade = head("GET", "/x", "Connection: upgrade\r\nUpgrade: websocket\r\n");
    let answer = ask(&one, &upgrade).await;
    assert_eq!(code(&answer), (502, "lane_lost"));
    assert_eq!(answer.json()["error"]["retryable"], false, "{}", answer.body);
    assert_eq!(fake.heads().len(), 1);
    let mut raw = Raw::connect(one.address()).await;
    raw.write(head("GET", "/x", "Content-Length: 1\r\n").as_bytes()).await;
    raw.write(b"x").await;
    assert_eq!(code(&raw.response().await), (502, "lane_lost"));
    assert_eq!(fake.heads().len(), 1);
    // Another instance answers it.
    let two = TestInstance::start(peered(&redis, "s2")).await;
    let name = Name { agent: "node-2", ..Name::default() };
    let _agent =
        ClusterAgent::named(two.address(), name, LaneSettings::default(), serve).await.unwrap();
    eventually_yes("both are asked", async || {
        ask(&one, &head("GET", "/x", "")).await.status == 200 && !fake.heads().is_empty()
    })
    .await;
    one.drain().await;
    fake.instance.drain().await;
    two.drain().await;
}

#[tokio::test]
async fn a_lane_lost_at_another_instance_is_repeated_from_here() {
    let pair = Pair::start().await;
    let mut get = Raw::connect(pair.one.address()).await;
    get.write(head("GET", "/silent", "").as_bytes()).await;
    eventually("it is open", || pair.agent.lane.streams() == 1).await;
    let three = TestInstance::start(peered(&pair.redis, "s3")).await;
    let name = Name { agent: "node-2", ..Name::default() };
    let seen = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&seen);
    let marked = move |stream: AcceptedStream| {
        count.fetch_add(1, Relaxed);
        async move {
            let text = format!("retried: {}", stream.request.retried);
            answer(stream, 200, &text).await;
        }
    };
    let settings = LaneSettings::default();
    let _far = ClusterAgent::named(three.address(), name, settings, marked).await.unwrap();
    let Pair { redis: _redis, one, two, agent } = pair;
    agent.cut();
    assert_eq!(get.response().await.body, "retried: true");
    assert_eq!(seen.load(Relaxed), 1);
    assert_eq!(one.metric("wsproxy_tunnel_retries_total{reason=\"lane_lost\"}"), 1.0);
    assert_eq!(two.metric("wsproxy_tunnel_retries_total{reason=\"lane_lost\"}"), 0.0);
    for instance in [one, two, three] {
        instance.drain().await;
    }
}

#[tokio::test]
async fn an_instance_that_refuses_another_is_passed_over() {
    let redis = RedisServer::start();
    let mut config = peered(&redis, "s1");
    config.tunnel.wait = Duration::from_millis(100);
    let one = TestInstance::start(config).await;
    let refused = "HTTP/1.1 401 Unauthorized\r\ncontent-length: 0\r\nconnection: close\r\n\r\n";
    let fake = Fake::start(&redis, "node-1", refused).await;
    let alone = ask(&one, &head("GET", "/x", "")).await;
    assert_eq!(code(&alone), (503, "cluster_reconnecting"), "{alone:?}");
    assert_eq!(fake.heads().len(), 1);
    // Another instance answers, and each request comes to it once, be it a POST.
    let two = TestInstance::start(peered(&redis, "s2")).await;
    let name = Name { agent: "node-2", ..Name::default() };
    let served = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&served);
    let counted = move |stream: AcceptedStream| {
        count.fetch_add(1, Relaxed);
        async move { answer(stream, 200, "served").await }
    };
    let settings = LaneSettings::default();
    let _agent = ClusterAgent::named(two.address(), name, settings, counted).await.unwrap();
    let post = head("POST", "/x", "");
    eventually_yes("the other is known", async || ask(&one, &post).await.status == 200).await;
    fake.heads();
    let before = served.load(Relaxed);
    for _ in 0..40 {
        let passed = ask(&one, &post).await;
        assert_eq!((passed.status, &*passed.body), (200, "served"));
    }
    assert_eq!(served.load(Relaxed), before + 40);
    assert!(!fake.heads().is_empty(), "the one that refuses is asked too");
    one.drain().await;
    fake.instance.drain().await;
    two.drain().await;
}

#[tokio::test]
async fn a_process_in_between_that_fails_may_have_passed_the_request_on() {
    let redis = RedisServer::start();
    let one = TestInstance::start(peered(&redis, "s1")).await;
    let failed =
        "HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\nconnection: close\r\n\r\n";
    let fake = Fake::start(&redis, "node-1", failed).await;
    let answer = ask(&one, &head("POST", "/x", "")).await;
    assert_eq!(code(&answer), (502, "lane_lost"), "{answer:?}");
    assert_eq!(answer.json()["error"]["retryable"], false, "{}", answer.body);
    assert_eq!(fake.heads().len(), 1);
    assert_eq!(code(&ask(&one, &head("GET", "/x", "")).await), (502, "lane_lost"));
    assert_eq!(fake.heads().len(), 2);
    one.drain().await;
    fake.instance.drain().await;
}

#[tokio::test]
async fn a_head_that_an_instance_takes_passes_to_another() {
    let pair = Pair::start().await;
    let long = "x".repeat(15_900);
    let many: String = (0..110).map(|n| format!("X-H{n}: {n}\r\n")).collect();
    for headers in [format!("X-Long: {long}\r\n"), many] {
        let answer = pair.ask(&head("GET", "/x", &headers)).await;
        assert_eq!(answer.status, 200, "{}", answer.body);
        assert!(answer.body.contains("x-long: ") || answer.body.contains("x-h109: 109"));
    }
    let Pair { redis, one, two, agent } = pair;
    agent.cut();
    two.drain().await;
    // One of another configuration takes less.
    let refused = "HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-length: 0\r\nconnection: close\r\n\r\n";
    let fake = Fake::start(&redis, "node-2", refused).await;
    let answer = ask(&one, &head("GET", "/x", "")).await;
    assert_eq!(code(&answer), (431, "head_too_large"));
    assert_eq!(answer.json()["error"]["code"], "head_too_large");
    one.drain().await;
    fake.instance.drain().await;
}

#[tokio::test]
async fn answers_of_another_instance_are_kept_here() {
    let keep = |config: &mut Config| {
        let ttl = Duration::from_secs(60);
        config.tunnel.cache = vec![CacheRule { pattern: "/kept/{}".into(), ttl }];
    };
    let pair = Pair::with(keep, LaneSettings::default()).await;
    let asked = async |gateway: &TestInstance| {
        let answer = ask(gateway, &head("GET", "/kept/a", "")).await;
        (answer.status, answer.header("x-wsproxy-source").to_owned(), answer.body)
    };
    let first = asked(&pair.one).await;
    assert_eq!((first.0, &*first.1), (200, "upstream"));
    let second = asked(&pair.one).await;
    assert_eq!((second.0, &*second.1, second.2), (200, "cache", first.2));
    // The instance with the lane keeps its own.
    assert_eq!(asked(&pair.two).await.1, "upstream");
    assert_eq!(pair.one.metric("wsproxy_tunnel_forwarded_total"), 1.0);
    pair.drain().await;
}

#[tokio::test]
async fn a_location_at_the_host_of_a_trusted_proxy_gets_the_prefix() {
    let trust = |config: &mut Config| {
        config.server.trusted_proxies = vec!["127.0.0.1".parse::<TrustedProxy>().unwrap()];
    };
    let pair = Pair::with(trust, LaneSettings::default()).await;
    let forwarded = "X-Forwarded-Host: shop.example, inner.example\r\nX-Forwarded-Proto: https\r\n";
    for gateway in [&pair.one, &pair.two] {
        for host in ["shop.example", "gateway.example"] {
            let path = format!("/to?https://{host}/login");
            let answer = ask(gateway, &head("GET", &path, forwarded)).await;
            assert_eq!(answer.header("location"), "/clusters/c1/proxy/login", "{host}");
        }
        let answer = ask(gateway, &head("GET", "/to?https://other.example/", forwarded)).await;
        assert_eq!(answer.header("location"), "https://other.example/");
    }
    pair.drain().await;
}

#[tokio::test]
async fn the_wait_at_another_instance_is_part_of_the_same_wait() {
    let redis = RedisServer::start();
    let mut of_one = peered(&redis, "s1");
    of_one.tunnel.wait = Duration::from_millis(300);
    let mut of_two = peered(&redis, "s2");
    of_two.tunnel.wait = Duration::from_secs(30);
    let (one, two) = (TestInstance::start(of_one).await, TestInstance::start(of_two).await);
    let name = Name::default();
    let agent = ClusterAgent::named(two.address(), name, one_stream(), serve).await.unwrap();
    let mut first = Raw::connect(two.address()).await;
    first.write(head("GET", "/silent", "").as_bytes()).await;
    eventually("the lane is full", || agent.lane.streams() == 1).await;
    let began = Instant::now();
    assert_eq!(code(&ask(&one, &head("GET", "/x", "")).await), (503, "overloaded"));
    let took = began.elapsed();
    assert!((300..10_000).contains(&took.as_millis()), "{took:?}");
    one.drain().await;
    two.drain().await;
}

#[tokio::test]
async fn requests_go_to_an_instance_with_room_where_lanes_here_are_full() {
    let pair = Pair::with(|config| config.tunnel.wait = Duration::from_secs(5), one_stream()).await;
    let name = Name { agent: "node-2", ..Name::default() };
    let near = ClusterAgent::named(pair.one.address(), name, one_stream(), serve).await.unwrap();
    let open = async |gateway: &TestInstance, lane: &ClusterAgent| {
        let mut raw = Raw::connect(gateway.address()).await;
        raw.write(head("GET", "/silent", "").as_bytes()).await;
        eventually("the lane is full", || lane.lane.streams() == 1).await;
        raw
    };
    let here = open(&pair.one, &near).await;
    let began = Instant::now();
    assert_eq!(pair.ask(&head("GET", "/x", "")).await.status, 200);
    assert!(began.elapsed() < Duration::from_secs(4), "{:?}", began.elapsed());
    let _there = open(&pair.two, &pair.agent).await;
    // All are full: the request waits here, and gets the place that is free first.
    let mut waiting = Raw::connect(pair.one.address()).await;
    waiting.write(head("POST", "/body", "Content-Length: 4\r\n").as_bytes()).await;
    waiting.write(b"body").await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    drop(here);
    let answer = waiting.response().await;
    assert_eq!((answer.status, &*answer.body), (200, "4 bytes"));
    let _here = open(&pair.one, &near).await;
    assert_eq!(code(&pair.ask(&head("GET", "/x", "")).await), (503, "overloaded"));
    pair.one.drain().await;
    pair.two.drain().await;
}

#[tokio::test]
async fn bytes_of_an_upgrade_that_breaks_are_counted() {
    let pair = Pair::start().await;
    let mut raw = Raw::connect(pair.one.address()).await;
    raw.write(format!("{}first ", head("GET", "/exec", UPGRADE)).as_bytes()).await;
    assert_eq!(raw.response().await.status, 101);
    raw.read_until("early first").await;
    raw.reset();
    pair.wait_idle().await;
    for (direction, bytes) in [("in", 6.0), ("out", 12.0)] {
        let name = format!("wsproxy_tunnel_bytes_total{{direction=\"{direction}\"}}");
        eventually("the bytes are counted", || pair.one.metric(&name) == bytes).await;
        assert_eq!(pair.two.metric(&name), bytes, "{direction}");
    }
    pair.drain().await;
}

#[tokio::test]
async fn little_of_a_body_waits_between_two_instances() {
    let pair = Pair::start().await;
    let mut raw = Raw::connect(pair.one.address()).await;
    raw.write(head("PUT", "/silent", "Content-Length: 32000000\r\n").as_bytes()).await;
    let sending = tokio::spawn(async move { raw.socket.write_all(&vec![0; 32_000_000]).await });
    let read =
        |gateway: &TestInstance| gateway.metric("wsproxy_tunnel_bytes_total{direction=\"in\"}");
    // The upstream takes no more.
    let mut before = -1.0;
    eventually_yes("nothing moves", async || {
        tokio::time::sleep(Duration::from_millis(500)).await;
        let now = read(&pair.one);
        now > 0.0 && std::mem::replace(&mut before, now) == now
    })
    .await;
    let between = read(&pair.one) - read(&pair.two);
    assert!(between <= 600_000.0, "{between}");
    sending.abort();
    pair.drain().await;
}
