//! Heads and bodies of answers.

use wsproxy_proto::tunnel::frame::{Open, Source};

use crate::support::{Bench, block, head, lines, post, read_all, within};

#[tokio::test]
async fn request_and_answer_pass_whole() {
    let bench = Bench::new().await;
    let headers = block(&[("accept", "text/plain"), ("x-forwarded-for", "192.0.2.1")]);
    let open =
        Open { end: true, headers: headers.headers(), ..Open::new(b"GET", b"/a%20b//c?q=1") };
    let mut stream = bench.open(&open);
    let (request, mut upstream) = bench.upstream.request().await;
    assert!(request.starts_with("get /a%20b//c?q=1 http/1.1\r\n"), "{request}");
    for line in ["accept: text/plain", "x-forwarded-for: 192.0.2.1"] {
        assert!(request.contains(&format!("\r\n{line}\r\n")), "{request}");
    }
    assert!(request.contains(&format!("\r\nhost: 127.0.0.1:{}\r\n", bench.upstream.port)));
    assert!(!request.contains("content-length") && !request.contains("transfer-encoding"));
    upstream.write("HTTP/1.1 203 x\r\nContent-Length: 5\r\nX-A: 1\r\nConnection: x-b\r\nX-B: 2\r\n\r\nhello").await;
    let answer = head(&mut stream).await;
    assert_eq!((answer.status, answer.source, answer.end), (203, Source::Upstream, false));
    assert_eq!(lines(&answer.headers), ["content-length: 5", "x-a: 1"]);
    assert_eq!(read_all(&mut stream).await.unwrap().0, b"hello");
}

#[tokio::test]
async fn chunks_pass_as_they_come_with_trailers() {
    let bench = Bench::new().await;
    let mut stream = bench.get("/");
    let (_, mut upstream) = bench.upstream.request().await;
    upstream
        .write("HTTP/1.1 200 x\r\nTransfer-Encoding: chunked\r\nTrailer: X-Sum\r\n\r\n3\r\none\r\n")
        .await;
    assert_eq!(lines(&head(&mut stream).await.headers), ["trailer: X-Sum"]);
    let first = within(stream.answer.read()).await.unwrap();
    assert_eq!(first, wsproxy_conn::lane::Received::Data("one".into()));
    upstream.write("3\r\ntwo\r\n0\r\nX-Sum: 6\r\n\r\n").await;
    let (body, trailers) = read_all(&mut stream).await.unwrap();
    assert_eq!((&body[..], trailers), (&b"two"[..], vec!["x-sum: 6".to_owned()]));
}

#[tokio::test]
async fn answers_without_a_body_end_with_their_head() {
    let bench = Bench::new().await;
    for (method, status) in [("HEAD", 200), ("GET", 204), ("GET", 304)] {
        let mut stream = bench.open(&Open { end: true, ..Open::new(method.as_bytes(), b"/") });
        let (_, mut upstream) = bench.upstream.request().await;
        upstream
            .write(&format!(
                "HTTP/1.1 {status} x\r\nContent-Length: 7\r\nConnection: close\r\n\r\n"
            ))
            .await;
        let answer = head(&mut stream).await;
        assert_eq!((answer.status, answer.end), (status, true));
        assert_eq!(lines(&answer.headers), ["content-length: 7"]);
    }
}

#[tokio::test]
async fn a_body_that_ends_with_its_connection_is_whole() {
    let bench = Bench::new().await;
    let mut stream = bench.get("/");
    let (_, mut upstream) = bench.upstream.request().await;
    upstream.write("HTTP/1.0 200 x\r\n\r\nall of it").await;
    drop(upstream);
    head(&mut stream).await;
    assert_eq!(read_all(&mut stream).await.unwrap().0, b"all of it");
}

#[tokio::test]
async fn requests_share_a_connection_one_after_the_other() {
    let bench = Bench::new().await;
    let mut upstream = None;
    for path in ["/1", "/2", "/3"] {
        let mut stream = bench.get(path);
        if upstream.is_none() {
            upstream = Some(bench.upstream.accept().await);
        }
        let upstream = upstream.as_mut().unwrap();
        assert!(upstream.head().await.starts_with(&format!("get {path} ")));
        upstream.write("HTTP/1.1 200 x\r\nContent-Length: 1\r\n\r\n.").await;
        head(&mut stream).await;
        read_all(&mut stream).await.unwrap();
        // The connection is kept a moment after the last byte.
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn a_length_beside_chunks_is_dropped() {
    let bench = Bench::new().await;
    let headers = block(&[]);
    let mut stream = bench.open(&Open { end: true, ..post("/", &headers) });
    let (request, mut upstream) = bench.upstream.request().await;
    assert!(request.contains("\r\ncontent-length: 0\r\n"), "{request}");
    upstream
        .write("HTTP/1.1 200 x\r\nContent-Length: 99\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\n\r\n")
        .await;
    assert_eq!(lines(&head(&mut stream).await.headers), [""; 0]);
    assert_eq!(read_all(&mut stream).await.unwrap().0, b"a");
}
