//! The program `wsproxy-agent`: its settings, its log and its end.

use std::{io::Read, process::Stdio};

use rustix::process::{Pid, Signal, kill_process};
use tokio::process::Command;

use crate::{
    gateway::Gateway,
    support::{block, file, head, within},
    upstream::Upstream,
};
use wsproxy_proto::tunnel::frame::Open;

fn program(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_wsproxy-agent"));
    command.args(arguments).env_clear().kill_on_drop(true);
    command
}

#[tokio::test]
async fn a_request_has_a_line_without_path_and_token() {
    let (gateway, upstream) = (Gateway::new().await, Upstream::new().await);
    let (token, log) = (file("secret-token"), file(""));
    let (gateway_url, upstream_url) =
        (format!("ws://127.0.0.1:{}", gateway.port), format!("http://127.0.0.1:{}", upstream.port));
    let arguments = ["--gateway", &gateway_url, "--upstream", &upstream_url, "--health-path", ""];
    let mut child = program(&arguments)
        .args(["--cluster", "c1", "--token-file", token.path().to_str().unwrap()])
        .env("WSPROXY_TUNNEL_AGENT__AGENT_ID", "a9")
        .stderr(Stdio::from(log.reopen().unwrap()))
        .spawn()
        .unwrap();
    let handshake = gateway.handshake().await;
    assert_eq!(handshake.headers["authorization"], "Bearer secret-token");
    assert!(handshake.headers["x-wsproxy-agent"].to_str().unwrap().starts_with("a9 "));
    let lane = handshake.accept(Default::default()).await;
    let trace = "0af7651916cd43dd8448eb211c80319c";
    let parent = format!("00-{trace}-b7ad6b7169203331-01");
    let headers = block(&[("traceparent", &parent), ("x-request-id", "r-1"), ("x-a", "hidden-1")]);
    let path = b"/hidden-2?hidden-3";
    let open = Open { end: true, headers: headers.headers(), ..Open::new(b"GET", path) };
    let mut stream = lane.handle.open(&open).unwrap();
    // The probe with an empty path is a connection without a request.
    let mut connection = loop {
        let mut connection = upstream.accept().await;
        let mut first = [0];
        if within(connection.socket.peek(&mut first)).await.unwrap() > 0 {
            assert!(connection.head().await.contains(trace));
            break connection;
        }
    };
    connection.write("HTTP/1.1 418 x\r\nContent-Length: 0\r\n\r\n").await;
    assert_eq!(head(&mut stream).await.status, 418);
    kill_process(Pid::from_raw(child.id().unwrap() as i32).unwrap(), Signal::TERM).unwrap();
    assert_eq!(within(child.wait()).await.unwrap().code(), Some(0));
    let mut text = String::new();
    log.reopen().unwrap().read_to_string(&mut text).unwrap();
    let line = text.lines().find(|line| line.contains("A stream ended.")).unwrap();
    for part in ["c1", "GET", "418", trace, "r-1", "upstream"] {
        assert!(line.contains(part), "{part}: {line}");
    }
    assert!(!text.contains("secret-token") && !text.contains("hidden-"), "{text}");
}

#[tokio::test]
async fn an_agent_has_one_worker_thread_unless_more_are_asked_for() {
    let (gateway, token) = (Gateway::new().await, file("t"));
    let url = format!("ws://127.0.0.1:{}", gateway.port);
    let arguments = ["--gateway", &url, "--upstream", "http://127.0.0.1:1", "--cluster", "c1"];
    for (threads, expected) in [(&[][..], 1), (&["--threads", "3"], 3)] {
        let child = program(&arguments)
            .args(["--token-file", token.path().to_str().unwrap()])
            .args(threads)
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        // All workers are there before the agent dials, beside the first thread of the process.
        let _handshake = gateway.handshake().await;
        let threads = std::fs::read_dir(format!("/proc/{}/task", child.id().unwrap())).unwrap();
        assert_eq!(threads.count(), 1 + expected);
    }
}

#[tokio::test]
async fn a_setting_that_is_missing_or_wrong_ends_with_78() {
    let token = file("t");
    let token = token.path().to_str().unwrap();
    let upstream = ["--upstream", "http://127.0.0.1:1", "--cluster", "c1", "--token-file", token];
    for (arguments, problem) in [
        (&[][..], "gateway: is missing"),
        (&["--gateway", "ws://192.0.2.1"], "gateway: ws:// is not encrypted"),
        (&["--gateway", "https://g"], "gateway: must be wss://HOST[:PORT]"),
        (&["--threads", "1025"], "threads: must be at most 1024"),
        (&["--gateway", "wss://g", "--ca-file", "/does/not/exist"], "ca_file: /does/not/exist"),
        (&["--gateway", "wss://g", "--allow-paths", "api"], "allow_paths: \"api\" does not begin"),
        (&["--gateway", "wss://g", "--upstream-key", "k"], "upstream_certificate: is missing"),
    ] {
        let output = program(arguments).args(upstream).output().await.unwrap();
        let text = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(78), "{text}");
        assert!(text.contains(problem), "{text}");
    }
    let output = program(&["--token", "t"]).output().await.unwrap();
    assert_eq!(output.status.code(), Some(64));
}
