//! Rates of clients, cookies of whole hosts, and the numbers that operators see of the tunnel.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::json;
use wsproxy::{
    auth::sign::sign,
    config::{
        Config,
        tunnel::{ClientAuth, rows::CacheRule},
    },
};
use wsproxy_proto::names::Id;

use crate::support::{
    cluster_agent::{ClusterAgent, Name, ask, config, handshake, head, hello, send_head},
    eventually,
    gateway::TestInstance,
    http::request,
    raw::Raw,
};

/// A token of a user for the cluster `c1`, which no other token equals.
fn token(config: &Config, user: &str) -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    let clusters = vec![("clusters".to_owned(), json!(["c1"]))];
    sign(&config.jwt, &Id::parse(user).unwrap(), now, Duration::from_secs(60), clusters).unwrap()
}

#[tokio::test]
async fn a_new_token_does_not_renew_the_rate_of_its_user() {
    let mut config = config(None);
    config.tunnel.client_auth = ClientAuth::Jwt;
    config.tunnel.requests_per_second = 1;
    config.jwt.secret_key = Some("a secret with thirty-two bytes..".into());
    let gateway = TestInstance::start(config.clone()).await;
    let _agent = ClusterAgent::start(gateway.address(), hello).await;
    let ask = async |user: &str| {
        let bearer = format!("Bearer {}", token(&config, user));
        let headers = [("Authorization", &*bearer)];
        request(gateway.address(), "GET", "/clusters/c1/proxy/", &headers, b"").await
    };
    let mut statuses = Vec::new();
    for _ in 0..6 {
        statuses.push(ask("u-1").await.status);
    }
    let passed = statuses.iter().filter(|status| **status == 200).count();
    assert!((2..6).contains(&passed), "{statuses:?}");
    assert!(statuses.iter().all(|status| matches!(status, 200 | 429)), "{statuses:?}");
    assert_eq!(ask("u-2").await.status, 200);
    gateway.drain().await;
}

/// A cookie that does not reach the client belongs to it nevertheless.
#[tokio::test]
async fn an_answer_with_a_cookie_of_the_whole_host_is_not_kept() {
    let mut config = config(None);
    let ttl = Duration::from_secs(60);
    config.tunnel.cache = vec![CacheRule { pattern: "/kept".into(), ttl }];
    let gateway = TestInstance::start(config).await;
    let _agent = ClusterAgent::start(gateway.address(), |mut stream| async move {
        let cookie = ("set-cookie", "__Host-id=secret; Path=/; Secure");
        send_head(&mut stream, 200, false, &[("content-length", "2"), cookie]);
        let _ = stream.answer.write("ok".into()).await;
        let _ = stream.answer.finish();
    })
    .await;
    for _ in 0..2 {
        let answered = ask(&gateway, &head("GET", "/kept", "")).await;
        assert_eq!((answered.status, answered.header("set-cookie")), (200, ""));
        assert_eq!(answered.header("x-wsproxy-source"), "upstream");
    }
    gateway.drain().await;
}

#[tokio::test]
async fn lanes_that_were_never_ready_count_with_their_reason() {
    let gateway = TestInstance::start(config(None)).await;
    let mut raw = Raw::connect(gateway.address()).await;
    raw.write(handshake(Name::default()).as_bytes()).await;
    assert_eq!(raw.response().await.status, 101);
    // A text message in the place of HELLO.
    raw.frame(0x81, b"hello").await;
    let series = "wsproxy_tunnel_reconnects_total{reason=\"protocol\"}";
    eventually("the end is counted", || gateway.metric(series) == 1.0).await;
    assert_eq!(gateway.metric("wsproxy_tunnel_lane_duration_seconds_count"), 0.0);
    gateway.drain().await;
}
