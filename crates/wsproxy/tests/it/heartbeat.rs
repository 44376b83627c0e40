//! Silence: clients are asked, then given up; what is only a heartbeat never reaches the bus.

use std::time::{Duration, Instant};

use tokio_tungstenite::tungstenite::Message;

use crate::support::{gateway::TestInstance, raw::Raw};

#[tokio::test]
async fn a_silent_client_is_pinged_then_closed() {
    let instance = TestInstance::with(|config| {
        config.heartbeat.interval = Duration::from_millis(600);
        config.heartbeat.timeout = Duration::from_secs(3);
    })
    .await;
    let mut alive = instance.client("alive").await;
    let mut silent = Raw::connect(instance.address()).await;
    silent.open("silent", &instance.token("silent").await).await;
    let start = Instant::now();
    let mut pings = 0;
    let reading = async {
        loop {
            let frame = silent.next_frame().await.expect("a close frame");
            if frame.first != 0x89 {
                break frame;
            }
            assert!(frame.payload.is_empty());
            pings += 1;
        }
    };
    // One that answers pings lives; this implementation answers while it is read from.
    let answering = async {
        loop {
            assert!(matches!(alive.next().await, Message::Ping(_)));
        }
    };
    let close = tokio::select! { close = reading => close, () = answering => unreachable!() };
    assert_eq!((close.first, &close.payload[..]), (0x88, &b"\x0f\xa2heartbeat timeout"[..]));
    assert!(start.elapsed() >= Duration::from_millis(2800), "{:?}", start.elapsed());
    assert!((1..=5).contains(&pings), "{pings} pings");
    silent.frame(0x88, &4002_u16.to_be_bytes()).await;
    instance.wait_ended("sessions", "heartbeat_timeout").await;
    instance.publish("session:alive:down", "alive");
    assert_eq!(alive.text().await, "alive");
}

#[tokio::test]
async fn any_byte_is_a_sign_of_life_and_needs_no_ping() {
    let instance = TestInstance::with(|config| {
        config.heartbeat.interval = Duration::from_secs(1);
        config.heartbeat.timeout = Duration::from_secs(3);
    })
    .await;
    let mut raw = Raw::connect(instance.address()).await;
    raw.open("s", &instance.token("s").await).await;
    let start = Instant::now();
    // A single frame, dripping: longer than the timeout, and never silent.
    for byte in crate::support::raw::frame(0x8a, &[b'x'; 60]) {
        raw.write(&[byte]).await;
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert!(start.elapsed() > Duration::from_secs(3));
    instance.publish("session:s:down", "alive");
    // A busy machine may have made a pause between two bytes that earned a ping.
    let frame = loop {
        let frame = raw.next_frame().await.unwrap();
        if frame.first != 0x89 {
            break frame;
        }
    };
    assert_eq!((frame.first, &frame.payload[..]), (0x81, &b"alive"[..]));
}

#[tokio::test]
async fn an_idle_client_is_closed_although_it_answers_pings() {
    let instance = TestInstance::with(|config| {
        config.heartbeat.interval = Duration::from_millis(300);
        config.heartbeat.timeout = Duration::from_secs(20);
        config.heartbeat.idle_timeout = Duration::from_millis(2500);
    })
    .await;
    let mut busy = instance.client("busy").await;
    let mut idle = instance.client("idle").await;
    let publishing = async {
        loop {
            instance.publish("session:busy:down", "busy");
            assert_eq!(busy.text().await, "busy");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    let (code, reason) = tokio::select! {
        closed = idle.closed() => closed,
        () = publishing => unreachable!(),
    };
    assert_eq!((code, reason.as_str()), (4003, "idle timeout"));
    instance.wait_ended("sessions", "idle_timeout").await;
    instance.publish("session:busy:down", "still");
    assert_eq!(busy.text().await, "still");
}

#[tokio::test]
async fn pings_and_pongs_never_reach_the_bus() {
    let instance = TestInstance::with(|_| ()).await;
    let mut worker = instance.follow("session:s:up").await;
    let mut client = instance.client("s").await;
    let published = instance.gateway().bus.counters().published.value();
    for message in [Message::Ping("ping".into()), Message::Pong("pong".into())] {
        client.send_message(message).await;
    }
    assert_eq!(client.next().await, Message::Pong("ping".into()));
    client.send("1").await;
    assert_eq!(worker.next().await, "1");
    assert!(instance.gateway().bus.counters().published.value() <= published + 2);
    let received = instance.metric("wsproxy_messages_received_total{endpoint=\"sessions\"}");
    assert_eq!(received, 1.0);
}
