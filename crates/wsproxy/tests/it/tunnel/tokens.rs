//! JSON Web Tokens as credentials of agents and of clients.

use jsonwebtoken::{EncodingKey, Header};
use serde_json::{Value, json};
use wsproxy::config::tunnel::ClientAuth;
use wsproxy_conn::lane::LaneSettings;

use crate::support::{
    cluster_agent::{AGENT, CLIENT, ClusterAgent, Name, config, hello},
    gateway::TestInstance,
    http::request,
    issuer::now,
    raw::{Raw, UPGRADE},
};

/// An instance that takes tokens of [`SECRET`] for the audience `gateway`.
async fn start() -> TestInstance {
    let mut config = config(None);
    config.jwt.secret_key = Some(SECRET.into());
    config.jwt.audience = vec!["gateway".into()];
    config.tunnel.agent_jwt = true;
    config.tunnel.client_auth = ClientAuth::Jwt;
    TestInstance::start(config).await
}

/// A good token with further claims, which replace its own.
fn token(claims: &Value) -> String {
    signed(claims, SECRET)
}

fn signed(claims: &Value, secret: &str) -> String {
    let mut all = json!({ "sub": "u-1", "aud": "gateway", "exp": now() + 600 });
    for (name, value) in claims.as_object().unwrap() {
        all[name] = value.clone();
    }
    let key = EncodingKey::from_secret(secret.as_bytes());
    jsonwebtoken::encode(&Header::default(), &all, &key).unwrap()
}

async fn connect(gateway: &TestInstance, cluster: &str, token: &str) -> Result<ClusterAgent, u16> {
    let name = Name { cluster, token, ..Name::default() };
    let connected = ClusterAgent::named(gateway.address(), name, LaneSettings::default(), hello);
    connected.await.map_err(|refused| refused.status)
}

/// Returns status and code of a request for the root of a cluster.
async fn ask(gateway: &TestInstance, cluster: &str, headers: &[(&str, &str)]) -> (u16, String) {
    let path = format!("/clusters/{cluster}/proxy/");
    let answered = request(gateway.address(), "GET", &path, headers, b"").await;
    (answered.status, answered.header("x-wsproxy-error").to_owned())
}

#[tokio::test]
async fn a_jwt_opens_the_lane_of_its_cluster_alone() {
    let gateway = start().await;
    let of = |cluster: &str| token(&json!({ "cluster": cluster }));
    let _lane = connect(&gateway, "e1", &of("e1")).await.unwrap();
    for (name, cluster, token, status) in [
        ("another's cluster", "e2", of("e1"), 403),
        ("a pattern", "e1", of("e*"), 403),
        ("no claim", "e1", token(&json!({})), 403),
        ("the claim of clients", "e1", token(&json!({ "clusters": ["e1", "*"] })), 403),
        ("a list", "e1", token(&json!({ "cluster": ["e1"] })), 403),
        ("expired", "e1", token(&json!({ "cluster": "e1", "exp": now() - 600 })), 403),
        ("not valid yet", "e1", token(&json!({ "cluster": "e1", "nbf": now() + 600 })), 403),
        ("another audience", "e1", token(&json!({ "cluster": "e1", "aud": "other" })), 403),
        ("no audience", "e1", token(&json!({ "cluster": "e1", "aud": null })), 403),
        ("another secret", "e1", signed(&json!({ "cluster": "e1" }), &"x".repeat(32)), 403),
        ("no token", "e1", "e1".into(), 401),
        ("no signature", "e1", format!("{}.", of("e1").rsplit_once('.').unwrap().0), 403),
    ] {
        assert_eq!(connect(&gateway, cluster, &token).await.err(), Some(status), "{name}");
    }
    // Tokens of the configuration count beside them.
    assert!(connect(&gateway, "c1", AGENT).await.is_ok());
    gateway.drain().await;
}

#[tokio::test]
async fn without_the_switch_no_jwt_opens_a_lane() {
    let mut config = config(None);
    config.jwt.secret_key = Some(SECRET.into());
    let gateway = TestInstance::start(config).await;
    let token = token(&json!({ "cluster": "c1" }));
    assert_eq!(connect(&gateway, "c1", &token).await.err(), Some(401));
    gateway.drain().await;
}

#[tokio::test]
async fn a_jwt_opens_the_clusters_that_it_lists() {
    let gateway = start().await;
    let mut lanes = Vec::new();
    for cluster in ["team-a", "team-b", "x"] {
        let of_agent = token(&json!({ "cluster": cluster }));
        lanes.push(connect(&gateway, cluster, &of_agent).await.unwrap());
    }
    let of = |clusters: Value| format!("Bearer {}", token(&json!({ "clusters": clusters })));
    let (good, forbidden) = ((200, String::new()), (403, "forbidden".to_owned()));
    for (clusters, cluster, expected) in [
        (json!(["team-a"]), "team-a", &good),
        (json!(["team-a"]), "team-b", &forbidden),
        (json!(["x", "team-*"]), "team-b", &good),
        (json!(["team-*"]), "x", &forbidden),
        (json!(["*"]), "x", &good),
        // A `*` at another place is no pattern.
        (json!(["*-a"]), "team-a", &forbidden),
        (json!(["t*a"]), "team-a", &forbidden),
        (json!([]), "x", &forbidden),
        (json!(null), "x", &forbidden),
        (json!({ "x": true }), "x", &forbidden),
        (json!([["x"], 7]), "x", &forbidden),
    ] {
        let bearer = of(clusters.clone());
        let found = ask(&gateway, cluster, &[("Authorization", &bearer)]).await;
        assert_eq!(&found, expected, "{clusters} {cluster}");
    }
    let own = ask(&gateway, "x", &[("X-Wsproxy-Authorization", &of(json!(["x"])))]).await;
    assert_eq!(own, good);
    // The token of an agent opens nothing for a client.
    let of_agent = format!("Bearer {}", token(&json!({ "cluster": "x" })));
    assert_eq!(ask(&gateway, "x", &[("Authorization", &of_agent)]).await, forbidden);
    gateway.drain().await;
}

#[tokio::test]
async fn a_jwt_that_is_not_good_is_no_credential() {
    let gateway = start().await;
    let _lane = connect(&gateway, "x", &token(&json!({ "cluster": "x" }))).await.unwrap();
    let good = token(&json!({ "clusters": ["x"] }));
    for (name, token) in [
        ("expired", token(&json!({ "clusters": ["x"], "exp": now() - 600 }))),
        ("another audience", token(&json!({ "clusters": ["x"], "aud": ["a", "b"] }))),
        ("another secret", signed(&json!({ "clusters": ["x"] }), &"x".repeat(32))),
        ("no user", token(&json!({ "clusters": ["x"], "sub": "" }))),
        // Tokens of the configuration are none here.
        ("a token of tunnel.clients", CLIENT.to_owned()),
        ("two tokens", format!("{good}, {good}")),
        ("too long", token(&json!({ "clusters": ["x"], "pad": "x".repeat(9000) }))),
    ] {
        let bearer = format!("Bearer {token}");
        let (status, code) = ask(&gateway, "x", &[("Authorization", &bearer)]).await;
        assert_eq!((status, &*code), (401, "unauthorized"), "{name}");
    }
    gateway.drain().await;
}

#[tokio::test]
async fn a_jwt_elsewhere_than_in_its_headers_is_ignored() {
    let gateway = start().await;
    let _lane = connect(&gateway, "x", &token(&json!({ "cluster": "x" }))).await.unwrap();
    let good = token(&json!({ "clusters": ["x"] }));
    for (query, headers) in [
        (format!("?token={good}&access_token={good}&jwt={good}"), String::new()),
        (String::new(), format!("Cookie: token={good}; jwt={good}\r\n")),
        (String::new(), format!("{UPGRADE}Sec-WebSocket-Protocol: bearer, {good}\r\n")),
        (String::new(), format!("Authorization: Basic {good}\r\n")),
        (String::new(), format!("Authorization: {good}\r\n")),
        (String::new(), format!("Proxy-Authorization: Bearer {good}\r\n")),
        (String::new(), format!("X_Wsproxy_Authorization: Bearer {good}\r\n")),
    ] {
        let mut raw = Raw::connect(gateway.address()).await;
        let host = if headers.contains("Host:") { "" } else { "Host: x\r\n" };
        let request = format!("GET /clusters/x/proxy/{query} HTTP/1.1\r\n{host}{headers}\r\n");
        raw.write(request.as_bytes()).await;
        let answered = raw.response().await;
        let found = (answered.status, answered.header("x-wsproxy-error").to_owned());
        assert_eq!(found, (401, "unauthorized".into()), "{query} {headers}");
        assert!(!answered.body.contains(&good), "{answered:?}");
    }
    gateway.drain().await;
}

const SECRET: &str = "0123456789abcdef0123456789abcdef";
