//! Lines of the log: who came, who was refused and how often that is told, outages, one message's way.

use std::time::Duration;

use serde_json::Value;

use crate::support::{
    binary::Binary,
    client::Client,
    eventually, eventually_yes,
    gateway::bearer,
    http,
    raw::{Raw, UPGRADE},
    redis_server::RedisServer,
    sse::Events,
};

#[tokio::test]
async fn opened_and_closed_lines_tell_where_a_client_comes_from() {
    let binary = Binary::start(&[("LOG_LEVEL", "info")]).await;
    let mut headers = bearer(&binary.token("s-1").await).to_vec();
    headers.extend(BROWSER.map(|(name, value)| (name, value.to_owned())));
    Client::connect(binary.address, "/agent/ws/s-1", &headers).await.unwrap().close().await;
    let path = format!("/agent/ws/s-2?token={}", binary.token("s-2").await);
    drop(Events::open(binary.address, &path, &BROWSER).await.unwrap());
    let path = format!("/agent/ws/s-3?token={}", binary.token("s-3").await);
    drop(Events::open(binary.address, &path, &[]).await.unwrap());
    eventually("all are closed", || binary.lines("Connection closed.").len() == 3).await;
    for message in ["Connection opened.", "Connection closed."] {
        let lines = binary.lines(message);
        assert!(lines.iter().all(|line| line["address"] == "127.0.0.1"), "{lines:?}");
        for session in ["s-1", "s-2"] {
            let line = lines.iter().find(|line| line["session_id"] == session).unwrap();
            let said = (line["origin"].as_str(), line["user_agent"].as_str());
            assert_eq!(said, (Some(BROWSER[0].1), Some(BROWSER[1].1)), "{line}");
        }
        let line = lines.iter().find(|line| line["session_id"] == "s-3").unwrap();
        assert!(line.get("origin").is_none_or(Value::is_null), "{line}");
    }
}

/// Lines that were written, and those that they say were left out.
fn told(lines: &[Value]) -> (usize, u64) {
    (lines.len(), lines.iter().map(|line| line["left_out"].as_u64().unwrap()).sum())
}

#[tokio::test]
async fn refusals_are_one_line_a_second_and_kind() {
    let binary = Binary::start(&[("LOG_LEVEL", "info")]).await;
    let refuse = async |token: &str| {
        let headers = [("authorization", format!("Bearer {token}"))];
        let headers = headers.each_ref().map(|(name, value)| (*name, value.as_str()));
        http::handshake(binary.address, "/agent/ws/s", &headers).await.status
    };
    let begun = std::time::Instant::now();
    for _ in 0..100 {
        assert_eq!(refuse("wrong").await, 403);
    }
    let most = begun.elapsed().as_secs() as usize + 1;
    // Another kind has a line of its own.
    assert_eq!(http::handshake(binary.address, "/agent/ws/s", &[]).await.status, 401);
    tokio::time::sleep(Duration::from_millis(1100)).await;
    assert_eq!(refuse("wrong").await, 403);
    let of = |code: &str| {
        let lines = binary.lines("Handshake refused.").into_iter();
        lines.filter(|line| line["code"] == code).collect::<Vec<_>>()
    };
    eventually("the last line", || told(&of("invalid_token")).1 > 0).await;
    let (written, left_out) = told(&of("invalid_token"));
    assert!(written <= most + 1, "{written} lines");
    assert_eq!(written as u64 + left_out, 101);
    assert_eq!(told(&of("missing_credentials")), (1, 0));
}

#[tokio::test]
async fn proxied_requests_without_a_credential_have_their_lines() {
    let settings = [("LOG_LEVEL", "info"), ("WSPROXY_ENDPOINTS__TUNNEL", "true")];
    let binary = Binary::start(&settings).await;
    let path = "/clusters/c1/proxy/api?token=secret";
    let begun = std::time::Instant::now();
    assert_eq!(http::request(binary.address, "GET", path, &[], b"").await.status, 401);
    for message in ["Proxied request refused.", "Proxied request ended."] {
        eventually(message, || !binary.lines(message).is_empty()).await;
    }
    let refused = &binary.lines("Proxied request refused.")[0];
    assert_eq!(
        (&refused["code"], &refused["address"]),
        (&"unauthorized".into(), &"127.0.0.1".into())
    );
    let ended = &binary.lines("Proxied request ended.")[0];
    assert_eq!((&ended["code"], &ended["status"]), (&"unauthorized".into(), &401.into()));
    assert_eq!(ended["trace_id"], refused["trace_id"]);
    // A client without a credential does not fill the log.
    for _ in 0..50 {
        assert_eq!(http::request(binary.address, "GET", path, &[], b"").await.status, 401);
    }
    tokio::time::sleep(Duration::from_millis(1100)).await;
    assert_eq!(http::request(binary.address, "GET", path, &[], b"").await.status, 401);
    // One line a second, and the first.
    let most = begun.elapsed().as_secs() as usize + 1;
    for message in ["Proxied request refused.", "Proxied request ended."] {
        eventually(message, || {
            let (written, left_out) = told(&binary.lines(message));
            written as u64 + left_out == 52
        })
        .await;
        let (written, _) = told(&binary.lines(message));
        assert!(written <= most, "{message} {written} lines");
    }
}

#[tokio::test]
async fn a_refused_agent_is_logged_with_the_user_it_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("agents.db").display().to_string();
    let settings = [
        ("LOG_LEVEL", "info"),
        ("WSPROXY_ENDPOINTS__AGENTS", "true"),
        ("WSPROXY_DATABASE__PATH", &*path),
    ];
    let binary = Binary::start(&settings).await;
    let refused = async |user: &str| {
        let path = format!("/?userId={user}&secret=secret-of-the-agent");
        http::handshake(binary.address, &path, &[]).await.status
    };
    eventually_yes("the secret is judged", async || refused("u-1").await == 403).await;
    assert_eq!(refused("a:b").await, 401);
    let line = |code: &str| {
        binary.lines("Handshake refused.").into_iter().find(|line| line["code"] == code)
    };
    eventually("the last line", || line("malformed_credentials").is_some()).await;
    assert_eq!(line("invalid_credentials").unwrap()["user_id"], "u-1");
    assert_eq!(line("malformed_credentials").unwrap()["user_id"].as_str(), None);
}

#[tokio::test]
async fn a_full_instance_says_so_once_a_second() {
    let settings = [
        ("LOG_LEVEL", "info"),
        ("WSPROXY_LIMITS__MAX_CONNECTIONS", "1"),
        ("WSPROXY_ENDPOINTS__ECHO", "true"),
    ];
    let binary = Binary::start(&settings).await;
    let _client = Client::connect(binary.address, "/echo", &[]).await.unwrap();
    let begun = std::time::Instant::now();
    for _ in 0..100 {
        http::handshake(binary.address, "/echo", &[]).await.assert_refused(503, "full");
    }
    let most = begun.elapsed().as_secs() as usize + 1;
    let lines = binary.lines_when("A connection was refused: the instance is full.", 1).await;
    assert!((1..=most).contains(&lines.len()), "{lines:?}");
    assert_eq!((&lines[0]["level"], &lines[0]["max"]), (&"WARN".into(), &1.into()));
}

#[tokio::test]
async fn redis_that_is_away_is_an_error_and_ready_follows() {
    let mut server = RedisServer::start();
    let binary = Binary::start(&[("REDIS_URL", &server.url()), ("LOG_LEVEL", "info")]).await;
    let ready = binary.line("Ready.").await;
    assert_eq!(ready["bus"], "redis");
    server.kill();
    let away = binary.line("Redis is away: no client can connect, and no message arrives. Open connections stay: do not restart.").await;
    assert_eq!(away["level"], "ERROR");
    assert!(away["error"].as_str().is_some_and(|error| !error.is_empty()), "{away}");
    server.restart();
    eventually("it is ready again", || binary.lines("Ready.").len() == 2).await;
    assert!(binary.lines("Ready.")[1]["away_ms"].as_u64().unwrap() >= 1000);
}

#[tokio::test]
async fn a_family_that_is_off_is_not_found_and_told() {
    let binary = Binary::start(&[
        ("WSPROXY_ENDPOINTS__SESSIONS", "false"),
        ("WSPROXY_ENDPOINTS__ECHO", "true"),
    ])
    .await;
    let paths = [("/agent/ws/s", "sessions"), ("/ws", "events"), ("/ws/health", "events")];
    for (path, endpoint) in paths {
        for headers in [&[][..], &[("accept", "text/event-stream")]] {
            let refused = http::request(binary.address, "GET", path, headers, b"").await;
            refused.assert_refused(404, "not_found");
            assert!(refused.body.contains(&format!("endpoints.{endpoint} is off")), "{refused:?}");
        }
        let mut raw = Raw::connect(binary.address).await;
        raw.write(format!("GET {path} HTTP/1.1\r\n{UPGRADE}\r\n").as_bytes()).await;
        raw.response().await.assert_refused(404, "not_found");
        let labels = format!("{{endpoint=\"{endpoint}\",outcome=\"not_found\"}}");
        let refused = binary.metric(&format!("wsproxy_handshakes_total{labels}")).await;
        assert!(refused >= 3.0);
    }
    // A WebSocket where nothing ever is.
    http::handshake(binary.address, "/socket.io/", &[]).await.assert_refused(404, "not_found");
    http::request(binary.address, "GET", "/favicon.ico", &[], b"")
        .await
        .assert_refused(404, "not_found");
    let lines = binary.lines_when("Handshake refused.", 10).await;
    let of = |path: &str| lines.iter().filter(|line| line["path"] == path).count();
    assert_eq!(["/agent/ws/s", "/ws", "/ws/health"].map(of), [3, 3, 3]);
    assert_eq!((of("/socket.io/"), of("/favicon.ico")), (1, 0));
}

#[tokio::test]
async fn trace_follows_one_message_of_one_session() {
    let binary = Binary::start(&[("LOG_LEVEL", "info,wsproxy::messages=trace")]).await;
    let mut client =
        Client::connect(binary.address, "/agent/ws/s-1", &bearer(&binary.token("s-1").await))
            .await
            .unwrap();
    let path = format!("/agent/ws/s-1?token={}", binary.token("s-1").await);
    let mut events = Events::open(binary.address, &path, &[]).await.unwrap();
    binary.api("POST", "/api/v1/sessions/s-1/messages", "\"down, secret\"").await;
    assert_eq!(client.text().await, "\"down, secret\"");
    assert_eq!(events.data().await, "\"down, secret\"");
    client.send("\"up, secret\"").await;
    let first = |message: &str| binary.lines(message).into_iter().next().unwrap_or_default();
    let outcome = "The bus answered to a client's message.";
    eventually("its way up", || first(outcome)["outcome"] == "Received(0)").await;
    for (message, field, value) in [
        ("A message is put into the queue of the bus.", "channel", "session:s-1:down"),
        ("A message came from the bus.", "channel", "session:s-1:down"),
        ("A client's message came.", "session_id", "s-1"),
    ] {
        let lines = binary.lines(message);
        assert!(lines.iter().any(|line| line[field] == value), "{message}: {lines:?}");
    }
    let opened = binary.lines_when("Connection opened.", 2).await;
    let connection = |n: usize| &opened[n]["connection_id"];
    let written = binary.line("A message is written to an event stream.").await;
    assert_eq!(written["connection_id"], *connection(1));
    let written = binary.line("Messages were written to a client.").await;
    assert_eq!((&written["connection_id"], &written["waiting_bytes"]), (connection(0), &0.into()));
    let queue = binary.lines("A message is put into the queue of the bus.");
    assert!(queue.iter().any(|line| line["channel"] == "session:s-1:up"), "{queue:?}");
    assert!(!binary.log().contains("secret"));
}

#[tokio::test]
async fn a_database_without_a_prefix_is_warned_about() {
    let server = RedisServer::start();
    let url = format!("{}/1", server.url());
    let message = "Databases of one Redis do not separate channels: set redis.channel_prefix, unless nothing else uses this Redis.";
    for (url, prefix, warnings) in [(&server.url(), "", 0), (&url, "", 1), (&url, "staging", 0)] {
        let binary = Binary::start(&[("REDIS_URL", url), ("REDIS_CHANNEL_PREFIX", prefix)]).await;
        let lines = binary.lines(message);
        assert_eq!(lines.len(), warnings, "{url} {prefix}");
        assert!(lines.iter().all(|line| line["level"] == "WARN" && line["database"] == 1));
    }
}

const BROWSER: [(&str, &str); 2] =
    [("Origin", "https://app.example"), ("User-Agent", "Browser/1.0 (a test)")];
