//! Plain requests: credentials, paths, headers, refusals.

use wsproxy_conn::lane::AcceptedStream;

use crate::support::{
    cluster_agent::{CLIENT, ClusterAgent, answer, ask, config, head, lines},
    gateway::TestInstance,
    http::request,
    raw::Raw,
};

/// Answers with the head of the request.
async fn told(stream: AcceptedStream) {
    let request = &stream.request;
    let text = format!(
        "{} {}\n{}",
        String::from_utf8_lossy(&request.method),
        String::from_utf8_lossy(&request.path),
        lines(request.headers.headers())
    );
    answer(stream, 200, &text).await;
}

#[tokio::test]
async fn a_request_reaches_the_agent_as_the_rules_say() {
    let gateway = TestInstance::start(config(None)).await;
    let _agent = ClusterAgent::start(gateway.address(), told).await;
    let headers = "Connection: X-A\r\nX-A: 1\r\nX-B: 2\r\nCookie: a=b\r\nImpersonate-User: root\r\nX_Wsproxy_A: 1\r\n";
    let answer = ask(&gateway, &head("GET", "/a//b%2Fc?x=1&token=t", headers)).await;
    assert_eq!(answer.status, 200, "{answer:?}");
    assert_eq!(answer.header("x-wsproxy-source"), "upstream");
    let (first, rest) = answer.body.split_once('\n').unwrap();
    assert_eq!(first, "GET /a//b%2Fc?x=1&token=t");
    for line in [
        "x-b: 2\n",
        "host: gateway.example\n",
        "x-forwarded-for: 127.0.0.1\n",
        "x-forwarded-prefix: /clusters/c1/proxy\n",
        "via: 1.1 wsproxy-",
        "traceparent: 00-",
        "x-request-id: ",
    ] {
        assert!(rest.contains(line), "{line} {rest}");
    }
    for name in ["x-a", "cookie", "impersonate", "wsproxy_a", "authorization", CLIENT] {
        assert!(!rest.contains(&format!("\n{name}")) && !rest.contains(CLIENT), "{name} {rest}");
    }
    // Nothing behind the prefix is the root.
    assert!(ask(&gateway, &head("GET", "", "")).await.body.starts_with("GET /\n"));
    assert!(ask(&gateway, &head("GET", "?a", "")).await.body.starts_with("GET /?a\n"));
    gateway.drain().await;
}

/// A length beside chunks: the library for HTTP drops the length, so the gateway sees a request with chunks alone. No
/// further request may be read from that connection.
#[tokio::test]
async fn a_length_beside_chunks_smuggles_nothing() {
    let gateway = TestInstance::start(config(None)).await;
    let _agent = ClusterAgent::start(gateway.address(), told).await;
    for headers in [
        "Content-Length: 6\r\nTransfer-Encoding: chunked\r\n",
        "Transfer-Encoding: chunked\r\nContent-Length: 6\r\n",
    ] {
        let mut raw = Raw::connect(gateway.address()).await;
        let smuggled = head("GET", "/smuggled", "");
        raw.write(format!("{}0\r\n\r\n{smuggled}", head("POST", "/a", headers)).as_bytes()).await;
        let answer = raw.response().await;
        assert!(answer.status == 400 || answer.header("connection") == "close", "{answer:?}");
        while raw.read().await > 0 {}
        assert!(!String::from_utf8_lossy(raw.rest()).contains("smuggled"));
    }
    gateway.drain().await;
}

#[tokio::test]
async fn a_credential_opens_its_clusters_alone() {
    let gateway = TestInstance::start(config(None)).await;
    let _agent = ClusterAgent::start(gateway.address(), told).await;
    let bearer = format!("Bearer {CLIENT}");
    let own = ("X-Wsproxy-Authorization", &*bearer);
    for (path, headers, status, code) in [
        ("/clusters/c1/proxy/", &[][..], 401, "unauthorized"),
        ("/clusters/c1/proxy/?token=token-of-clients", &[], 401, "unauthorized"),
        ("/clusters/c1/proxy/", &[("Authorization", "Bearer x")], 401, "unauthorized"),
        (
            "/clusters/c1/proxy/",
            &[("Authorization", &*bearer), ("X-Wsproxy-Authorization", "Bearer x")],
            401,
            "unauthorized",
        ),
        ("/clusters/c1/proxy/", &[("Cookie", "token=token-of-clients")], 401, "unauthorized"),
        ("/clusters/c2/proxy/", &[own], 403, "forbidden"),
        ("/clusters/d9/proxy/", &[own], 404, "cluster_unknown"),
        ("/clusters/a%20b/proxy/", &[own], 404, "cluster_unknown"),
        ("/clusters/ws/x", &[], 400, "bad_id"),
    ] {
        let answer = request(gateway.address(), "GET", path, headers, b"").await;
        let found = answer.json()["error"]["code"].as_str().map(str::to_owned);
        assert_eq!((answer.status, found.as_deref()), (status, Some(code)), "{path} {headers:?}");
    }
    // The gateway's own rules do not apply to what is the upstream's affair.
    let headers = [own, ("Authorization", "Bearer upstream"), ("Origin", "https://evil.example")];
    let path = "/clusters/c1/proxy/a?token=x";
    let answer = request(gateway.address(), "GET", path, &headers, b"").await;
    assert_eq!(answer.status, 200, "{answer:?}");
    assert!(!answer.body.contains("Bearer"), "{answer:?}");
    gateway.drain().await;
}

#[tokio::test]
async fn authorization_and_cookies_pass_where_they_may() {
    let mut config = config(None);
    (config.tunnel.pass_authorization, config.tunnel.pass_cookies) = (true, true);
    let gateway = TestInstance::start(config).await;
    let _agent = ClusterAgent::start(gateway.address(), told).await;
    let bearer = format!("Bearer {CLIENT}");
    let headers = [
        ("X-Wsproxy-Authorization", &*bearer),
        ("Authorization", "Bearer upstream"),
        ("Cookie", "a=b"),
    ];
    let path = "/clusters/c1/proxy/";
    let answer = request(gateway.address(), "GET", path, &headers, b"").await;
    assert!(answer.body.contains("\nauthorization: Bearer upstream\n"), "{answer:?}");
    assert!(answer.body.contains("\ncookie: a=b\n") && !answer.body.contains(CLIENT));
    // The gateway's own credential never passes.
    let headers = [("Authorization", &*bearer)];
    let answer = request(gateway.address(), "GET", path, &headers, b"").await;
    assert!(answer.status == 200 && !answer.body.contains(CLIENT), "{answer:?}");
    gateway.drain().await;
}

#[tokio::test]
async fn a_cluster_without_a_lane_is_told_apart() {
    let mut config = config(None);
    config.tunnel.wait = std::time::Duration::ZERO;
    config.tunnel.reconnect_grace = std::time::Duration::ZERO;
    let gateway = TestInstance::start(config).await;
    let answer = ask(&gateway, &head("GET", "/api/v1/pods?x=1", "")).await;
    assert_eq!((answer.status, answer.header("x-wsproxy-error")), (503, "cluster_offline"));
    assert_eq!(answer.header("retry-after"), "");
    let error = &answer.json()["error"];
    assert_eq!((&error["cluster_id"], &error["path"]), (&"c1".into(), &"/api/v1/pods".into()));
    assert_eq!(error["retryable"], true);
    let kubectl = "User-Agent: kubectl/v1.30\r\n";
    let status = ask(&gateway, &head("GET", "/api/v1/pods", kubectl)).await.json();
    assert_eq!((&status["kind"], &status["code"]), (&"Status".into(), &503.into()));
    gateway.drain().await;
}
