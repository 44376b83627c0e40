//! Health that the agent tells its gateway.

use std::time::Duration;

use crate::{
    gateway::Gateway,
    support::{Agent, settings, within},
    upstream::Upstream,
};

#[tokio::test]
async fn the_gateway_learns_when_the_upstream_fails_and_recovers() {
    let (gateway, upstream) = (Gateway::new().await, Upstream::new().await);
    let mut settings = settings(gateway.port, upstream.port);
    settings.health_interval = Duration::from_millis(20);
    settings.health_path = "/livez?x=1".into();
    let _agent = Agent::new(settings.config().unwrap());
    let lane = gateway.lane().await;
    let mut seen = 0;
    for (status, is_ok) in [(404, true), (500, false), (200, true)] {
        let (request, mut connection) = upstream.request().await;
        assert!(request.starts_with("get /livez?x=1 "));
        let answer =
            format!("HTTP/1.1 {status} x\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok");
        connection.write(&answer).await;
        let health = loop {
            let status = within(lane.handle.changed(seen)).await;
            seen = status.version;
            if let Some(health) = status.health.filter(|health| health.upstream_ok == is_ok) {
                break health;
            }
        };
        assert_eq!(health.streams, 0);
        assert!(health.memory_bytes > 1 << 20 && health.disk_free_bytes > 0);
        assert_eq!(health.text.is_empty(), is_ok);
    }
}
