//! Event streams whose clients do not read, and the end of the instance they are on.

use std::time::{Duration, Instant};

use crate::support::{
    eventually,
    gateway::{Backend, TestInstance, over_both},
    raw::Raw,
    sse::Events,
};

over_both!(
    a_drain_ends_streams_politely_and_announces_them,
    a_reader_that_is_too_slow_is_told_and_counted,
    hundreds_that_came_and_went_leave_nothing,
);

async fn a_drain_ends_streams_politely_and_announces_them(backend: Backend) {
    let instance = TestInstance::start(backend.config()).await;
    let other = match &backend {
        Backend::Memory => None,
        _ => Some(TestInstance::start(backend.config()).await),
    };
    let follower = other.as_ref().unwrap_or(&instance);
    let mut announced = follower.follow("agent:agent:sessions").await;
    let mut streams = Vec::new();
    for n in 0..10 {
        let encoding = [("Accept-Encoding", if n % 2 == 0 { "gzip" } else { "identity" })];
        streams.push(Events::session(&instance, &format!("s{n}"), &encoding).await);
        assert_eq!(announced.json().await["event"], "opened");
    }
    instance.publish("session:s3:down", "the last word");
    eventually("it has arrived here", || {
        instance.metric("wsproxy_messages_sent_total{endpoint=\"sessions\"}") == 1.0
    })
    .await;
    let gateway = instance.gateway().clone();
    let reading = async {
        assert_eq!(streams[3].data().await, "the last word");
        for events in &mut streams {
            assert_eq!(events.closed().await, (1012, "instance restarting".into()));
        }
    };
    tokio::join!(instance.drain(), reading);
    for _ in 0..10 {
        let closed = announced.json().await;
        assert_eq!((&closed["event"], &closed["reason"]), (&"closed".into(), &"restart".into()));
        assert_eq!((&closed["transport"], &closed["code"]), (&"sse".into(), &1012.into()));
    }
    drop(announced);
    assert_eq!((gateway.seats.taken(), gateway.hub.topics()), (0, 0));
    assert_eq!(gateway.runtime.budget.used(), 0);
    assert!(gateway.event_streams.list().is_empty());
}

async fn a_reader_that_is_too_slow_is_told_and_counted(backend: Backend) {
    let mut config = backend.config();
    config.limits.send_buffer_bytes = 1 << 20;
    let instance = TestInstance::start(config).await;
    let token = instance.stream_token("s").await;
    let path = format!("/agent/ws/s?token={token}");
    let raw = Raw::narrow(instance.address()).await;
    let mut slow = Events::open_on(raw, &path, &[]).await.unwrap();
    let mut fast = Events::open(instance.address(), &path, &[]).await.unwrap();
    let payload = "x".repeat(50_000);
    let stream = instance.gateway().event_streams.list();
    assert_eq!(stream.len(), 2);
    let mut published = 0;
    // It takes what fits into the sockets; then it holds a megabyte; then it holds the event that the socket took a part of.
    let mut most = 0;
    while most == 0 || instance.gateway().runtime.budget.used() > 2 * payload.len() {
        instance.publish("session:s:down", payload.clone());
        assert_eq!(fast.data().await, payload);
        published += 1;
        let used = instance.gateway().runtime.budget.used();
        assert!(used < 3 << 20, "{used}");
        if used > 900_000 {
            most = used;
        }
    }
    assert!(published > 20);
    let mut received = 0;
    let close = loop {
        let event = slow.event().await.unwrap();
        if event.kind == "close" {
            break event;
        }
        received += 1;
    };
    assert_eq!(close.data.unwrap(), r#"{"code":1008,"reason":"slow consumer"}"#);
    assert!(received < published, "{received} {published}");
    instance.wait_ended("sessions", "slow_consumer").await;
    let discarded = "wsproxy_messages_discarded_total{endpoint=\"sessions\"}";
    assert_eq!(instance.metric(discarded), f64::from(published - received));
    eventually("nothing is held", || instance.gateway().runtime.budget.used() == 0).await;
    instance.publish("session:s:down", "still served");
    assert_eq!(fast.data().await, "still served");
}

async fn hundreds_that_came_and_went_leave_nothing(backend: Backend) {
    let mut config = backend.config();
    config.sessions.history = true;
    // Who says more than its request is not heard leaving: only writing finds that.
    config.sse.keep_alive = Duration::from_millis(100);
    let instance = TestInstance::start(config).await;
    for round in 0..5 {
        let mut streams = Vec::new();
        for n in 0..60 {
            streams.push(Events::session(&instance, &format!("s{}", n / 2), &[]).await);
        }
        assert_eq!(instance.gateway().event_streams.list().len(), 60);
        (0..30).for_each(|n| instance.publish(&format!("session:s{n}:down"), "x".repeat(5000)));
        for (n, mut events) in streams.into_iter().enumerate() {
            match (n + round) % 4 {
                0 => events.raw.reset(),
                1 => drop(events),
                2 => events.raw.write(b"GET / HTTP/1.1\r\n\r\n").await,
                _ => assert_eq!(events.data().await.len(), 5000),
            }
        }
        instance.wait_empty().await;
    }
    eventually("no task is left", || instance.gateway().tasks.len() == 1).await;
    assert!(instance.gateway().event_streams.list().is_empty());
}

/// Fills a stream until its socket takes no more.
async fn stuck(instance: &TestInstance, session: &str) -> Events {
    let path = format!("/agent/ws/{session}?token={}", instance.token(session).await);
    let raw = Raw::narrow(instance.address()).await;
    let events = Events::open_on(raw, &path, &[]).await.unwrap();
    while instance.gateway().runtime.budget.used() < 1 << 20 {
        instance.publish(&format!("session:{session}:down"), "x".repeat(64 * 1024));
        tokio::task::yield_now().await;
    }
    events
}

#[tokio::test]
async fn a_stream_that_is_stuck_does_not_hold_the_drain_up() {
    let instance = TestInstance::with(|config| {
        config.server.shutdown_timeout = Duration::from_secs(3);
    })
    .await;
    let _stuck = stuck(&instance, "s").await;
    let gateway = instance.gateway().clone();
    let start = Instant::now();
    instance.drain().await;
    assert!(start.elapsed() < Duration::from_secs(8), "{:?}", start.elapsed());
    assert_eq!((gateway.seats.taken(), gateway.runtime.budget.used()), (0, 0));
    assert!(gateway.event_streams.list().is_empty());
}

#[tokio::test]
async fn closing_is_spread_over_its_time() {
    let spread = Duration::from_secs(2);
    let instance = TestInstance::with(|config| config.server.drain_spread = spread).await;
    let mut streams = Vec::new();
    for n in 0..20 {
        streams.push(Events::session(&instance, &format!("s{n}"), &[]).await);
    }
    let gateway = instance.gateway().clone();
    let start = Instant::now();
    let reading = async {
        assert_eq!(streams[19].closed().await.0, 1012);
        assert!((1..20).contains(&gateway.event_streams.list().len()));
        assert_eq!(streams[0].closed().await.0, 1012);
        assert!(start.elapsed() >= spread / 4, "{:?}", start.elapsed());
    };
    tokio::join!(instance.drain(), reading);
}

#[tokio::test]
async fn a_stopped_reader_is_cut_by_the_stream_timeout() {
    let instance = TestInstance::with(|config| {
        config.server.header_timeout = Duration::from_millis(500);
        config.heartbeat.timeout = Duration::from_secs(4);
    })
    .await;
    let start = Instant::now();
    let _stuck = stuck(&instance, "s").await;
    instance.wait_ended("sessions", "gone").await;
    assert!(start.elapsed() > Duration::from_secs(3), "{:?}", start.elapsed());
    instance.wait_empty().await;
}

#[tokio::test]
async fn a_stalled_event_above_the_budget_is_cut_off() {
    let instance = TestInstance::with(|config| {
        config.limits.send_buffers_total_bytes = 3 << 20;
    })
    .await;
    let path = format!("/agent/ws/s?token={}", instance.token("s").await);
    let raw = Raw::narrow(instance.address()).await;
    let _events = Events::open_on(raw, &path, &[]).await.unwrap();
    // The socket takes a part of it, so it goes with its connection only.
    instance.publish("session:s:down", "x".repeat(8 << 20));
    instance.wait_ended("sessions", "slow_consumer").await;
    instance.wait_empty().await;
}

#[tokio::test]
async fn where_too_much_waits_the_worst_stream_goes() {
    let instance = TestInstance::with(|config| {
        config.limits.send_buffers_total_bytes = 3 << 20;
    })
    .await;
    let mut healthy = instance.client("other").await;
    let _stuck = stuck(&instance, "s").await;
    let used = || instance.gateway().runtime.budget.used();
    let mut most = 0;
    // Of the worst stream only the event is left that its socket took a part of.
    while most < 1 << 20 || used() > 2 * 64 * 1024 {
        instance.publish("session:s:down", "x".repeat(64 * 1024));
        tokio::task::yield_now().await;
        most = most.max(used());
    }
    instance.assert_serves(&mut healthy, "other").await;
}
