//! Clients that do not read: their memory is bounded, they are closed, and no other client waits.

use crate::support::{
    eventually,
    gateway::TestInstance,
    raw::{Raw, frame},
};

async fn instance() -> TestInstance {
    TestInstance::with(|config| {
        config.limits.send_buffer_bytes = SEND_BUFFER;
        config.limits.messages_per_second = 0;
        config.sessions.strikes_max = 0;
    })
    .await
}

#[tokio::test]
async fn a_client_that_stops_reading_is_closed_alone() {
    let instance = instance().await;
    let mut events = instance.follow("agent:agent:sessions").await;
    let mut other = instance.client("s").await;
    let mut slow = Raw::narrow(instance.address()).await;
    slow.open("s", &instance.token("s").await).await;
    let payload = "x".repeat(16 * 1024);
    let mut sent = 0.0;
    while instance.ended("sessions", "slow_consumer") == 0.0 && sent < 10_000.0 {
        instance.publish("session:s:down", payload.clone());
        sent += 1.0;
        // The one that reads gets each at once.
        assert_eq!(other.text().await, payload);
        let used = instance.gateway().runtime.budget.used();
        assert!(used <= SEND_BUFFER + 2 * payload.len(), "{used}");
        if instance.gateway().runtime.links().iter().any(|link| link.is_closing()) {
            break;
        }
    }
    assert!(sent < 10_000.0, "it is never closed");
    // What the client finds when it reads again: whole messages, then why.
    let mut received = 0.0;
    let (code, reason) = loop {
        let frame = slow.next_frame().await.expect("a close frame");
        if frame.first == 0x88 {
            break (
                u16::from_be_bytes([frame.payload[0], frame.payload[1]]),
                frame.payload[2..].to_vec(),
            );
        }
        assert_eq!(frame.payload, payload.as_bytes());
        received += 1.0;
    };
    assert_eq!((code, &reason[..]), (1008, &b"slow consumer"[..]));
    slow.frame(0x88, &1008_u16.to_be_bytes()).await;
    slow.end().await;
    instance.wait_ended("sessions", "slow_consumer").await;
    let metric = |name: &str| instance.metric(&format!("{name}{{endpoint=\"sessions\"}}"));
    assert_eq!(metric("wsproxy_messages_sent_total"), sent + received);
    assert_eq!(metric("wsproxy_messages_discarded_total"), sent - received);
    assert!(metric("wsproxy_backpressure_events_total") >= 1.0);
    let closed = loop {
        let event = events.json().await;
        if event["event"] == "closed" {
            break event;
        }
    };
    assert_eq!((&closed["reason"], &closed["code"]), (&"slow_consumer".into(), &1008.into()));
    instance.assert_serves(&mut other, "s").await;
    other.close().await;
    drop(events);
    instance.wait_empty().await;
}

#[tokio::test]
async fn a_slow_client_is_dropped_after_the_close_timeout() {
    let instance = instance().await;
    let mut slow = Raw::narrow(instance.address()).await;
    slow.open("s", &instance.token("s").await).await;
    while !instance.gateway().runtime.links().iter().any(|link| link.is_closing()) {
        instance.publish("session:s:down", "x".repeat(64 * 1024));
        tokio::task::yield_now().await;
    }
    instance.wait_ended("sessions", "slow_consumer").await;
    instance.wait_empty().await;
    assert!(instance.gateway().runtime.links().is_empty());
}

/// Writes until it is not read any more, or a lot has been: nothing of it may pile up.
async fn flood(instance: &TestInstance, raw: Raw, bytes: &[u8]) {
    let (mut written, mut stuck) = (0, 0);
    while stuck < 50 && written < 32 << 20 {
        match raw.socket.try_write(&bytes[written % bytes.len()..]) {
            Ok(count) => (written, stuck) = (written + count, 0),
            Err(_) => {
                stuck += 1;
                tokio::time::sleep(std::time::Duration::from_millis(5)).await;
            }
        }
        tokio::task::yield_now().await;
        let links = instance.gateway().runtime.links();
        let queued: usize = links.iter().map(|link| link.queued_bytes()).sum();
        // The bound, and what one read may still cause on top of it.
        assert!(queued < 64 * 1024 + 2 * 1024 * 1024, "{queued} bytes wait after {written}");
    }
    assert!(written > bytes.len(), "it was read from at all");
    raw.reset();
}

#[tokio::test]
async fn a_ping_flood_without_reading_does_not_pile_up() {
    let instance = instance().await;
    let mut other = instance.client("other").await;
    let mut raw = Raw::narrow(instance.address()).await;
    raw.upgrade("/echo", "").await;
    let pings = frame(0x89, &[b'p'; 125]).repeat(1000);
    flood(&instance, raw, &pings).await;
    instance.wait_ended("echo", "gone").await;
    instance.assert_serves(&mut other, "other").await;
    other.close().await;
    instance.wait_empty().await;
}

#[tokio::test]
async fn a_flood_of_messages_that_are_answered_is_left_unread() {
    let instance = instance().await;
    let mut raw = Raw::narrow(instance.address()).await;
    raw.open("s", &instance.token("s").await).await;
    // Each is answered by an error message several times its size.
    flood(&instance, raw, &frame(0x81, b"x").repeat(10_000)).await;
    let mut raw = Raw::narrow(instance.address()).await;
    raw.upgrade("/echo", "").await;
    flood(&instance, raw, &frame(0x82, &[0; 10_000]).repeat(10)).await;
    instance.wait_empty().await;
}

#[tokio::test]
async fn the_largest_send_buffer_goes_beyond_the_total_bound() {
    let instance = TestInstance::with(|config| {
        config.limits.send_buffer_bytes = 64 << 20;
        config.limits.send_buffers_total_bytes = 1 << 20;
    })
    .await;
    let mut other = instance.client("other").await;
    let mut worst = Raw::narrow(instance.address()).await;
    worst.open("worst", &instance.token("worst").await).await;
    let mut better = Raw::narrow(instance.address()).await;
    better.open("better", &instance.token("better").await).await;
    let queue = async |session: &str, goal: usize| {
        let start = instance.gateway().runtime.budget.used();
        while instance.gateway().runtime.budget.used() < start + goal {
            instance.publish(&format!("session:{session}:down"), "x".repeat(64 * 1024));
            tokio::task::yield_now().await;
        }
    };
    queue("better", 200 * 1024).await;
    queue("worst", 1 << 20).await;
    let closing = || {
        let links = instance.gateway().runtime.links();
        links.iter().filter(|link| link.is_closing()).count()
    };
    eventually("one goes", || closing() == 1).await;
    assert!(!instance.gateway().runtime.budget.is_exceeded());
    worst.end_of_messages().await;
    instance.wait_ended("sessions", "slow_consumer").await;
    instance.assert_serves(&mut other, "other").await;
    instance.publish("session:better:control", r#"{"op":"close","code":4999}"#);
    assert_eq!(better.end_of_messages().await, 4999);
    eventually("it is counted", || instance.ended("sessions", "backend") == 1.0).await;
}

impl Raw {
    /// Reads up to the close frame, answers it, and returns its code.
    async fn end_of_messages(&mut self) -> u16 {
        loop {
            let frame = self.next_frame().await.expect("a close frame");
            if frame.first == 0x88 {
                let code: [u8; 2] = frame.payload[..2].try_into().unwrap();
                self.frame(0x88, &code).await;
                return u16::from_be_bytes(code);
            }
        }
    }
}

const SEND_BUFFER: usize = 256 * 1024;
