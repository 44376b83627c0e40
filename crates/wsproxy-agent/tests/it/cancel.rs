//! Requests that are given up: the upstream's connection is closed.

use std::time::{Duration, Instant};

use bytes::Bytes;
use wsproxy_proto::tunnel::{code::Code, frame::Open};

use crate::{
    metrics::page,
    support::{Bench, block, code, head, listen, post, until, within},
};

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
    let _ = tokio::time::timeout(Duration::from_millis(200), write).await;
    drop(stalled);
    upstream.is_closed().await;
}

#[tokio::test]
async fn a_head_that_comes_too_late_is_a_timeout() {
    let bench = Bench::new().await;
    let open = Open { end: true, head_ms: 50, ..Open::new(b"GET", b"/") };
    let mut stream = bench.open(&open);
    let (_, mut upstream) = bench.upstream.request().await;
    assert_eq!(code(&mut stream).await, Code::UpstreamTimeout);
    upstream.is_closed().await;
}

#[tokio::test]
async fn a_slow_upload_is_no_timeout() {
    let bench = Bench::new().await;
    let headers = block(&[]);
    let mut stream = bench.open(&Open { head_ms: 300, ..post("/", &headers) });
    let (_, mut upstream) = bench.upstream.request().await;
    for pause in [500, 100, 100, 100, 100] {
        tokio::time::sleep(Duration::from_millis(pause)).await;
        within(stream.request.write(Bytes::from_static(b"some"))).await.unwrap();
        upstream.expect("4\r\nsome\r\n").await;
    }
    stream.request.finish().unwrap();
    upstream.expect("0\r\n\r\n").await;
    // The time for the head begins here.
    let ended = Instant::now();
    assert_eq!(code(&mut stream).await, Code::UpstreamTimeout);
    assert!(ended.elapsed() >= Duration::from_millis(250), "{:?}", ended.elapsed());
}

#[tokio::test]
async fn an_upstream_that_reads_no_more_is_a_timeout() {
    let bench = Bench::new().await;
    let headers = block(&[]);
    let mut stream = bench.open(&Open { head_ms: 200, ..post("/", &headers) });
    let _upstream = bench.upstream.request().await;
    let piece = Bytes::from(vec![0; 64 << 10]);
    let sent = async { while stream.request.write(piece.clone()).await.is_ok() {} };
    within(sent).await;
    assert_eq!(code(&mut stream).await, Code::UpstreamTimeout);
}

#[tokio::test]
async fn an_upstream_that_never_asks_for_the_body_is_a_timeout() {
    let bench = Bench::new().await;
    let headers = block(&[("expect", "100-continue")]);
    let open = Open { expect: true, head_ms: 100, ..post("/", &headers) };
    let mut unasked = bench.open(&open);
    let (_, mut upstream) = bench.upstream.request().await;
    assert_eq!(code(&mut unasked).await, Code::UpstreamTimeout);
    upstream.is_closed().await;

    // Once the upstream has asked, the client is awaited.
    let mut stream = bench.open(&open);
    let (_, mut upstream) = bench.upstream.request().await;
    upstream.write("HTTP/1.1 100 Continue\r\n\r\n").await;
    assert_eq!(head(&mut stream).await.status, 100);
    tokio::time::sleep(Duration::from_millis(400)).await;
    stream.request.finish().unwrap();
    upstream.write("HTTP/1.1 204 x\r\n\r\n").await;
    assert_eq!(head(&mut stream).await.status, 204);
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

#[tokio::test]
async fn streams_that_end_anyhow_leave_nothing() {
    let port = listen().await.local_addr().unwrap().port();
    let bench = Bench::with(|settings| settings.metrics_port = Some(port)).await;
    let Bench { lane, upstream, agent: _agent, .. } = bench;
    tokio::spawn(async move {
        for number in 0_u32.. {
            let mut request = upstream.accept().await;
            tokio::spawn(async move {
                // Connections that wait, break in the head, break in the body, and go on.
                loop {
                    request.head().await;
                    match number % 4 {
                        0 => std::future::pending().await,
                        1 => break,
                        2 => {
                            request.write("HTTP/1.1 200 x\r\nContent-Length: 9\r\n\r\npart").await;
                            break;
                        }
                        _ => request.write("HTTP/1.1 200 x\r\nContent-Length: 2\r\n\r\nok").await,
                    }
                }
            });
        }
    });
    let headers = block(&[("content-length", "40000")]);
    let clients: Vec<_> = (0..400_u64)
        .map(|number| {
            let (handle, headers) = (lane.handle.clone(), headers.clone());
            tokio::spawn(async move {
                let mut stream = match number % 2 {
                    0 => handle.open(&post("/", &headers)).unwrap(),
                    _ => handle.open(&Open { end: true, ..Open::new(b"GET", b"/") }).unwrap(),
                };
                let used = async {
                    let _ = stream.request.write(Bytes::from(vec![0; 40_000])).await;
                    let _ = stream.answer.head().await;
                    let _ = stream.answer.read().await;
                };
                let _ = tokio::time::timeout(Duration::from_millis(number % 40), used).await;
            })
        })
        .collect();
    for client in clients {
        client.await.unwrap();
    }
    until("no stream is left at the gateway", || lane.handle.streams() == 0).await;
    let left = async {
        while !page(port).await.contains("\nwsproxy_agent_streams 0\n") {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    within(left).await;
    assert!(lane.handle.status().end.is_none());
}
