//! Clients and workers while Redis is away, and their recovery once it is back.

use std::time::Duration;

use wsproxy::config::OnBusLoss;

use crate::support::{
    binary::Binary,
    client::Client,
    eventually,
    fault_proxy::{FaultProxy, Faults},
    gateway::{TestInstance, bearer, config},
    http::{self, Stream},
    redis_server::{Options, RedisServer},
    soon,
};

/// Waits until the loss is noticed.
async fn lost(instance: &TestInstance) {
    eventually("the loss is noticed", || !instance.gateway().bus.status().connected).await;
}

/// The client's next message is the one notice; then it is served as before.
async fn assert_told_once(instance: &TestInstance, client: &mut Client, session: &str) {
    let notice = client.json().await;
    assert_eq!(notice["type"], "bus_recovered", "{notice}");
    assert!(notice["gap_ms"].is_u64());
    instance.ready().await;
    // Nothing else comes in between: the next message is the published one.
    instance.assert_serves(client, session).await;
}

async fn assert_degraded(instance: &TestInstance) {
    let health = instance.get("/health").await;
    assert_eq!((health.status, &health.json()["status"]), (503, &"degraded".into()));
    let ready = instance.get("/ready").await;
    assert_eq!((ready.status, &ready.json()["reason"]), (503, &"bus".into()));
}

#[tokio::test]
async fn absent_at_start_is_503_until_it_comes() {
    let mut server = RedisServer::absent();
    let mut config = config(Some(&server.url()));
    config.server.handshake_timeout = Duration::from_secs(1);
    let instance = TestInstance::start_unready(config).await;
    assert_degraded(&instance).await;
    instance.refused("s", "x").await.assert_refused(503, "bus_unavailable");
    let api = instance.api("POST", "/api/v1/sessions/s/messages", "x").await;
    api.assert_refused(503, "bus_unavailable");
    assert_eq!(instance.refusals("bus_unavailable"), 1.0);
    let mut echo = instance.echo().await;
    echo.send("undisturbed").await;
    assert_eq!(echo.text().await, "undisturbed");
    assert!(instance.metric("wsproxy_bus_connects_failed_total") >= 1.0);
    server.restart();
    instance.ready().await;
    assert_eq!(instance.get("/ready").await.status, 200);
    let mut client = instance.client("s").await;
    instance.assert_serves(&mut client, "s").await;
    assert_eq!(instance.metric("wsproxy_bus_loss_notices_total"), 0.0);
}

#[tokio::test]
async fn killed_and_restarted_empty_keeps_clients_and_tells_each_once() {
    let mut server = RedisServer::start();
    let instance = TestInstance::start(config(Some(&server.url()))).await;
    let mut clients = Vec::new();
    for n in 0..20 {
        clients.push(instance.client(&format!("s{n}")).await);
    }
    for _ in 0..2 {
        server.kill();
        lost(&instance).await;
        assert_degraded(&instance).await;
        server.restart();
        for (n, client) in clients.iter_mut().enumerate() {
            assert_told_once(&instance, client, &format!("s{n}")).await;
        }
    }
    assert_eq!(instance.metric("wsproxy_bus_loss_notices_total"), 40.0);
    assert!(instance.metric("wsproxy_bus_links_lost_total") >= 2.0);
    assert_eq!(instance.get("/health").await.status, 200);
    clients.drain(..).for_each(drop);
    instance.wait_empty().await;
}

#[tokio::test]
async fn clients_are_closed_for_a_loss_where_that_is_wanted() {
    let mut server = RedisServer::start();
    let mut config = config(Some(&server.url()));
    config.sessions.on_bus_loss = OnBusLoss::Close;
    let instance = TestInstance::start(config).await;
    let mut echo = instance.echo().await;
    let mut first = instance.client("a").await;
    let mut second = instance.client("b").await;
    server.kill();
    lost(&instance).await;
    server.restart();
    for client in [&mut first, &mut second] {
        assert_eq!(client.closed().await, (1012, "bus lost".into()));
    }
    eventually("both are counted", || instance.ended("sessions", "bus_lost") == 2.0).await;
    echo.send("undisturbed").await;
    assert_eq!(echo.text().await, "undisturbed");
    instance.ready().await;
    let mut back = instance.client("a").await;
    instance.assert_serves(&mut back, "a").await;
}

#[tokio::test]
async fn a_client_is_told_of_messages_lost_in_an_outage() {
    let mut server = RedisServer::start();
    let mut config = config(Some(&server.url()));
    config.redis.publish_queue_bytes = 64 << 10;
    config.limits.messages_per_second = 0;
    let instance = TestInstance::start(config).await;
    let mut client = instance.client("s").await;
    server.kill();
    lost(&instance).await;
    // The queue has a bound: beyond it the client is not read, so that nothing piles up or is lost.
    let large = format!("\"{}\"", "x".repeat(8 << 10));
    let sending = async {
        for _ in 0..2000 {
            client.send(large.clone()).await;
        }
    };
    let paused = || instance.metric("wsproxy_reads_paused_total{endpoint=\"sessions\"}") >= 1.0;
    tokio::select! {
        () = sending => {}
        () = eventually("reading pauses", paused) => {}
    }
    let queued = instance.gateway().bus.status().queued_bytes;
    assert!(queued <= 64 << 10, "{queued}");
    server.restart();
    instance.ready().await;
    let lost = || instance.metric("wsproxy_bus_publish_queue_bytes") == 0.0;
    eventually("the queue is empty", lost).await;
    assert_eq!(instance.ended("sessions", "gone"), 0.0);
    // Whatever was lost is told, and nothing else but the notice comes before what follows.
    let mut worker = instance.follow("session:s:up").await;
    client.send("\"last\"").await;
    while worker.next().await != "\"last\"" {}
    instance.publish("session:s:down", "\"end\"");
    let count = |kind| {
        instance.metric(&format!(
            "wsproxy_message_errors_total{{endpoint=\"sessions\",kind=\"{kind}\"}}"
        ))
    };
    let lost = || count("lost") + count("refused");
    let (mut told, mut notices, mut ended) = (0.0, 0, false);
    while !ended || told < lost() {
        let message = client.json().await;
        match message["type"].as_str() {
            Some("error") => {
                // What did not fit into the queue was certainly not published.
                let code = message["code"].as_str().unwrap();
                assert!(matches!(code, "publish_lost" | "publish_refused"), "{message}");
                told += 1.0;
            }
            Some("bus_recovered") => notices += 1,
            _ => ended = true,
        }
    }
    assert_eq!((told, notices), (lost(), 1));
}

#[tokio::test]
async fn a_stopped_redis_is_504_or_503_and_recovers() {
    let server = RedisServer::start();
    let mut config = config(Some(&server.url()));
    config.server.handshake_timeout = Duration::from_secs(1);
    config.redis.response_timeout = Duration::from_secs(4);
    config.redis.probe_interval = Duration::from_secs(4);
    let instance = TestInstance::start(config).await;
    let token = instance.token("s").await;
    let mut client = instance.client("a").await;
    let mut echo = instance.echo().await;
    server.stop();
    // The first attempt cannot know yet that Redis hangs.
    instance.refused("s", &token).await.assert_refused(504, "deadline");
    lost(&instance).await;
    instance.refused("s", &token).await.assert_refused(503, "bus_unavailable");
    assert_degraded(&instance).await;
    echo.send("undisturbed").await;
    assert_eq!(echo.text().await, "undisturbed");
    server.cont();
    assert_told_once(&instance, &mut client, "a").await;
    assert!(instance.connect("s", &token).await.is_ok());
    assert_eq!((instance.refusals("deadline"), instance.refusals("bus_unavailable")), (1.0, 1.0));
}

#[tokio::test]
async fn a_wrong_password_is_503_and_never_shown() {
    let password = Some("right-password".to_owned());
    let server = RedisServer::start_with(Options { password, ..Options::default() });
    let url = server.url().replace("right-password", "wrong-password");
    let mut config = config(Some(&url));
    config.server.handshake_timeout = Duration::from_millis(300);
    let instance = TestInstance::start_unready(config).await;
    eventually("it is noticed", || instance.gateway().bus.status().last_error.is_some()).await;
    let response = instance.refused("s", "x").await;
    response.assert_refused(503, "bus_unavailable");
    let health = instance.get("/health").await;
    assert_eq!((health.status, health.body.as_str()), (503, r#"{"status":"degraded"}"#));
    let health = instance.api("GET", "/health", "").await;
    assert_eq!(health.status, 503);
    assert!(health.body.contains("WRONGPASS"), "{health:?}");
    for body in [response.body, health.body, instance.get("/metrics").await.body] {
        assert!(!body.contains("wrong-password"), "{body}");
    }
}

#[tokio::test]
async fn a_slow_redis_makes_handshakes_slow_and_changes_nothing_else() {
    let server = RedisServer::start();
    let proxy = FaultProxy::start(server.port()).await;
    let instance = TestInstance::start(config(Some(&server.url_on(proxy.port())))).await;
    let mut client = instance.client("s").await;
    let delay = Duration::from_millis(50);
    proxy.set(Faults { delay, ..Faults::default() });
    instance.assert_serves(&mut client, "s").await;
    let mut late = instance.client("late").await;
    instance.assert_serves(&mut late, "late").await;
    proxy.set(Faults::default());
    assert_eq!(instance.metric("wsproxy_bus_links_lost_total"), 0.0);
    assert_eq!(instance.metric("wsproxy_bus_loss_notices_total"), 0.0);
}

#[tokio::test]
async fn a_password_that_becomes_right_is_enough() {
    let password = Some("first".to_owned());
    let server = RedisServer::start_with(Options { password, ..Options::default() });
    let url = server.url().replace("first", "second");
    let instance = TestInstance::start_unready(config(Some(&url))).await;
    eventually("it is noticed", || instance.gateway().bus.status().last_error.is_some()).await;
    server.call(&["CONFIG", "SET", "requirepass", "second"]);
    instance.ready().await;
    let mut client = instance.client("s").await;
    instance.assert_serves(&mut client, "s").await;
}

#[tokio::test]
async fn a_channel_that_redis_denies_is_503_and_burns_no_token() {
    let server = RedisServer::start();
    let instance = TestInstance::start(config(Some(&server.url()))).await;
    let mut other = instance.client("allowed").await;
    let token = instance.token("denied").await;
    server.call(&[
        "ACL",
        "SETUSER",
        "default",
        "resetchannels",
        "&wsproxy:*",
        "&session:allowed:*",
        "&agent:*",
    ]);
    instance.refused("denied", &token).await.assert_refused(503, "bus_unavailable");
    assert!(instance.has_token("denied").await);
    assert!(instance.metric("wsproxy_bus_subscribe_errors_total") >= 1.0);
    server.call(&["ACL", "SETUSER", "default", "allchannels"]);
    assert!(instance.connect("denied", &token).await.is_ok());
    // Redis itself cuts connections whose channels are taken away, which a client may be told.
    instance.publish("session:allowed:down", "\"end\"");
    while other.text().await != "\"end\"" {}
}

#[tokio::test]
async fn a_loss_and_a_recovery_are_one_log_line_each() {
    let mut server = RedisServer::start();
    let mut binary = Binary::start(&[
        ("REDIS_URL", &server.url()),
        ("LOG_LEVEL", "info"),
        ("WSPROXY_REDIS__PROBE_INTERVAL", "200ms"),
    ])
    .await;
    let status = async || http::request(binary.address, "GET", "/ready", &[], b"").await.status;
    soon("it is ready", async { while status().await != 200 {} }).await;
    let token = binary.token("s").await;
    let path = "/agent/ws/s";
    let mut client = Client::connect(binary.address, path, &bearer(&token)).await.unwrap();
    server.kill();
    soon("the loss is noticed", async { while status().await != 503 {} }).await;
    server.restart();
    assert_eq!(client.json().await["type"], "bus_recovered");
    soon("it is ready", async { while status().await != 200 {} }).await;
    client.close().await;
    binary.signal(rustix::process::Signal::TERM);
    assert_eq!(binary.exited().await.code(), Some(0));
    let lost = binary.lines("The bus is lost.");
    assert_eq!((lost.len(), &lost[0]["level"]), (1, &"WARN".into()));
    let back = binary.lines("The bus is back; clients without history were told.");
    assert_eq!((back.len(), &back[0]["connections"]), (1, &1.into()));
}

#[tokio::test]
async fn a_worker_that_follows_over_http_is_told_of_the_gap() {
    let mut server = RedisServer::start();
    let instance = TestInstance::start(config(Some(&server.url()))).await;
    let mut stream = Stream::open(&instance, "/api/v1/sessions/s/upstream").await;
    let mut client = instance.client("s").await;
    client.send("\"before\"").await;
    stream.expect("data: \"before\"\n\n").await;
    server.kill();
    lost(&instance).await;
    server.restart();
    stream.expect("event: bus_recovered\ndata: {\"gap_ms\":").await;
    client.send("\"after\"").await;
    stream.expect("data: \"after\"\n\n").await;
    assert_eq!(stream.seen.matches("bus_recovered").count(), 1);
}
