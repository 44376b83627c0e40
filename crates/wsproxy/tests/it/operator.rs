//! Messages to the operator of an instance that is not configured as intended.

use crate::support::{binary::Binary, http, redis_server::RedisServer};

fn warnings(binary: &Binary) -> Vec<String> {
    let log = binary.log();
    log.lines().filter(|line| line.contains("\"level\":\"WARN\"")).map(str::to_owned).collect()
}

#[tokio::test]
async fn serving_on_the_embedded_bus_is_one_warning() {
    let binary = Binary::start(&[]).await;
    crate::support::eventually("it is warned of", || !warnings(&binary).is_empty()).await;
    let warnings = warnings(&binary);
    assert!(warnings.len() == 1 && warnings[0].contains(NO_REDIS), "{warnings:?}");
    assert!(warnings[0].contains("\"bus\":\"memory\"") && warnings[0].contains("REDIS_URL"));
    assert_eq!(binary.api("GET", "/api/v1/info", "").await.json()["bus"]["kind"], "memory");
    assert_eq!(binary.api("GET", "/health", "").await.json()["bus"]["kind"], "memory");

    let redis = RedisServer::start();
    let binary = Binary::start(&[("REDIS_URL", &redis.url())]).await;
    binary.line("Connected to Redis.").await;
    assert!(!binary.log().contains(NO_REDIS));
    assert_eq!(binary.api("GET", "/api/v1/info", "").await.json()["bus"]["kind"], "redis");
}

#[tokio::test]
async fn a_refused_token_names_the_bus_in_the_log() {
    let redis = RedisServer::start();
    let second = format!("{}/1", redis.url());
    for (url, place) in [
        ("", "bus memory"),
        (redis.url().as_str(), "bus redis, database 0"),
        (second.as_str(), "bus redis, database 1"),
    ] {
        let binary = Binary::start(&[("REDIS_URL", url)]).await;
        let token = "/agent/ws/s?token=stored-elsewhere";
        let upgrade = [
            ("upgrade", "websocket"),
            ("connection", "upgrade"),
            ("sec-websocket-version", "13"),
            ("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ=="),
        ];
        let refused = http::request(binary.address, "GET", token, &upgrade, b"").await;
        refused.assert_refused(403, "invalid_token");
        let line = binary.line("Handshake refused.").await;
        let expected = format!("no token is stored (key session:s:auth, {place})");
        assert_eq!(
            (line["code"].as_str(), line["error"].as_str()),
            (Some("invalid_token"), Some(expected.as_str()))
        );
        assert!(!refused.body.contains("bus"), "{}", refused.body);
    }
}

const NO_REDIS: &str = "No Redis is configured";
