//! Answers that are compressed on their way to the gateway.

use std::io::Read;

use flate2::read::{GzDecoder, MultiGzDecoder};
use wsproxy_conn::lane::Received;
use wsproxy_proto::tunnel::frame::Open;

use crate::support::{Bench, block, head, lines, read_all, within};

#[tokio::test]
async fn a_large_answer_of_text_is_compressed_once() {
    let bench = Bench::with(|settings| settings.compress = true).await;
    let headers = block(&[("accept-encoding", "gzip, br")]);
    let open = Open { end: true, headers: headers.headers(), ..Open::new(b"GET", b"/") };
    let body = "{\"a\":1}\n".repeat(10_000);
    let head_of = |more: &str| {
        let length = body.len();
        format!(
            "HTTP/1.1 200 x\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n{more}\r\n"
        )
    };
    let mut stream = bench.open(&open);
    let (_, mut upstream) = bench.upstream.request().await;
    upstream.write(&head_of("ETag: \"1\"\r\nConnection: close\r\n")).await;
    upstream.write(&body).await;
    let answer = lines(&head(&mut stream).await.headers);
    for line in ["content-encoding: gzip", "vary: Accept-Encoding", "etag: W/\"1\""] {
        assert!(answer.iter().any(|given| given == line), "{answer:?}");
    }
    assert!(!answer.iter().any(|line| line.starts_with("content-length")));
    let compressed = read_all(&mut stream).await.unwrap().0;
    assert!(compressed.len() < body.len() / 20);
    let mut text = String::new();
    GzDecoder::new(&compressed[..]).read_to_string(&mut text).unwrap();
    assert_eq!(text, body);

    let long = Open { long: true, ..open };
    for (open, more) in [(open, "Content-Encoding: br\r\n"), (long, "")] {
        let mut stream = bench.open(&open);
        let (_, mut upstream) = bench.upstream.request().await;
        upstream.write(&head_of(&format!("{more}Connection: close\r\n"))).await;
        upstream.write(&body).await;
        head(&mut stream).await;
        assert_eq!(read_all(&mut stream).await.unwrap().0, body.as_bytes());
    }
}

#[tokio::test]
async fn a_compressed_piece_waits_for_no_later_one() {
    let bench = Bench::with(|settings| settings.compress = true).await;
    let headers = block(&[("accept-encoding", "gzip")]);
    let mut stream =
        bench.open(&Open { end: true, headers: headers.headers(), ..Open::new(b"GET", b"/") });
    let (_, mut upstream) = bench.upstream.request().await;
    upstream
        .write("HTTP/1.1 200 x\r\nContent-Type: text/plain\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nfirst\r\n")
        .await;
    head(&mut stream).await;
    let mut seen = Vec::new();
    let mut text = vec![0; 5];
    while MultiGzDecoder::new(&seen[..]).read_exact(&mut text).is_err() {
        let Received::Data(bytes) = within(stream.answer.read()).await.unwrap() else { panic!() };
        seen.extend_from_slice(&bytes);
    }
    assert_eq!(text, b"first");
    drop(upstream);
    // A body that breaks has no end of gzip, and no clean end of the stream.
    read_all(&mut stream).await.unwrap_err();
}
