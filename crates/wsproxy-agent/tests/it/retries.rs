//! Connections that the upstream closed between two requests.

use wsproxy_conn::lane::OpenedStream;
use wsproxy_proto::tunnel::{code::Code, frame::Open};

use crate::{
    support::{Bench, block, code, head, post, read_all},
    upstream::Request,
};

/// Makes a connection that the agent will use again.
async fn kept(bench: &Bench) -> Request {
    let mut stream = bench.get("/first");
    let (_, mut upstream) = bench.upstream.request().await;
    upstream.write("HTTP/1.1 200 x\r\nContent-Length: 1\r\n\r\n.").await;
    head(&mut stream).await;
    read_all(&mut stream).await.unwrap();
    // The connection is kept a moment after the last byte.
    tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    upstream
}

async fn is_answered(stream: &mut OpenedStream, mut upstream: Request) {
    upstream.write("HTTP/1.1 200 x\r\nContent-Length: 0\r\n\r\n").await;
    assert_eq!(head(stream).await.status, 200);
}

#[tokio::test]
async fn a_safe_request_takes_a_new_connection_once() {
    let bench = Bench::new().await;
    let mut old = kept(&bench).await;
    let mut stream = bench.get("/again");
    assert!(old.head().await.starts_with("get /again "));
    drop(old);
    let (request, upstream) = bench.upstream.request().await;
    assert!(request.starts_with("get /again "));
    is_answered(&mut stream, upstream).await;

    let mut old = kept_by_same(&bench).await;
    let mut stream = bench.get("/twice");
    old.head().await;
    drop(old);
    let (_, upstream) = bench.upstream.request().await;
    drop(upstream);
    assert_eq!(code(&mut stream).await, Code::UpstreamReset);
}

/// As [`kept`], where a connection may be kept already: it is used and closed first.
async fn kept_by_same(bench: &Bench) -> Request {
    let mut stream = bench.open(&Open { end: true, retried: true, ..Open::new(b"GET", b"/fresh") });
    let (_, mut upstream) = bench.upstream.request().await;
    upstream.write("HTTP/1.1 200 x\r\nContent-Length: 1\r\n\r\n.").await;
    head(&mut stream).await;
    read_all(&mut stream).await.unwrap();
    tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    upstream
}

#[tokio::test]
async fn a_post_that_was_written_is_not_sent_again() {
    let bench = Bench::new().await;
    let mut old = kept(&bench).await;
    let headers = block(&[("content-length", "0")]);
    let mut stream = bench.open(&Open { end: true, ..post("/once", &headers) });
    assert!(old.head().await.starts_with("post /once "));
    drop(old);
    assert_eq!(code(&mut stream).await, Code::UpstreamReset);
}

#[tokio::test]
async fn a_post_goes_to_a_new_connection_where_the_old_one_is_closed() {
    let bench = Bench::new().await;
    drop(kept(&bench).await);
    tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    let headers = block(&[("content-length", "0")]);
    let mut stream = bench.open(&Open { end: true, ..post("/once", &headers) });
    let (request, upstream) = bench.upstream.request().await;
    assert!(request.starts_with("post /once "));
    is_answered(&mut stream, upstream).await;
}

#[tokio::test]
async fn an_answer_that_began_is_not_asked_for_again() {
    let bench = Bench::new().await;
    let mut old = kept(&bench).await;
    let mut stream = bench.get("/again");
    old.head().await;
    old.write("HTTP/1.1 2").await;
    drop(old);
    assert_eq!(code(&mut stream).await, Code::UpstreamReset);
}

#[tokio::test]
async fn a_request_that_the_gateway_repeats_takes_a_new_connection() {
    let bench = Bench::new().await;
    let _old = kept(&bench).await;
    let mut stream = bench.open(&Open { end: true, retried: true, ..Open::new(b"GET", b"/again") });
    let (_, upstream) = bench.upstream.request().await;
    is_answered(&mut stream, upstream).await;
}
