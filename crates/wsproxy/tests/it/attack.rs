//! Attacks by strangers: seats held for nothing, requests that two servers read differently, half-working servers.

use std::time::Duration;

use serde_json::json;
use tokio::io::AsyncWriteExt;

use crate::support::{
    eventually,
    gateway::{API_KEY, TestInstance, config},
    raw::{Raw, UPGRADE},
    redis_server::RedisServer,
    soon,
};

/// Without a bound such clients would hold every place of a port for ever.
#[tokio::test]
#[cfg(target_os = "linux")]
async fn a_client_that_never_reads_its_answers_loses_its_socket() {
    let instance = TestInstance::with(|c| c.server.header_timeout = Duration::from_secs(1)).await;
    let mut raw = Raw::narrow(instance.address()).await;
    let requests = "GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n".repeat(1000);
    let end = async {
        // The kernel takes some of it; the end comes while more is written, or behind it.
        while raw.socket.write_all(requests.as_bytes()).await.is_ok() {}
    };
    soon("the end of the connection", end).await;
    instance.drain().await;
}

#[tokio::test]
async fn a_body_that_never_comes_is_not_waited_for() {
    let instance = TestInstance::with(|config| {
        config.server.header_timeout = Duration::from_millis(500);
        config.server.handshake_timeout = Duration::from_millis(500);
    })
    .await;
    let mut raw = Raw::connect(instance.address()).await;
    let head = format!(
        "POST /api/v1/sessions/s/messages HTTP/1.1\r\nHost: x\r\n\
         Authorization: Bearer {API_KEY}\r\nContent-Length: 99\r\n\r\n{{"
    );
    raw.write(head.as_bytes()).await;
    raw.response().await.assert_refused(408, "request_timeout");
    raw.end().await;
    assert_eq!(instance.metric("wsproxy_errors_total{kind=\"slow_request\"}"), 1.0);
    instance.drain().await;
}

#[tokio::test]
async fn a_handshake_has_no_body_and_one_host() {
    let instance = TestInstance::with(|_| ()).await;
    for extra in ["Content-Length: 5\r\n", "Transfer-Encoding: chunked\r\n", "Host: other\r\n"] {
        let mut raw = Raw::connect(instance.address()).await;
        raw.write(format!("GET /echo HTTP/1.1\r\n{UPGRADE}{extra}\r\n").as_bytes()).await;
        raw.response().await.assert_refused(400, "bad_request");
    }
    let mut raw = Raw::connect(instance.address()).await;
    assert_eq!(raw.upgrade("/echo", "Content-Length: 0\r\n").await.status, 101);
}

#[tokio::test]
async fn an_instance_whose_redis_user_may_not_subscribe_is_not_ready() {
    let server = RedisServer::start();
    let user = ["ACL", "SETUSER", "gateway", "on", ">pw", "~*", "+@all", "resetchannels"];
    server.call(&user);
    let url = format!("redis://gateway:pw@127.0.0.1:{}", server.port());
    let instance = TestInstance::start_unready(config(Some(&url))).await;
    let status = || instance.gateway().bus.status();
    eventually("the refusal is known", || status().last_error.is_some()).await;
    assert!(status().connected && !status().subscribed);
    assert!(status().last_error.unwrap().contains("NOPERM"));
    let ready = instance.get("/ready").await;
    assert_eq!((ready.status, ready.json()["reason"].clone()), (503, json!("bus")));
    server.call(&["ACL", "SETUSER", "gateway", "allchannels"]);
    instance.ready().await;
    assert_eq!(instance.api("GET", "/health", "").await.json()["bus"]["error"], json!(null));
}
