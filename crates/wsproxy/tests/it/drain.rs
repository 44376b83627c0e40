//! The end of an instance: polite, in order, within its time, and at once at a second signal.

use std::{
    os::unix::process::ExitStatusExt,
    sync::atomic::Ordering::Relaxed,
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, kill_process};

use crate::support::{
    binary::Binary,
    client::Client,
    eventually,
    fault_proxy::{FaultProxy, Faults},
    gateway::{Backend, TestInstance, bearer, config, over_both},
    http,
    raw::{Raw, UPGRADE},
    redis_server::{Answer, RedisServer},
    soon,
    sse::Events,
};

over_both!(a_drain_flushes_closes_announces_and_leaves_nothing,);

async fn a_drain_flushes_closes_announces_and_leaves_nothing(backend: Backend) {
    let instance = TestInstance::start(backend.config()).await;
    // What an instance on Redis says at its end is heard by others only.
    let other = match &backend {
        Backend::Memory => None,
        _ => Some(TestInstance::start(backend.config()).await),
    };
    let follower = other.as_ref().unwrap_or(&instance);
    let mut events = follower.follow("agent:agent:sessions").await;
    let mut clients = Vec::new();
    for n in 0..20 {
        clients.push(instance.client(&format!("s{n}")).await);
        assert_eq!(events.json().await["event"], "opened");
    }
    // One does not read yet: what waits for it must still arrive before the close frame.
    let mut slow = Raw::narrow(instance.address()).await;
    slow.open("slow", &instance.token("slow").await).await;
    let payload = "x".repeat(64 * 1024);
    let mut published = 0;
    let mut delivered = instance.follow("session:slow:down").await;
    while instance.gateway().runtime.budget.used() < 1 << 20 {
        instance.publish("session:slow:down", payload.clone());
        delivered.next().await;
        published += 1;
    }
    drop(delivered);
    let gateway = instance.gateway().clone();
    let reading = async {
        for client in &mut clients {
            assert_eq!(client.closed().await, (1012, "instance restarting".into()));
        }
        let mut received = 0;
        while let Some(frame) = slow.next_frame().await {
            if frame.first == 0x88 {
                assert_eq!(&frame.payload[..2], 1012_u16.to_be_bytes());
                slow.frame(0x88, &frame.payload).await;
            } else {
                received += 1;
            }
        }
        assert_eq!(received, published);
    };
    tokio::join!(instance.drain(), reading);
    let mut closed = 0;
    while closed < 21 {
        let event = events.json().await;
        if event["event"] == "closed" {
            assert_eq!((&event["reason"], &event["code"]), (&"restart".into(), &1012.into()));
            closed += 1;
        }
    }
    drop(events);
    assert_eq!((gateway.seats.taken(), gateway.hub.topics()), (0, 0));
    assert_eq!(gateway.runtime.budget.used(), 0);
    assert!(gateway.runtime.links().is_empty());
    if let (Backend::Redis(server), Some(other)) = (backend, other) {
        other.drain().await;
        let channels = || server.call(&["PUBSUB", "CHANNELS"]);
        eventually("Redis knows of no channel", || channels() == Answer::Array(vec![])).await;
    }
}

#[tokio::test]
async fn clients_are_taken_until_balancers_have_noticed() {
    let instance = TestInstance::with(|config| {
        config.server.drain_delay = Duration::from_secs(3);
        config.admin.port = Some(0);
    })
    .await;
    let (address, admin) = (instance.address(), instance.admin_address());
    let mut client = instance.client("s").await;
    let (late, streamed) = (instance.token("late").await, instance.stream_token("streamed").await);
    let gateway = instance.gateway().clone();
    let looking = async {
        eventually("draining", || gateway.is_draining()).await;
        let ready = http::request(admin, "GET", "/ready", &[], b"").await;
        assert_eq!((ready.status, &ready.json()["reason"]), (503, &"draining".into()));
        assert_eq!(http::request(admin, "GET", "/health", &[], b"").await.status, 200);
        let mut late = Client::connect(address, "/agent/ws/late", &bearer(&late)).await.unwrap();
        let path = format!("/agent/ws/streamed?token={streamed}");
        let mut stream = Events::open(address, &path, &[]).await.expect("streams are taken too");
        client.send("1").await;
        for client in [&mut client, &mut late] {
            assert_eq!(client.closed().await.0, 1012);
        }
        assert_eq!(stream.closed().await.0, 1012);
        assert!(gateway.is_closing());
    };
    tokio::join!(instance.drain(), looking);
}

#[tokio::test]
async fn a_handshake_that_comes_too_late_uses_up_no_token() {
    let instance = TestInstance::with(|_| ()).await;
    let token = instance.token("s").await;
    instance.gateway().closing.store(true, Relaxed);
    instance.refused("s", &token).await.assert_refused(503, "draining");
    assert!(instance.has_token("s").await);
    instance.gateway().closing.store(false, Relaxed);
    assert!(instance.connect("s", &token).await.is_ok());
}

#[tokio::test]
async fn closing_is_spread_over_its_time_and_the_newest_goes_first() {
    let spread = Duration::from_secs(2);
    let instance = TestInstance::with(|config| config.server.drain_spread = spread).await;
    let mut oldest = instance.client("oldest").await;
    let mut others = Vec::new();
    for n in 0..18 {
        others.push(instance.client(&format!("s{n}")).await);
    }
    let mut newest = instance.client("newest").await;
    let gateway = instance.gateway().clone();
    let served = || gateway.runtime.links().iter().filter(|link| !link.is_closing()).count();
    let start = Instant::now();
    let reading = async {
        assert_eq!(newest.closed().await.0, 1012);
        // Meanwhile others are still served, the oldest among them.
        assert!((1..20).contains(&served()), "{}", served());
        for client in others.iter_mut().rev() {
            assert_eq!(client.closed().await.0, 1012);
        }
        assert_eq!(oldest.closed().await.0, 1012);
        assert!(start.elapsed() >= spread / 4, "{:?}", start.elapsed());
    };
    tokio::join!(instance.drain(), reading);
}

#[tokio::test]
async fn a_silent_client_does_not_hold_up_the_drain() {
    let instance = TestInstance::with(|config| {
        config.server.shutdown_timeout = Duration::from_secs(3);
    })
    .await;
    let mut stuck = Raw::narrow(instance.address()).await;
    stuck.open("s", &instance.token("s").await).await;
    let mut half = Raw::connect(instance.address()).await;
    half.write(b"GET /echo HTTP/1.1\r\nHost").await;
    while instance.gateway().runtime.budget.used() < 1 << 20 {
        instance.publish("session:s:down", "x".repeat(64 * 1024));
        tokio::task::yield_now().await;
    }
    let gateway = instance.gateway().clone();
    let start = Instant::now();
    instance.drain().await;
    assert!(start.elapsed() < Duration::from_secs(8), "{:?}", start.elapsed());
    assert_eq!((gateway.seats.taken(), gateway.runtime.budget.used()), (0, 0));
}

#[tokio::test]
async fn sigterm_and_sigint_end_the_program_with_exit_code_0() {
    for signal in [Signal::TERM, Signal::INT] {
        let mut binary = Binary::start(&[]).await;
        let token = binary.token("s").await;
        let mut client =
            Client::connect(binary.address, "/agent/ws/s", &bearer(&token)).await.unwrap();
        binary.signal(signal);
        assert_eq!(client.closed().await, (1012, "instance restarting".into()));
        assert_eq!(binary.exited().await.code(), Some(0));
        assert_eq!(binary.lines("Draining.")[0]["connections"], 1);
        assert_eq!(binary.lines("Connection closed.")[0]["reason"], "restart");
        assert_eq!(binary.lines("Ended.")[0]["drained"], true);
    }
}

#[tokio::test]
async fn a_second_signal_ends_at_once() {
    let mut binary = Binary::start(&[("WSPROXY_SERVER__DRAIN_DELAY", "20s")]).await;
    binary.signal(Signal::TERM);
    binary.line("Draining.").await;
    // `timeout` and the like signal the process and its group: that is still the first wish.
    binary.signal(Signal::TERM);
    let start = Instant::now();
    // A second signal ends the instance at once.
    let pid = Pid::from_raw(binary.pid().cast_signed()).unwrap();
    let insistent = tokio::spawn(async move {
        let mut again = tokio::time::interval(Duration::from_millis(50));
        while start.elapsed() < Duration::from_secs(10) {
            again.tick().await;
            if kill_process(pid, Signal::TERM).is_err() {
                break;
            }
        }
    });
    let status = binary.exited().await;
    insistent.abort();
    assert_eq!((status.code(), status.signal()), (Some(130), None));
    assert!(start.elapsed() > Duration::from_millis(200), "one wish is not two");
    assert!(start.elapsed() < Duration::from_secs(10));
    assert_eq!(binary.lines("A second signal: ending at once.").len(), 1);
}

#[tokio::test]
async fn a_taken_port_is_told_and_is_another_exit_code() {
    let binary = Binary::start(&[]).await;
    let port = binary.address.port().to_string();
    let output = tokio::process::Command::new(env!("CARGO_BIN_EXE_wsproxy"))
        .args(["serve", "--bind", "127.0.0.1", "--port", &port])
        .env_clear()
        .output();
    let output = soon("the second program ends", output).await.unwrap();
    assert_eq!(output.status.code(), Some(71), "{output:?}");
}

#[tokio::test]
async fn sigterm_in_the_middle_of_everything_ends_within_the_timeout() {
    let server = RedisServer::start();
    let proxy = FaultProxy::start(server.port()).await;
    let mut binary = Binary::start(&[
        ("REDIS_URL", &server.url_on(proxy.port())),
        ("WSPROXY_SERVER__SHUTDOWN_TIMEOUT", "4s"),
        ("WSPROXY_REDIS__RESPONSE_TIMEOUT", "1s"),
    ])
    .await;
    let ready = async || http::request(binary.address, "GET", "/ready", &[], b"").await.status;
    soon("it is ready", async { while ready().await != 200 {} }).await;
    let token = binary.token("open").await;
    let mut open =
        Client::connect(binary.address, "/agent/ws/open", &bearer(&token)).await.unwrap();
    // Redis falls silent; handshakes wait for it, others have not said what they want, and one
    // client leaves a message unread.
    proxy.set(Faults { stall_down: true, stall_up: true, ..Faults::default() });
    let mut waiting = Vec::new();
    for n in 0..10 {
        let mut raw = Raw::connect(binary.address).await;
        let head = format!("GET /agent/ws/s{n}?token=x HTTP/1.1\r\n{UPGRADE}\r\n");
        raw.write(if n % 2 == 0 { head.as_bytes() } else { &head.as_bytes()[..40] }).await;
        waiting.push(raw);
    }
    open.send("[\"lost with the bus\"]").await;
    let start = Instant::now();
    binary.signal(Signal::TERM);
    assert_eq!(open.closed().await.0, 1012);
    assert_eq!(binary.exited().await.code(), Some(0));
    assert!(start.elapsed() < Duration::from_secs(9), "{:?}", start.elapsed());
    assert!(!binary.log().contains("panicked"), "{}", binary.log());
}

#[tokio::test]
async fn a_drain_while_redis_is_gone_ends() {
    let mut server = RedisServer::start();
    let instance = TestInstance::start(config(Some(&server.url()))).await;
    let mut client = instance.client("s").await;
    server.kill();
    let start = Instant::now();
    let ((code, _), ()) = tokio::join!(client.closed(), instance.drain());
    assert_eq!(code, 1012);
    assert!(start.elapsed() < Duration::from_secs(10));
}
