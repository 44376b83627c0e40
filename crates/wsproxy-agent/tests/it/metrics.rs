//! Metrics of the agent on a port of their own.

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};
use wsproxy_proto::tunnel::code::Code;

use crate::support::{Bench, code, head, listen, read_all, within};

async fn ask(port: u16, path: &str) -> String {
    let mut socket = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\n\r\n");
    socket.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    within(socket.read_to_string(&mut answer)).await.unwrap();
    answer
}

/// Returns the page of an agent's metrics.
pub(crate) async fn page(port: u16) -> String {
    ask(port, "/metrics").await
}

#[tokio::test]
async fn requests_and_lanes_are_counted() {
    let port = listen().await.local_addr().unwrap().port();
    let bench = Bench::with(|settings| {
        settings.metrics_port = Some(port);
        settings.deny_paths = vec!["/denied".into()];
    })
    .await;
    let mut stream = bench.get("/");
    let (_, mut upstream) = bench.upstream.request().await;
    upstream.write("HTTP/1.1 404 x\r\nContent-Length: 5\r\n\r\nempty").await;
    head(&mut stream).await;
    read_all(&mut stream).await.unwrap();
    assert_eq!(code(&mut bench.get("/denied")).await, Code::BadPath);
    let whole = async {
        loop {
            let page = page(port).await;
            // The counters come a moment after the ends of the streams.
            if page.contains("\nwsproxy_agent_streams 0\n") {
                return page;
            }
        }
    };
    let page = within(whole).await;
    for line in [
        "wsproxy_agent_requests_total{code=\"4xx\"} 1",
        "wsproxy_agent_requests_total{code=\"bad_path\"} 1",
        "wsproxy_agent_bytes_total{direction=\"down\"} 5",
        "wsproxy_agent_lanes_total 1",
        "wsproxy_agent_dials_failed_total 0",
        "# TYPE wsproxy_agent_upstream_healthy gauge",
    ] {
        assert!(page.contains(&format!("\n{line}\n")), "{line}: {page}");
    }
    assert!(ask(port, "/").await.starts_with("HTTP/1.1 404 "));
}
