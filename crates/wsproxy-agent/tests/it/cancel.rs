//! Requests that are given up: the upstream's connection is closed.

use bytes::Bytes;
use wsproxy_proto::tunnel::{code::Code, frame::Open};

use crate::support::{Bench, block, code, head, post, until, within};

#[tokio::test]
async fn a_client_that_leaves_closes_the_upstream() {
    let bench = Bench::new().await;
    let waiting = bench.get("/waiting");
    let (_, mut upstream) = bench.upstream.request().await;
    drop(waiting);
    upstream.is_closed().await;

    let mut streaming = bench.get("/streaming");
    let (_, mut upstream) = bench.upstream.request().await;
    upstream.write("HTTP/1.1 200 x\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n").await;
    head(&mut streaming).await;
    drop(streaming);
    upstream.is_closed().await;

    let headers = block(&[("content-length", "100")]);
    let mut sending = bench.open(&post("/sending", &headers));
    let (_, mut upstream) = bench.upstream.request().await;
    within(sending.request.write(Bytes::from_static(b"part"))).await.unwrap();
    upstream.expect("part").await;
    drop(sending);
    upstream.is_closed().await;
    until("no stream is left", || bench.lane.handle.streams() == 0).await;
}

#[tokio::test]
async fn a_client_that_stalls_and_leaves_closes_the_upstream() {
    let bench = Bench::new().await;
    let mut stalled = bench.get("/");
    let (_, mut upstream) = bench.upstream.request().await;
    upstream.write("HTTP/1.1 200 x\r\nContent-Length: 100000000\r\n\r\n").await;
    head(&mut stalled).await;
    let piece = vec![0; 1 << 20];
    let write = tokio::io::AsyncWriteExt::write_all(&mut upstream.socket, &piece);
    let _ = tokio::time::timeout(std::time::Duration::from_millis(200), write).await;
    drop(stalled);
    upstream.is_closed().await;
}

#[tokio::test]
async fn a_head_that_comes_too_late_is_a_timeout() {
    let bench = Bench::new().await;
    let open = Open { end: true, head_ms: 50, ..Open::new(b"GET", b"/") };
    let mut stream = bench.open(&open);
    let (_, mut upstream) = bench.upstream.request().await;
    assert_eq!(code(&mut stream).await, (Code::UpstreamTimeout, false));
    upstream.is_closed().await;
}

#[tokio::test]
async fn a_lane_that_is_lost_closes_all_upstreams() {
    let bench = Bench::new().await;
    let streams = [bench.get("/1"), bench.get("/2")];
    let mut upstreams = [bench.upstream.request().await.1, bench.upstream.request().await.1];
    bench.lane.task.abort();
    for upstream in &mut upstreams {
        upstream.is_closed().await;
    }
    drop(streams);
}
