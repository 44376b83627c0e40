//! Waiting, quotas, rates, the breaker, deadlines, retries and the cache.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};

use bytes::Bytes;
use wsproxy::config::{Config, tunnel::rows::CacheRule};
use wsproxy_conn::lane::{AcceptedStream, LaneSettings};
use wsproxy_proto::tunnel::{code::Code, frame::Reset, lane::LaneConfig};

use crate::support::{
    cluster_agent::{
        ClusterAgent, Name, answer, ask, config, head, hello, read_body, send, send_head,
    },
    eventually,
    gateway::TestInstance,
    http::Response,
};

/// Opens a stream and never answers.
async fn silent(stream: AcceptedStream) {
    let AcceptedStream { answer: mut writer, .. } = stream;
    writer.ended().await;
}

async fn start(change: impl FnOnce(&mut Config)) -> TestInstance {
    let mut config = config(None);
    change(&mut config);
    TestInstance::start(config).await
}

fn code(answer: &Response) -> (u16, &str) {
    (answer.status, answer.header("x-wsproxy-error"))
}

fn one_stream() -> LaneSettings {
    let protocol = LaneConfig { streams_max: 1, ..LaneConfig::default() };
    LaneSettings { protocol, ..LaneSettings::default() }
}

#[tokio::test]
async fn requests_wait_for_a_lane_that_is_expected() {
    let gateway = start(|config| config.tunnel.cluster_waiting_max = 2).await;
    let mut waiting = Vec::new();
    for _ in 0..2 {
        waiting.push(send(&gateway, &head("GET", "/", "")).await);
    }
    let request = head("POST", "/", "");
    // Beyond the room the reason comes at once.
    let refused = crate::support::soon("the refusal", async {
        loop {
            let answer = ask(&gateway, &request).await;
            if answer.status == 503 {
                return answer;
            }
        }
    })
    .await;
    assert_eq!(code(&refused), (503, "cluster_reconnecting"));
    assert_eq!(refused.header("retry-after"), "1");
    let _agent = ClusterAgent::start(gateway.address(), hello).await;
    for raw in &mut waiting {
        assert_eq!(raw.response().await.body, "hello");
    }
    gateway.drain().await;
}

#[tokio::test]
async fn a_wait_ends_with_its_reason() {
    let wait = Duration::from_millis(50);
    let gateway = start(|config| config.tunnel.wait = wait).await;
    assert_eq!(code(&ask(&gateway, &head("GET", "/", "")).await), (503, "cluster_reconnecting"));
    let name = Name::default();
    let agent = ClusterAgent::named(gateway.address(), name, one_stream(), silent).await.unwrap();
    let _first = send(&gateway, &head("GET", "/", "")).await;
    eventually("the lane is full", || agent.lane.streams() == 1).await;
    assert_eq!(code(&ask(&gateway, &head("GET", "/", "")).await), (503, "overloaded"));
    gateway.drain().await;
}

#[tokio::test]
async fn a_free_place_goes_to_the_one_that_waits() {
    let gateway = start(|_| {}).await;
    let name = Name::default();
    let agent = ClusterAgent::named(gateway.address(), name, one_stream(), |stream| async {
        if &stream.request.path[..] == b"/silent" {
            silent(stream).await
        } else {
            hello(stream).await
        }
    })
    .await
    .unwrap();
    let first = send(&gateway, &head("GET", "/silent", "")).await;
    eventually("the lane is full", || agent.lane.streams() == 1).await;
    let mut second = send(&gateway, &head("GET", "/", "")).await;
    drop(first);
    assert_eq!(second.response().await.body, "hello");
    gateway.drain().await;
}

#[tokio::test]
async fn watches_leave_a_quarter_to_short_requests() {
    let gateway = start(|config| {
        config.tunnel.cluster_streams_max = 4;
        config.tunnel.wait = Duration::ZERO;
    })
    .await;
    let agent = ClusterAgent::start(gateway.address(), |stream| async {
        if stream.request.long { silent(stream).await } else { hello(stream).await }
    })
    .await;
    let mut watches = Vec::new();
    for _ in 0..3 {
        watches.push(send(&gateway, &head("GET", "/pods?watch=true", "")).await);
    }
    eventually("they are open", || agent.lane.streams() == 3).await;
    let further = ask(&gateway, &head("GET", "/pods?watch=1", "")).await;
    assert_eq!(code(&further), (503, "overloaded"));
    assert_eq!(ask(&gateway, &head("GET", "/pods", "")).await.body, "hello");
    // A place that is left can be taken again.
    drop(watches);
    eventually("they are gone", || agent.lane.streams() == 0).await;
    let _watch = send(&gateway, &head("GET", "/pods?watch=1", "")).await;
    eventually("it is open", || agent.lane.streams() == 1).await;
    gateway.drain().await;
}

#[tokio::test]
async fn a_credential_has_a_rate() {
    let gateway = start(|config| config.tunnel.requests_per_second = 1).await;
    let _agent = ClusterAgent::start(gateway.address(), hello).await;
    let request = head("GET", "/", "");
    let mut last = ask(&gateway, &request).await;
    for _ in 0..10 {
        if last.status != 200 {
            break;
        }
        last = ask(&gateway, &request).await;
    }
    assert_eq!(code(&last), (429, "rate_limited"));
    assert_eq!(last.header("retry-after"), "1");
    gateway.drain().await;
}

#[tokio::test]
async fn failures_of_the_upstream_open_the_breaker() {
    let gateway = start(|config| {
        config.tunnel.breaker_min = 2;
        config.tunnel.breaker_open = Duration::from_secs(60);
    })
    .await;
    let _agent = ClusterAgent::start(gateway.address(), |stream| async {
        if &stream.request.path[..] == b"/500" {
            return answer(stream, 500, "its own").await;
        }
        stream.answer.reset(&Reset::new(Code::UpstreamConnect));
    })
    .await;
    for _ in 0..3 {
        // The upstream's own failures do not count.
        assert_eq!(ask(&gateway, &head("GET", "/500", "")).await.status, 500);
    }
    for _ in 0..3 {
        let answer = ask(&gateway, &head("GET", "/", "")).await;
        assert_eq!(code(&answer), (502, "upstream_connect"));
    }
    let answer = ask(&gateway, &head("GET", "/500", "")).await;
    assert_eq!(code(&answer), (503, "circuit_open"));
    assert!(answer.header("retry-after").parse::<u32>().unwrap() > 1, "{answer:?}");
    gateway.drain().await;
}

#[tokio::test]
async fn a_late_head_and_a_still_body_end_a_request() {
    let gateway = start(|config| {
        config.tunnel.head_timeout = Duration::from_millis(100);
        config.tunnel.head_margin = Duration::from_millis(50);
        config.tunnel.idle_timeout = Duration::from_millis(100);
    })
    .await;
    let agent = ClusterAgent::start(gateway.address(), |mut stream| async move {
        assert!(stream.request.long == (stream.request.head_ms == 0), "{:?}", stream.request);
        if &stream.request.path[..] == b"/begun" {
            send_head(&mut stream, 200, false, &[]);
            stream.answer.write(Bytes::from_static(b"begun")).await.unwrap();
        }
        silent(stream).await;
    })
    .await;
    let answer = ask(&gateway, &head("GET", "/", "")).await;
    assert_eq!(code(&answer), (504, "gateway_timeout"));
    let mut begun = send(&gateway, &head("GET", "/begun", "")).await;
    while begun.read().await > 0 {}
    assert!(!String::from_utf8_lossy(begun.rest()).contains("\r\n0\r\n"));
    eventually("nothing is left", || agent.lane.streams() == 0).await;
    // A watch has no deadline.
    let _watch = send(&gateway, &head("GET", "/?watch=true", "")).await;
    eventually("it is open", || agent.lane.streams() == 1).await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!(agent.lane.streams(), 1);
    gateway.drain().await;
}

#[tokio::test]
async fn the_time_for_the_head_begins_behind_the_body() {
    let gateway = start(|config| {
        config.tunnel.head_timeout = Duration::from_millis(200);
        config.tunnel.head_margin = Duration::from_millis(100);
        config.tunnel.idle_timeout = Duration::from_millis(700);
    })
    .await;
    let agent = ClusterAgent::start(gateway.address(), |mut stream| async {
        read_body(&mut stream).await;
        match &stream.request.path[..] {
            b"/silent" => silent(stream).await,
            _ => hello(stream).await,
        }
    })
    .await;
    for path in ["/", "/silent"] {
        let mut slow = send(&gateway, &head("PUT", path, "Content-Length: 8\r\n")).await;
        for _ in 0..8 {
            tokio::time::sleep(Duration::from_millis(100)).await;
            slow.write(b"x").await;
        }
        let sent = std::time::Instant::now();
        let answer = slow.response().await;
        match path {
            "/" => assert_eq!(answer.body, "hello"),
            _ => {
                assert_eq!(code(&answer), (504, "gateway_timeout"));
                assert!(sent.elapsed() > Duration::from_millis(250), "{:?}", sent.elapsed());
            }
        }
    }
    // A client that sends no more is not waited for.
    let mut still = send(&gateway, &head("PUT", "/", "Content-Length: 8\r\n")).await;
    still.write(b"x").await;
    let sent = std::time::Instant::now();
    assert_eq!(code(&still.response().await), (504, "gateway_timeout"));
    assert!(sent.elapsed() > Duration::from_millis(500), "{:?}", sent.elapsed());
    eventually("nothing is left", || agent.lane.streams() == 0).await;
    gateway.drain().await;
}

#[tokio::test]
async fn timeouts_of_uploads_do_not_open_the_breaker() {
    let gateway = start(|config| config.tunnel.breaker_min = 2).await;
    let _agent = ClusterAgent::start(gateway.address(), |mut stream| async move {
        if stream.request.end {
            return hello(stream).await;
        }
        let _ = stream.body.read().await;
        stream.answer.reset(&Reset::new(Code::UpstreamTimeout));
    })
    .await;
    for _ in 0..5 {
        let mut slow = send(&gateway, &head("PUT", "/", "Content-Length: 8\r\n")).await;
        slow.write(b"x").await;
        assert_eq!(code(&slow.response().await), (504, "upstream_timeout"));
    }
    assert_eq!(ask(&gateway, &head("GET", "/", "")).await.body, "hello");
    gateway.drain().await;
}

#[tokio::test]
async fn a_request_that_reached_no_upstream_is_sent_again_whole() {
    let gateway = start(|_| {}).await;
    let tries = Arc::new(AtomicUsize::new(0));
    let seen = Arc::clone(&tries);
    let _agent = ClusterAgent::start(gateway.address(), move |mut stream| {
        let tries = Arc::clone(&seen);
        async move {
            if tries.fetch_add(1, SeqCst) < 2 {
                // The body may be on its way already.
                let _ = stream.body.read().await;
                let reset = Reset { not_dispatched: true, ..Reset::new(Code::Refused) };
                return stream.answer.reset(&reset);
            }
            assert!(!stream.request.retried);
            let body = read_body(&mut stream).await;
            answer(stream, 200, &String::from_utf8(body).unwrap()).await;
        }
    })
    .await;
    let mut raw = send(&gateway, &head("POST", "/", "Content-Length: 9\r\n")).await;
    raw.write(b"the whole").await;
    let answer = raw.response().await;
    assert_eq!((answer.status, &*answer.body), (200, "the whole"));
    assert_eq!(tries.load(SeqCst), 3);
    gateway.drain().await;
}

#[tokio::test]
async fn a_get_on_a_lost_lane_is_sent_once_more_and_a_post_is_not() {
    let gateway = start(|_| {}).await;
    let first = ClusterAgent::start(gateway.address(), silent).await;
    let mut get = send(&gateway, &head("GET", "/", "")).await;
    let mut post = send(&gateway, &head("POST", "/", "")).await;
    eventually("both are open", || first.lane.streams() == 2).await;
    let other = Name { agent: "node-2", ..Name::default() };
    let _second =
        ClusterAgent::named(gateway.address(), other, LaneSettings::default(), |stream| async {
            assert!(stream.request.retried);
            answer(stream, 200, "again").await;
        })
        .await
        .unwrap();
    first.cut();
    assert_eq!(get.response().await.body, "again");
    assert_eq!(code(&post.response().await), (502, "lane_lost"));
    gateway.drain().await;
}

#[tokio::test]
async fn answers_that_the_operator_named_are_kept() {
    let gateway = start(|config| {
        let ttl = Duration::from_secs(60);
        config.tunnel.cache = vec![CacheRule { pattern: "/kept/{}".into(), ttl }];
    })
    .await;
    let count = Arc::new(AtomicUsize::new(0));
    let _agent = ClusterAgent::start(gateway.address(), move |stream| {
        let n = count.fetch_add(1, SeqCst);
        async move { answer(stream, 200, &format!("answer {n}")).await }
    })
    .await;
    let asked = async |path| {
        let answer = ask(&gateway, &head("GET", path, "")).await;
        (
            answer.body.clone(),
            answer.header("x-wsproxy-source").to_owned(),
            !answer.header("age").is_empty(),
        )
    };
    assert_eq!(asked("/kept/a").await, ("answer 0".into(), "upstream".into(), false));
    assert_eq!(asked("/kept/a").await, ("answer 0".into(), "cache".into(), true));
    assert_eq!(asked("/kept/b").await, ("answer 1".into(), "upstream".into(), false));
    assert_eq!(asked("/other").await.0, "answer 2");
    assert_eq!(asked("/other").await.0, "answer 3");
    gateway.drain().await;
}

#[tokio::test]
async fn requests_in_flight_end_before_the_instance() {
    let gateway = start(|config| config.tunnel.drain = Duration::from_millis(200)).await;
    let agent = ClusterAgent::start(gateway.address(), |mut stream| async move {
        if stream.request.long {
            send_head(&mut stream, 200, false, &[]);
            return silent(stream).await;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
        hello(stream).await;
    })
    .await;
    let mut short = send(&gateway, &head("GET", "/", "")).await;
    let mut watch = send(&gateway, &head("GET", "/?watch=1", "")).await;
    eventually("both are open", || agent.lane.streams() == 2).await;
    let drained = tokio::spawn(gateway.drain());
    assert_eq!(short.response().await.body, "hello");
    while watch.read().await > 0 {}
    assert!(!String::from_utf8_lossy(watch.rest()).contains("\r\n0\r\n"));
    crate::support::soon("the drain", drained).await.unwrap();
}

#[tokio::test]
async fn the_numbers_tell_of_requests_and_lanes() {
    let gateway = start(|_| {}).await;
    let _agent = ClusterAgent::start(gateway.address(), hello).await;
    assert_eq!(ask(&gateway, &head("GET", "/api/v1/namespaces/a/pods", "")).await.status, 200);
    let page = || async { ask(&gateway, "GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n").await.body };
    for line in [
        "wsproxy_tunnel_lanes 1",
        "wsproxy_active_connections{endpoint=\"tunnel\"} 1",
        "pattern=\"/api/v1/namespaces/{}/pods\",code=\"2xx\"} 1",
        "wsproxy_tunnel_streams 0",
    ] {
        crate::support::eventually_yes(line, async || page().await.contains(line)).await;
    }
    gateway.drain().await;
}

#[tokio::test]
async fn clusters_have_names_in_the_numbers_from_their_first_lane() {
    let gateway = start(|config| config.tunnel.wait = Duration::ZERO).await;
    let agent = ClusterAgent::start(gateway.address(), hello).await;
    let healthy = "wsproxy_tunnel_upstream_healthy{cluster=\"c1\"}";
    agent.tell_health(true);
    eventually("the gauge is there", || gateway.metric(healthy) == 1.0).await;
    // Names of clusters without a lane come from clients.
    let without_lane = head("GET", "/", "").replace("/c1/", "/d1/");
    let without_key = "GET /clusters/c1/proxy/api HTTP/1.1\r\nHost: x\r\n\r\n";
    assert_eq!(code(&ask(&gateway, without_key).await), (401, "unauthorized"));
    let foreign = head("GET", "/api", "").replace("/c1/", "/c2/");
    assert_eq!(code(&ask(&gateway, &foreign).await), (403, "forbidden"));
    let refused = ask(&gateway, &without_lane).await;
    for code in ["unauthorized", "forbidden", refused.header("x-wsproxy-error")] {
        let series = format!(
            "wsproxy_tunnel_requests_total{{cluster=\"other\",pattern=\"other\",code=\"{code}\"}}"
        );
        eventually(code, || gateway.metric(&series) == 1.0).await;
    }
    gateway.drain().await;
}
