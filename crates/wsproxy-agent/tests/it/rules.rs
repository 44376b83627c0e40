//! Rules of the agent: paths, headers, and its credential.

use std::time::Duration;

use wsproxy_proto::tunnel::{code::Code, frame::Open};

use crate::support::{Bench, block, code, file, head, post};

#[tokio::test]
async fn paths_outside_of_the_lists_are_refused() {
    let bench = Bench::with(|settings| {
        settings.allow_paths = vec!["/api".into()];
        settings.deny_paths = vec!["/api/secrets".into()];
    })
    .await;
    for path in [
        "/",
        "/apis",
        "/api/secrets?x",
        "/api/%73ecrets/a",
        "/api/../x",
        "/api/%2e%2e/x",
        "/api#x",
        "/api/secrets;x=1/a",
        "/api/secrets%3Bx/a",
        "/api/secrets%5Ca",
        "/api/..;x/a",
    ] {
        assert_eq!(code(&mut bench.get(path)).await, Code::BadPath, "{path}");
    }
    let mut good = bench.get("/api/pods?x=/api/secrets");
    let (_, mut upstream) = bench.upstream.request().await;
    upstream.write("HTTP/1.1 204 x\r\n\r\n").await;
    assert_eq!(head(&mut good).await.status, 204);
}

#[tokio::test]
async fn headers_that_a_gateway_takes_away_are_refused() {
    let bench = Bench::new().await;
    for name in [
        "connection",
        "transfer-encoding",
        "impersonate-user",
        "x-remote-user",
        "x_wsproxy_peer",
        "upgrade",
    ] {
        let headers = block(&[(name, "x")]);
        let open = Open { end: true, headers: headers.headers(), ..Open::new(b"GET", b"/") };
        assert_eq!(code(&mut bench.open(&open)).await, Code::Protocol, "{name}");
    }
    let headers = block(&[("content-length", "4")]);
    assert_eq!(
        code(&mut bench.open(&Open { end: true, ..post("/", &headers) })).await,
        Code::Protocol
    );
    assert_eq!(
        code(&mut bench.open(&Open { end: true, ..Open::new(b"CONNECT", b"/") })).await,
        Code::Protocol
    );
}

#[tokio::test]
async fn the_agents_credential_replaces_that_of_the_client_and_follows_its_file() {
    let token = file("first\n");
    let path = token.path().to_owned();
    let bench = Bench::with(|settings| settings.upstream_token_file = Some(path.clone())).await;
    let headers = block(&[("authorization", "Bearer of-the-client"), ("authorization", "Basic x")]);
    let ask = async || {
        let open = Open { end: true, headers: headers.headers(), ..Open::new(b"GET", b"/") };
        let mut stream = bench.open(&open);
        let (request, mut upstream) = bench.upstream.request().await;
        upstream.write("HTTP/1.1 204 x\r\nConnection: close\r\n\r\n").await;
        head(&mut stream).await;
        let lines = request.lines().filter(|line| line.starts_with("authorization:"));
        lines.map(str::to_owned).collect::<Vec<_>>()
    };
    assert_eq!(ask().await, ["authorization: bearer first"]);
    std::fs::write(&path, "second-token").unwrap();
    let changed = async {
        while ask().await != ["authorization: bearer second-token"] {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    crate::support::within(changed).await;
    // A file that is away for a moment changes nothing.
    std::fs::remove_file(&path).unwrap();
    tokio::time::sleep(Duration::from_millis(1100)).await;
    assert_eq!(ask().await, ["authorization: bearer second-token"]);
}

#[tokio::test]
async fn the_host_is_the_upstreams_unless_it_is_to_be_kept() {
    let bench = Bench::with(|settings| settings.preserve_host = true).await;
    let headers = block(&[("host", "clients.example")]);
    let open = Open { end: true, headers: headers.headers(), ..Open::new(b"GET", b"/") };
    let _stream = bench.open(&open);
    assert!(bench.upstream.request().await.0.contains("\r\nhost: clients.example\r\n"));

    let bench = Bench::new().await;
    let _stream = bench.open(&open);
    let expected = format!("\r\nhost: 127.0.0.1:{}\r\n", bench.upstream.port);
    assert!(bench.upstream.request().await.0.contains(&expected));
}
