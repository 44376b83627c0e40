//! Bodies of requests.

use bytes::Bytes;
use wsproxy_conn::lane::WriteError;
use wsproxy_proto::tunnel::{event::End, frame::Open};

use crate::support::{Bench, block, head, post, read_all, until, within};

#[tokio::test]
async fn a_body_of_known_length_passes_whole() {
    let bench = Bench::new().await;
    let headers = block(&[("content-length", "10")]);
    let mut stream = bench.open(&post("/", &headers));
    let (request, mut upstream) = bench.upstream.request().await;
    assert!(request.contains("\r\ncontent-length: 10\r\n") && !request.contains("chunked"));
    within(stream.request.write(Bytes::from_static(b"0123456789"))).await.unwrap();
    stream.request.finish().unwrap();
    upstream.expect("0123456789").await;
    upstream.write("HTTP/1.1 201 x\r\nContent-Length: 0\r\n\r\n").await;
    let answer = head(&mut stream).await;
    assert_eq!((answer.status, answer.end), (201, true));
    until("the stream ends", || bench.lane.handle.streams() == 0).await;
}

#[tokio::test]
async fn a_body_of_unknown_length_is_chunked_with_trailers() {
    let bench = Bench::new().await;
    for method in ["POST", "GET"] {
        let headers = block(&[("trailer", "x-sum"), ("te", "trailers")]);
        let open = Open { headers: headers.headers(), ..Open::new(method.as_bytes(), b"/") };
        let mut stream = bench.open(&open);
        let (request, mut upstream) = bench.upstream.request().await;
        assert!(request.contains("\r\ntransfer-encoding: chunked\r\n"), "{request}");
        assert!(request.contains("\r\nte: trailers\r\n"), "{request}");
        within(stream.request.write(Bytes::from_static(b"some"))).await.unwrap();
        upstream.expect("4\r\nsome\r\n").await;
        let trailers = block(&[("x-sum", "4")]);
        stream.request.finish_with_trailers(trailers.headers()).unwrap();
        upstream.expect("0\r\nx-sum: 4\r\n\r\n").await;
        upstream.write("HTTP/1.1 200 x\r\nContent-Length: 0\r\nConnection: close\r\n\r\n").await;
        assert_eq!(head(&mut stream).await.status, 200);
    }
}

#[tokio::test]
async fn large_bodies_pass_both_ways_at_once() {
    let bench = Bench::new().await;
    let headers = block(&[]);
    let stream = bench.open(&post("/", &headers));
    let (_, mut upstream) = bench.upstream.request().await;
    const BYTES: usize = 4 << 20;
    let piece = Bytes::from(vec![7; 64 << 10]);
    let wsproxy_conn::lane::OpenedStream { mut request, answer } = stream;
    let sent = tokio::spawn(async move {
        for _ in 0..BYTES / piece.len() {
            request.write(piece.clone()).await.unwrap();
        }
        request.finish().unwrap();
        request
    });
    upstream.write(&format!("HTTP/1.1 200 x\r\nContent-Length: {BYTES}\r\n\r\n")).await;
    let upstream = async {
        let (mut reader, mut writer) = upstream.socket.split();
        let echo = async {
            let piece = vec![8; BYTES];
            tokio::io::AsyncWriteExt::write_all(&mut writer, &piece).await.unwrap();
        };
        let drain = async {
            let mut read = 0;
            let mut buffer = vec![0; 64 << 10];
            while read < BYTES {
                read += tokio::io::AsyncReadExt::read(&mut reader, &mut buffer).await.unwrap();
            }
        };
        tokio::join!(echo, drain);
    };
    let request = sent.await;
    let mut stream = wsproxy_conn::lane::OpenedStream { request: request.unwrap(), answer };
    let read = async {
        head(&mut stream).await;
        read_all(&mut stream).await.unwrap().0.len()
    };
    let ((), read) = within(async { tokio::join!(upstream, read) }).await;
    assert_eq!(read, BYTES);
}

#[tokio::test]
async fn an_early_answer_stops_the_body() {
    let bench = Bench::new().await;
    let headers = block(&[("content-length", "1000000")]);
    let mut stream = bench.open(&post("/", &headers));
    within(stream.request.write(Bytes::from_static(b"some"))).await.unwrap();
    let (_, mut upstream) = bench.upstream.request().await;
    upstream.expect("some").await;
    upstream.write("HTTP/1.1 413 x\r\nContent-Length: 3\r\n\r\nbig").await;
    assert_eq!(head(&mut stream).await.status, 413);
    assert_eq!(read_all(&mut stream).await.unwrap().0, b"big");
    assert_eq!(within(stream.request.gone()).await, WriteError::Stopped);
    upstream.is_closed().await;
    assert_eq!(within(stream.request.ended()).await, End::Complete);
}

#[tokio::test]
async fn an_expectation_is_granted_by_the_upstream() {
    let bench = Bench::new().await;
    let headers = block(&[("expect", "100-continue"), ("content-length", "2")]);
    let mut stream = bench.open(&Open { expect: true, ..post("/", &headers) });
    let (request, mut upstream) = bench.upstream.request().await;
    assert!(request.contains("\r\nexpect: 100-continue\r\n"));
    upstream.write("HTTP/1.1 100 Continue\r\n\r\n").await;
    assert_eq!(head(&mut stream).await.status, 100);
    within(stream.request.write(Bytes::from_static(b"ok"))).await.unwrap();
    stream.request.finish().unwrap();
    upstream.expect("ok").await;
    upstream.write("HTTP/1.1 200 x\r\nContent-Length: 0\r\n\r\n").await;
    assert_eq!(head(&mut stream).await.status, 200);
}

#[tokio::test]
async fn an_expectation_is_refused_by_the_upstream() {
    let bench = Bench::new().await;
    let headers = block(&[("expect", "100-continue"), ("content-length", "2")]);
    let mut stream = bench.open(&Open { expect: true, ..post("/", &headers) });
    let (_, mut upstream) = bench.upstream.request().await;
    upstream.write("HTTP/1.1 417 x\r\nContent-Length: 0\r\n\r\n").await;
    assert_eq!(head(&mut stream).await.status, 417);
    assert_eq!(within(stream.request.gone()).await, WriteError::Stopped);
    upstream.is_closed().await;
}
