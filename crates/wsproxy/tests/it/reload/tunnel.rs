//! Tokens of the tunnel that a reload brings or takes: requests follow them, and lanes stay.

use jsonwebtoken::{EncodingKey, Header};
use serde_json::json;
use wsproxy_conn::lane::{AcceptedStream, LaneSettings};

use super::{Reloading, Values, names};
use crate::support::{
    cluster_agent::{ClusterAgent, Name, answer, send_head, sha256},
    http::request,
    issuer::now,
    raw::Raw,
};

/// The configuration with one token of the cluster's agents, and one of clients.
fn values(agent: &str, client: &str) -> Values {
    let (agent, client) = (sha256(agent), sha256(client));
    Values::new()
        .with("endpoints.tunnel", "true")
        .with("tunnel.drain", "\"100ms\"")
        .with("tunnel.agents", &format!("[{{ cluster = \"c1\", token_sha256 = \"{agent}\" }}]"))
        .with(
            "tunnel.clients",
            &format!("[{{ token_sha256 = \"{client}\", clusters = [\"c1\"] }}]"),
        )
}

async fn serve(mut stream: AcceptedStream) {
    if &stream.request.path[..] == b"/begun" {
        send_head(&mut stream, 200, false, &[]);
        let _ = stream.answer.write(bytes::Bytes::from_static(b"begun")).await;
        stream.answer.ended().await;
    } else {
        answer(stream, 200, "hello").await;
    }
}

async fn connect(
    running: &Reloading,
    agent: &'static str,
    token: &'static str,
) -> Result<ClusterAgent, u16> {
    let name = Name { agent, token, ..Name::default() };
    let connected =
        ClusterAgent::named(running.instance.address(), name, LaneSettings::default(), serve);
    connected.await.map_err(|refused| refused.status)
}

async fn ask(running: &Reloading, token: &str) -> u16 {
    let bearer = format!("Bearer {token}");
    let headers = [("Authorization", &*bearer)];
    let address = running.instance.address();
    request(address, "GET", "/clusters/c1/proxy/", &headers, b"").await.status
}

#[tokio::test]
async fn tokens_of_the_tunnel_follow_a_reload_and_lanes_stay() {
    let running = Reloading::start(&values("agent-1", "client-1")).await;
    let lane = connect(&running, "node-1", "agent-1").await.unwrap();
    let mut begun = Raw::connect(running.instance.address()).await;
    let head = "GET /clusters/c1/proxy/begun HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer client-1\r\n\r\n";
    begun.write(head.as_bytes()).await;
    begun.read_until("begun").await;
    assert_eq!((ask(&running, "client-1").await, ask(&running, "client-2").await), (200, 401));

    let answer = running.to(&values("agent-2", "client-2")).await;
    assert_eq!(names(&answer, "changed"), ["tunnel.agents", "tunnel.clients"]);
    assert_eq!((ask(&running, "client-1").await, ask(&running, "client-2").await), (401, 200));
    assert_eq!(connect(&running, "node-2", "agent-1").await.err(), Some(401));
    let second = connect(&running, "node-2", "agent-2").await.unwrap();
    // The lane of the removed token serves on, and so does the request of the removed one.
    for lane in [&lane, &second] {
        let status = lane.lane.status();
        assert!(status.end.is_none() && status.go_away.is_none(), "{status:?}");
    }
    second.cut();
    assert_eq!(ask(&running, "client-2").await, 200);
    let nothing = tokio::time::timeout(std::time::Duration::from_millis(200), begun.read()).await;
    assert!(nothing.is_err(), "the answer that had begun has ended");

    // Tokens that are all gone leave the cluster known as long as it has a lane.
    let none =
        values("agent-2", "client-2").with("tunnel.agents", "[]").with("tunnel.clients", "[]");
    let answer = running.to(&none).await;
    assert_eq!(names(&answer, "changed"), ["tunnel.agents", "tunnel.clients"]);
    assert_eq!((ask(&running, "client-2").await, ask(&running, "").await), (401, 401));
    assert_eq!(connect(&running, "node-2", "agent-2").await.err(), Some(404));
    assert!(lane.lane.status().end.is_none());
}

#[tokio::test]
async fn a_secret_of_jwts_of_the_tunnel_follows_a_reload() {
    let [old, new] = ["o", "n"].map(|letter| letter.repeat(32));
    let secret = |secret: &str| {
        Values::new()
            .with("endpoints.tunnel", "true")
            .with("tunnel.client_auth", "\"jwt\"")
            .with("jwt.secret_key", &format!("\"{secret}\""))
            .with("tunnel.reconnect_grace", "0")
    };
    let token = |secret: &str| {
        let claims = json!({ "sub": "u-1", "exp": now() + 600, "clusters": ["c1"] });
        let key = EncodingKey::from_secret(secret.as_bytes());
        jsonwebtoken::encode(&Header::default(), &claims, &key).unwrap()
    };
    let running = Reloading::start(&secret(&old)).await;
    // There is no such cluster, for those whose token is good.
    let statuses = async || (ask(&running, &token(&old)).await, ask(&running, &token(&new)).await);
    assert_eq!(statuses().await, (404, 401));
    running.to(&secret(&new)).await;
    assert_eq!(statuses().await, (401, 404));
}
