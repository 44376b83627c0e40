//! Memory after many clients came, caused every kind of trouble, and went: none is left.

use crate::support::{
    gateway::{Backend, TestInstance, over_both},
    raw::{Raw, frame},
};

over_both!(
    a_thousand_clients_that_came_and_went_leave_nothing,
    handshakes_that_were_given_up_leave_nothing,
);

async fn a_thousand_clients_that_came_and_went_leave_nothing(backend: Backend) {
    let mut config = backend.config();
    config.limits.max_message_bytes = 1000;
    let instance = TestInstance::start(config).await;
    for round in 0..10 {
        let mut clients = Vec::new();
        for n in 0..100 {
            // Some sessions have several clients.
            let session = format!("s{}", n / 2);
            let mut raw = Raw::connect(instance.address()).await;
            raw.open(&session, &instance.token(&session).await).await;
            clients.push(raw);
        }
        assert_eq!(instance.gateway().hub.topics(), 100);
        assert_eq!(instance.gateway().bus.status().channels, 100);
        for n in 0..50 {
            instance.publish(&format!("session:s{n}:down"), "x".repeat(5000));
        }
        for (n, mut raw) in clients.into_iter().enumerate() {
            match (n + round) % 5 {
                0 => raw.frame(0x88, b"").await,
                1 => raw.reset(),
                2 => raw.write(&frame(0x81, &[b'x'; 1001])).await,
                3 => raw.write(&frame(0x01, b"half a message")).await,
                _ => drop(raw),
            }
        }
        instance.wait_empty().await;
    }
    let gateway = instance.gateway();
    let total = instance.metric("wsproxy_connections_total{endpoint=\"sessions\"}");
    assert_eq!(total, 1000.0);
    assert_eq!(gateway.tasks.len(), 1, "the listener is the only task");
    assert!(gateway.runtime.links().is_empty());
    instance.wait_empty().await;
}

async fn handshakes_that_were_given_up_leave_nothing(backend: Backend) {
    let instance = TestInstance::start(backend.config()).await;
    for n in 0..100 {
        let token = instance.token("s").await;
        let mut raw = Raw::connect(instance.address()).await;
        let head = format!(
            "GET /agent/ws/s?token={token} HTTP/1.1\r\n{}\r\n",
            crate::support::raw::UPGRADE
        );
        let sent = if n % 3 == 0 { &head[..60] } else { &head };
        raw.write(sent.as_bytes()).await;
        for _ in 0..n % 5 {
            tokio::task::yield_now().await;
        }
        raw.reset();
    }
    instance.wait_empty().await;
    let mut client = instance.client("s").await;
    instance.assert_serves(&mut client, "s").await;
    drop(client);
    instance.wait_empty().await;
    crate::support::eventually("no task is left", || instance.gateway().tasks.len() == 1).await;
}
