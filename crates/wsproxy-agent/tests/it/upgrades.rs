//! Upgraded connections.

use bytes::Bytes;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use wsproxy_conn::lane::Received;
use wsproxy_proto::tunnel::{code::Code, event::End, frame::Open};

use crate::support::{Bench, block, head, lines, read_all, within};

fn open(bench: &Bench) -> wsproxy_conn::lane::OpenedStream {
    let headers = block(&[("upgrade", "SPDY/3.1"), ("x-stream-protocol-version", "v4")]);
    bench.open(&Open {
        upgrade: true,
        headers: headers.headers(),
        ..Open::new(b"POST", b"/exec?x=1")
    })
}

#[tokio::test]
async fn raw_bytes_pass_both_ways_with_early_ones_and_half_close() {
    let bench = Bench::new().await;
    let mut stream = open(&bench);
    let (request, mut upstream) = bench.upstream.request().await;
    for line in ["connection: upgrade", "upgrade: spdy/3.1", "content-length: 0"] {
        assert!(request.contains(&format!("\r\n{line}\r\n")), "{request}");
    }
    upstream.write(&format!("{SWITCHED}early")).await;
    let answer = head(&mut stream).await;
    assert_eq!((answer.status, answer.end), (101, false));
    assert_eq!(lines(&answer.headers), ["upgrade: SPDY/3.1"]);
    assert_eq!(within(stream.answer.read()).await.unwrap(), Received::Data("early".into()));
    within(stream.request.write(Bytes::from_static(b"up"))).await.unwrap();
    upstream.expect("up").await;
    upstream.write("down").await;
    assert_eq!(within(stream.answer.read()).await.unwrap(), Received::Data("down".into()));
    stream.request.finish().unwrap();
    assert_eq!(within(upstream.socket.read(&mut [0])).await.unwrap(), 0);
    upstream.write("last").await;
    upstream.socket.shutdown().await.unwrap();
    assert_eq!(read_all(&mut stream).await.unwrap().0, b"last");
    assert_eq!(within(stream.request.ended()).await, End::Complete);
}

#[tokio::test]
async fn the_upstream_may_end_its_direction_first() {
    let bench = Bench::new().await;
    let mut stream = open(&bench);
    let (_, mut upstream) = bench.upstream.request().await;
    upstream.write(SWITCHED).await;
    upstream.socket.shutdown().await.unwrap();
    head(&mut stream).await;
    assert_eq!(read_all(&mut stream).await.unwrap().0, b"");
    within(stream.request.write(Bytes::from_static(b"still here"))).await.unwrap();
    upstream.expect("still here").await;
    stream.request.finish().unwrap();
    assert_eq!(within(stream.request.ended()).await, End::Complete);
}

#[tokio::test]
async fn an_upgrade_that_is_refused_is_an_answer() {
    let bench = Bench::new().await;
    let mut stream = open(&bench);
    let (_, mut upstream) = bench.upstream.request().await;
    upstream.write("HTTP/1.1 403 x\r\nContent-Length: 2\r\n\r\nno").await;
    assert_eq!(head(&mut stream).await.status, 403);
    assert_eq!(read_all(&mut stream).await.unwrap().0, b"no");
}

#[tokio::test]
async fn either_side_that_breaks_ends_the_other_one() {
    let bench = Bench::new().await;
    let mut stream = open(&bench);
    let (_, mut upstream) = bench.upstream.request().await;
    upstream.write(SWITCHED).await;
    head(&mut stream).await;
    upstream.reset();
    let End::Reset(reset) = read_all(&mut stream).await.unwrap_err() else { panic!() };
    assert_eq!((reset.code, reset.head_sent), (Code::UpstreamReset, true));

    let mut stream = open(&bench);
    let (_, mut upstream) = bench.upstream.request().await;
    upstream.write(SWITCHED).await;
    head(&mut stream).await;
    drop(stream);
    upstream.is_closed().await;
}

const SWITCHED: &str = "HTTP/1.1 101 x\r\nConnection: Upgrade\r\nUpgrade: SPDY/3.1\r\n\r\n";
