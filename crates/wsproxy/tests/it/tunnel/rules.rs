//! Rules of headers and paths from end to end, errors for clients of Kubernetes, and clusters in the worker API.

use wsproxy::config::tunnel::ClientAuth;
use wsproxy_conn::lane::AcceptedStream;

use crate::support::{
    cluster_agent::{ClusterAgent, answer, ask, config, head, lines, send_head},
    gateway::{API_KEY, TestInstance},
};

/// Answers with the headers that came.
async fn echo(stream: AcceptedStream) {
    let text = lines(stream.request.headers.headers());
    answer(stream, 200, &text).await;
}

#[tokio::test]
async fn headers_that_no_client_may_write_do_not_arrive() {
    let gateway = TestInstance::start(config(None)).await;
    let _agent = ClusterAgent::start(gateway.address(), echo).await;
    let forged = "Impersonate-User: root\r\nimpersonate_group: root\r\nX_Wsproxy_Foo: 1\r\nX-Remote-User: root\r\n\
                  X-Forwarded-For: 6.6.6.6\r\nX_Forwarded_For: 6.6.6.6\r\nForwarded: for=6.6.6.6\r\n\
                  X-Forwarded-Prefix: /evil\r\nCookie: a=b\r\nProxy-Authorization: x\r\nX-Kept: 1\r\n\
                  Connection: X-Named\r\nX-Named: 1\r\nX-Request-Id: r-1\r\n";
    let arrived = ask(&gateway, &head("GET", "/", forged)).await.body;
    for absent in ["root", "6.6.6.6", "wsproxy_foo", "evil", "cookie", "x-named", "authorization"] {
        assert!(!arrived.contains(absent), "{absent}: {arrived}");
    }
    for line in [
        "x-kept: 1",
        "x-forwarded-for: 127.0.0.1",
        "x-forwarded-prefix: /clusters/c1/proxy",
        "x-forwarded-host: gateway.example",
        "via: 1.1 wsproxy-",
        "traceparent: 00-",
        "x-request-id: r-1",
    ] {
        assert!(arrived.contains(line), "{line}: {arrived}");
    }
    // The request may not come back through the same cluster.
    let via = arrived.lines().find(|line| line.starts_with("via: ")).unwrap();
    for via in [via.to_owned(), via.replace("via: ", "Via: 1.0 a, ")] {
        let again = ask(&gateway, &head("GET", "/", &format!("{via}\r\n"))).await;
        assert_eq!((again.status, again.header("x-wsproxy-error")), (508, "loop"));
    }
    gateway.drain().await;
}

#[tokio::test]
async fn requests_that_could_be_misread_are_refused() {
    let gateway = TestInstance::start(config(None)).await;
    let _agent = ClusterAgent::start(gateway.address(), echo).await;
    for path in [
        "/a/../b",
        "/a/%2e%2E/b",
        "/..",
        "/a/..%2fb",
        "/a%5c..",
        "/a\\b",
        "/a%00",
        "/%00",
        "/%zz",
        "/..;/a",
    ] {
        let refused = ask(&gateway, &head("GET", path, "")).await;
        assert_eq!(
            (refused.status, refused.header("x-wsproxy-error")),
            (400, "bad_path"),
            "{path}"
        );
        assert_eq!(refused.json()["error"]["code"], "bad_path", "{path}");
    }
    for (headers, code) in [
        ("Connection: Impersonate-User\r\nImpersonate-User: root\r\n", "bad_header"),
        ("Connection: close, X-Forwarded-For\r\n", "bad_header"),
        ("Connection: close, x_forwarded_for\r\n", "bad_header"),
        ("Transfer-Encoding: gzip, chunked\r\n", "bad_header"),
        ("X-A: a\tb\r\n", "bad_header"),
        ("Connection: upgrade\r\nUpgrade: h2c\r\n", "bad_upgrade"),
    ] {
        let refused = ask(&gateway, &head("GET", "/", headers)).await;
        assert_eq!((refused.status, refused.header("x-wsproxy-error")), (400, code), "{headers}");
    }
    // The library for HTTP may refuse these before.
    for headers in ["X-A: a\x01b\r\n", "Content-Length: 1\r\nContent-Length: 2\r\n"] {
        assert_eq!(ask(&gateway, &head("GET", "/", headers)).await.status, 400, "{headers}");
    }
    for method in ["TRACE", "CONNECT"] {
        let refused = ask(&gateway, &head(method, "/", "")).await;
        assert!(matches!(refused.status, 400 | 405), "{method} {refused:?}");
    }
    assert_eq!(ask(&gateway, &head("GET", "//a%2Fb?x=/../y", "")).await.status, 200);
    gateway.drain().await;
}

#[tokio::test]
async fn answers_lead_the_client_through_the_gateway_again() {
    let gateway = TestInstance::start(config(None)).await;
    let _agent = ClusterAgent::start(gateway.address(), |mut stream| async move {
        let headers = [
            ("location", "/login?next=/"),
            ("set-cookie", "a=b; Path=/; Domain=up.example"),
            ("strict-transport-security", "max-age=1"),
            ("x_wsproxy_source", "gateway"),
            ("connection", "x-wsproxy-source, content-length"),
            ("content-length", "0"),
        ];
        send_head(&mut stream, 302, true, &headers);
    })
    .await;
    let answered = ask(&gateway, &head("GET", "/", "")).await;
    assert_eq!(answered.header("location"), "/clusters/c1/proxy/login?next=/");
    assert_eq!(answered.header("set-cookie"), "a=b; Path=/clusters/c1/proxy");
    assert_eq!(answered.header("x-wsproxy-source"), "upstream");
    assert_eq!(answered.header("content-length"), "0");
    assert_eq!(answered.header("strict-transport-security"), "");
    gateway.drain().await;
}

#[tokio::test]
async fn clients_of_kubernetes_get_a_status() {
    let mut config = config(None);
    config.tunnel.reconnect_grace = std::time::Duration::ZERO;
    let gateway = TestInstance::start(config).await;
    let kubectl = "User-Agent: kubectl/v1.20.2 (linux/amd64) kubernetes/faecb19\r\n";
    let refused = ask(&gateway, &head("POST", "/api/v1/pods?token=secret", kubectl)).await;
    assert_eq!(refused.status, 503);
    let status: serde_json::Value = serde_json::from_str(&refused.body).unwrap();
    assert_eq!((&status["kind"], &status["code"]), (&"Status".into(), &503.into()));
    assert_eq!(status["details"]["code"], "cluster_offline");
    assert_eq!(status["details"]["path"], "/api/v1/pods");
    assert_eq!(status["details"]["retryable"], true);
    let other = ask(&gateway, &head("POST", "/api/v1/pods", "")).await;
    let body: serde_json::Value = serde_json::from_str(&other.body).unwrap();
    assert_eq!(body["error"]["code"], "cluster_offline");
    gateway.drain().await;
}

#[tokio::test]
async fn without_credentials_foreign_pages_are_refused() {
    let mut config = config(None);
    config.tunnel.client_auth = ClientAuth::None;
    config.server.allowed_origins = vec!["https://app.example".parse().unwrap()];
    let gateway = TestInstance::start(config).await;
    let _agent = ClusterAgent::start(gateway.address(), echo).await;
    let ask = async |host: &str, headers: &str| {
        let line = format!("Host: {host}\r\n");
        let request = head("GET", "/", headers).replace("Host: gateway.example\r\n", &line);
        ask(&gateway, &request).await.status
    };
    let (cross, allowed) = ("Sec-Fetch-Site: cross-site\r\n", "Origin: https://app.example\r\n");
    assert_eq!(ask("localhost:8080", "").await, 200);
    assert_eq!(ask("app.example", "").await, 200);
    assert_eq!(ask("127.0.0.1", &format!("{cross}{allowed}")).await, 200);
    // The name of a foreign page leads here, and its browser sends no origin.
    assert_eq!(ask("evil.example:8080", "").await, 403);
    assert_eq!(ask("localhost", cross).await, 403);
    assert_eq!(ask("localhost", "Origin: https://evil.example\r\n").await, 403);
    gateway.drain().await;
}

#[tokio::test]
async fn operators_see_the_lanes_of_clusters() {
    let gateway = TestInstance::start(config(None)).await;
    let _agent = ClusterAgent::start(gateway.address(), echo).await;
    let get = async |path: &str, key: &str| {
        let request =
            format!("GET {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\n\r\n");
        let answer = ask(&gateway, &request).await;
        (answer.status, serde_json::from_str(&answer.body).unwrap_or(serde_json::Value::Null))
    };
    let (status, all) = get("/api/v1/clusters", API_KEY).await;
    assert_eq!((status, &all["cursor"]), (200, &serde_json::Value::Null));
    assert_eq!(
        (&all["clusters"][0]["cluster_id"], &all["clusters"][0]["lanes"]),
        (&"c1".into(), &1.into())
    );
    assert_eq!(
        get("/api/v1/clusters?cursor=c1", API_KEY).await.1["clusters"],
        serde_json::json!([])
    );
    let (status, one) = get("/api/v1/clusters/c1", API_KEY).await;
    assert_eq!((status, &one["breaker"]["state"]), (200, &"closed".into()));
    assert_eq!(
        (&one["lanes"][0]["agent_id"], &one["lanes"][0]["state"]),
        (&"node-1".into(), &"ready".into())
    );
    assert_eq!(get("/api/v1/clusters/c2", API_KEY).await.0, 404);
    assert_eq!(get("/api/v1/clusters/c1", "wrong").await.0, 403);
    gateway.drain().await;
}
