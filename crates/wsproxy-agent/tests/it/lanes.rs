//! The agent's lane: handshake, reconnects, drains.

use std::time::{Duration, Instant};

use wsproxy_conn::{clock::Micros, lane::LaneSettings};
use wsproxy_proto::tunnel::{code::Code, event::End, frame::Open, lane::OpenError};

use crate::{
    gateway::Gateway,
    support::{Agent, Bench, config, head, read_all, settings, within},
    upstream::Upstream,
};

#[tokio::test]
async fn the_handshake_names_cluster_agent_and_connection() {
    let gateway = Gateway::new().await;
    let _agent = Agent::new(config(&settings(gateway.port, 9)));
    let first = gateway.handshake().await;
    assert_eq!(first.request_line, "GET /clusters/c1/connect HTTP/1.1");
    let value = |name: &str| first.headers[name].to_str().unwrap().to_owned();
    assert_eq!(value("authorization"), "Bearer opens-c1");
    assert_eq!(value("sec-websocket-protocol"), "wsproxy.tunnel.v1");
    assert_eq!(value("host"), format!("127.0.0.1:{}", gateway.port));
    assert!(!first.headers.contains_key("sec-websocket-extensions"));
    let who = value("x-wsproxy-agent");
    let parts: Vec<_> = who.split(' ').collect();
    assert_eq!((parts[0], parts[1].len(), parts[2]), ("a1", 32, "1"));
    drop(first);
    let second = gateway.handshake().await;
    let expected = format!("a1 {} 2", parts[1]);
    assert_eq!(second.headers["x-wsproxy-agent"], expected);
}

#[tokio::test]
async fn a_lane_that_is_lost_is_dialled_again() {
    let bench = Bench::new().await;
    bench.lane.task.abort();
    let lane = bench.gateway.lane().await;
    let open = Open::new(b"GET", b"/");
    let _stream = lane.handle.open(&open).unwrap();
    bench.upstream.request().await;
}

#[tokio::test]
async fn a_gateway_that_says_when_is_not_dialled_earlier() {
    let gateway = Gateway::new().await;
    let _agent = Agent::new(config(&settings(gateway.port, 9)));
    let began = Instant::now();
    gateway.handshake().await.refuse(503, "Retry-After: 1\r\n").await;
    gateway.handshake().await;
    assert!(began.elapsed() >= Duration::from_secs(1));
}

#[tokio::test]
async fn a_credential_that_is_refused_waits_long() {
    let gateway = Gateway::new().await;
    let mut config = config(&settings(gateway.port, 9));
    config.pauses.refused = Duration::from_millis(700);
    let _agent = Agent::new(config);
    for status in [401, 403] {
        let began = Instant::now();
        gateway.handshake().await.refuse(status, "").await;
        gateway.handshake().await.refuse(503, "").await;
        assert!(began.elapsed() >= Duration::from_millis(700));
    }
}

#[tokio::test]
async fn a_gateway_that_drains_is_left_behind_the_next_lane() {
    let bench = Bench::new().await;
    let mut slow = bench.get("/slow");
    let (_, mut upstream) = bench.upstream.request().await;
    bench.lane.handle.drain(Code::Restarting, Micros(20_000_000));
    let next = bench.gateway.lane().await;
    assert!(bench.lane.handle.status().end.is_none());
    upstream.write("HTTP/1.1 200 x\r\nContent-Length: 4\r\n\r\nlate").await;
    assert_eq!(head(&mut slow).await.status, 200);
    assert_eq!(read_all(&mut slow).await.unwrap().0, b"late");
    within(bench.lane.handle.ended()).await;
    let open = Open::new(b"GET", b"/");
    let _stream = next.handle.open(&open).unwrap();
}

#[tokio::test]
async fn an_agent_that_another_process_replaced_waits_long() {
    let (gateway, upstream) = (Gateway::new().await, Upstream::new().await);
    let mut config = config(&settings(gateway.port, upstream.port));
    config.pauses.refused = Duration::from_millis(700);
    let _agent = Agent::new(config);
    let lane = gateway.lane().await;
    let began = Instant::now();
    lane.handle.drain(Code::Superseded, Micros(5_000_000));
    gateway.handshake().await;
    assert!(began.elapsed() >= Duration::from_millis(700));
}

#[tokio::test]
async fn an_agent_that_stops_finishes_its_requests() {
    let mut bench = Bench::new().await;
    let mut slow = bench.get("/slow");
    let (_, mut upstream) = bench.upstream.request().await;
    bench.agent.stop.cancel();
    let go_away = within(bench.lane.handle.going_away()).await.unwrap();
    assert_eq!(
        (go_away.last_stream, go_away.code, go_away.drain_ms),
        (1, Code::Restarting, 20_000)
    );
    upstream.write("HTTP/1.1 200 x\r\nContent-Length: 4\r\n\r\nlast").await;
    assert_eq!(head(&mut slow).await.status, 200);
    assert_eq!(read_all(&mut slow).await.unwrap().0, b"last");
    within(&mut bench.agent.task).await.unwrap();
    within(bench.lane.handle.ended()).await;
}

#[tokio::test]
async fn a_drain_ends_in_time() {
    let mut bench = Bench::with(|settings| settings.drain = Duration::from_millis(100)).await;
    let mut endless = bench.get("/endless");
    let (_, mut upstream) = bench.upstream.request().await;
    bench.agent.stop.cancel();
    within(&mut bench.agent.task).await.unwrap();
    let end = within(endless.answer.head()).await.unwrap_err();
    assert_eq!(end, End::LaneLost { not_dispatched: false });
    upstream.is_closed().await;
}

#[tokio::test]
async fn streams_beyond_the_bound_are_refused() {
    let gateway = Gateway::new().await;
    let upstream = Upstream::new().await;
    let mut config = config(&settings(gateway.port, upstream.port));
    config.lane.protocol.streams_max = 1;
    let agent = Agent::new(config);
    let lane = gateway.handshake().await.accept(LaneSettings::default()).await;
    let bench = Bench { gateway, lane, upstream, agent };
    let _first = bench.get("/");
    let open = Open::new(b"GET", b"/");
    assert_eq!(bench.lane.handle.open(&open).unwrap_err(), OpenError::Full);
}
