//! Bodies in both directions: streamed, broken off, cancelled.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use tokio::sync::mpsc;
use wsproxy_conn::lane::{AcceptedStream, Received};
use wsproxy_proto::tunnel::{
    code::Code,
    event::End,
    frame::{Head, Reset, Source},
    headers::{HeaderBlock, Headers},
};

use crate::support::{
    cluster_agent::{ClusterAgent, answer, config, head, read_body, send_head},
    eventually,
    gateway::TestInstance,
    raw::Raw,
    soon,
};

/// Sends each body back, piece by piece.
async fn echo(mut stream: AcceptedStream) {
    send_head(&mut stream, 200, false, &[]);
    loop {
        match stream.body.read().await {
            Ok(Received::Data(bytes)) => stream.answer.write(bytes).await.unwrap(),
            Ok(_) => return stream.answer.finish().unwrap(),
            Err(_) => return,
        }
    }
}

#[tokio::test]
async fn bodies_stream_in_both_directions_at_once() {
    let gateway = TestInstance::start(config(None)).await;
    let _agent = ClusterAgent::start(gateway.address(), echo).await;
    let mut raw = Raw::connect(gateway.address()).await;
    raw.write(head("POST", "/echo", "Transfer-Encoding: chunked\r\n").as_bytes()).await;
    for word in ["one", "two"] {
        raw.write(format!("3\r\n{word}\r\n").as_bytes()).await;
        // The answer comes while the request is not whole.
        raw.read_until(word).await;
    }
    raw.write(b"0\r\n\r\n").await;
    assert!(raw.read_until("\r\n0\r\n\r\n").await.contains("transfer-encoding: chunked"));
    gateway.drain().await;
}

#[tokio::test]
async fn a_large_body_comes_whole() {
    let gateway = TestInstance::start(config(None)).await;
    let _agent = ClusterAgent::start(gateway.address(), |mut stream| async move {
        let body = read_body(&mut stream).await;
        let sum: u64 = body.iter().map(|byte| u64::from(*byte)).sum();
        answer(stream, 200, &format!("{} {sum}", body.len())).await;
    })
    .await;
    let body: Vec<u8> = (0..3_000_000_u32).map(|at| (at % 251) as u8).collect();
    let sum: u64 = body.iter().map(|byte| u64::from(*byte)).sum();
    let mut raw = Raw::connect(gateway.address()).await;
    let length = format!("Content-Length: {}\r\n", body.len());
    raw.write(head("PUT", "/", &length).as_bytes()).await;
    raw.write(&body).await;
    assert_eq!(raw.response().await.body, format!("3000000 {sum}"));
    // The connection is kept.
    raw.write(head("PUT", "/", "Content-Length: 1\r\n").as_bytes()).await;
    raw.write(b"\x05").await;
    assert_eq!(raw.response().await.body, "1 5");
    gateway.drain().await;
}

/// Requests of an agent that tells the end of each stream.
fn ends() -> (
    impl Fn(AcceptedStream) -> futures_util::future::BoxFuture<'static, ()> + Send + Sync,
    mpsc::Receiver<End>,
) {
    let (sender, receiver) = mpsc::channel(16);
    let sender = Arc::new(sender);
    let tell = move |mut stream: AcceptedStream| {
        let sender = Arc::clone(&sender);
        let future: futures_util::future::BoxFuture<'static, ()> = Box::pin(async move {
            if &stream.request.path[..] == b"/endless" {
                send_head(&mut stream, 200, false, &[]);
                let piece = Bytes::from(vec![b'x'; 1000]);
                while stream.answer.write(piece.clone()).await.is_ok() {}
            } else if &stream.request.path[..] == b"/begun" {
                send_head(&mut stream, 200, false, &[]);
                let _ = stream.answer.write(Bytes::from_static(b"begun")).await;
            }
            let _ = sender.send(stream.answer.ended().await).await;
        });
        future
    };
    (tell, receiver)
}

#[tokio::test]
async fn a_client_that_leaves_cancels_its_request_in_every_state() {
    let gateway = TestInstance::start(config(None)).await;
    let (tell, mut ended) = ends();
    let agent = ClusterAgent::start(gateway.address(), tell).await;
    let body = "Content-Length: 1000000\r\n";
    let expect = "Content-Length: 5\r\nExpect: 100-continue\r\n";
    for (name, path, headers, sent, read) in [
        ("waiting for the head", "/", "", 0, ""),
        ("waiting with bytes behind it", "/", "Connection: upgrade\r\nUpgrade: x\r\n", 3, ""),
        ("waiting for credit", "/", body, 100_000, ""),
        ("waiting for more of the body", "/", body, 10, ""),
        ("waiting for 100", "/", expect, 0, ""),
        ("reading", "/begun", "", 0, "begun"),
        ("stalled", "/endless", "", 0, "200 OK"),
    ] {
        for resets in [false, true] {
            let mut raw = Raw::narrow(gateway.address()).await;
            raw.write(head("POST", path, headers).as_bytes()).await;
            let streams = || agent.lane.streams() > 0;
            eventually("the stream is open", streams).await;
            let sending = vec![b'y'; sent];
            let _ = tokio::time::timeout(Duration::from_millis(100), async {
                raw.write(&sending).await;
            })
            .await;
            raw.read_until(read).await;
            if resets {
                raw.reset()
            } else {
                drop(raw)
            }
            let end = soon(name, ended.recv()).await.unwrap();
            assert!(
                matches!(&end, End::Reset(reset) if reset.code == Code::Cancelled),
                "{name} {end:?}"
            );
            eventually("nothing is left", || agent.lane.streams() == 0).await;
        }
    }
    gateway.drain().await;
}

#[tokio::test]
async fn a_broken_answer_never_ends_cleanly() {
    let gateway = TestInstance::start(config(None)).await;
    let _agent = ClusterAgent::start(gateway.address(), |mut stream| async move {
        let length = [("content-length", "100")];
        let is_plain = &stream.request.path[..] == b"/length";
        send_head(&mut stream, 200, false, if is_plain { &length } else { &[] });
        stream.answer.write(Bytes::from_static(b"part")).await.unwrap();
        // The part must be on its way before the reset.
        tokio::time::sleep(Duration::from_millis(20)).await;
        stream.answer.reset(&Reset::new(Code::UpstreamReset));
    })
    .await;
    for (path, version, is_reset) in [
        ("/chunked", "HTTP/1.1", false),
        ("/length", "HTTP/1.1", false),
        ("/close", "HTTP/1.0", true),
    ] {
        let mut raw = Raw::connect(gateway.address()).await;
        raw.write(head("GET", path, "").replace("HTTP/1.1", version).as_bytes()).await;
        let text = raw.read_until("part").await;
        assert!(text.contains(" 200 "), "{text}");
        let last = loop {
            let mut buffer = [0; 100];
            match soon("the end", tokio::io::AsyncReadExt::read(&mut raw.socket, &mut buffer)).await
            {
                Ok(0) => break Ok(()),
                Ok(count) => assert!(!buffer[..count].contains(&b'0'), "{path} ends cleanly"),
                Err(error) => break Err(error.kind()),
            }
        };
        assert_eq!(last.is_err(), is_reset, "{path} {last:?}");
    }
    gateway.drain().await;
}

#[tokio::test]
async fn a_lost_lane_breaks_answers_and_refuses_heads() {
    let gateway = TestInstance::start(config(None)).await;
    let (tell, _ended) = ends();
    let agent = ClusterAgent::start(gateway.address(), tell).await;
    let mut begun = Raw::connect(gateway.address()).await;
    begun.write(head("GET", "/begun", "").as_bytes()).await;
    begun.read_until("begun").await;
    let mut waiting = Raw::connect(gateway.address()).await;
    waiting.write(head("POST", "/", "").as_bytes()).await;
    eventually("both are open", || agent.lane.streams() == 2).await;
    agent.cut();
    let answer = waiting.response().await;
    assert_eq!((answer.status, answer.header("x-wsproxy-error")), (502, "lane_lost"));
    assert_eq!(answer.json()["error"]["retryable"], false);
    begun.end().await;
    assert!(!String::from_utf8_lossy(begun.rest()).contains("0\r\n\r\n"));
    gateway.drain().await;
}

#[tokio::test]
async fn heads_without_bodies_keep_their_length() {
    let gateway = TestInstance::start(config(None)).await;
    let _agent = ClusterAgent::start(gateway.address(), |mut stream| async move {
        let status = match &stream.request.path[..] {
            b"/204" => 204,
            b"/304" => 304,
            _ => 200,
        };
        let length = [("content-length", "1234"), ("etag", "\"a\"")];
        send_head(&mut stream, status, true, if status == 204 { &length[1..] } else { &length });
    })
    .await;
    let mut raw = Raw::connect(gateway.address()).await;
    for (method, path, length) in
        [("HEAD", "/", "1234"), ("GET", "/304", ""), ("GET", "/204", ""), ("HEAD", "/a", "1234")]
    {
        raw.write(head(method, path, "").as_bytes()).await;
        let text = raw.read_until("\r\n\r\n").await;
        raw.take();
        let found = text.lines().find_map(|line| line.strip_prefix("content-length: "));
        assert_eq!(found.unwrap_or_default(), length, "{method} {path} {text}");
    }
    gateway.drain().await;
}

#[tokio::test]
async fn a_body_is_asked_for_only_when_the_upstream_wants_it() {
    let gateway = TestInstance::start(config(None)).await;
    let _agent = ClusterAgent::start(gateway.address(), |mut stream| async move {
        assert!(stream.request.expect);
        if &stream.request.path[..] == b"/refused" {
            return answer(stream, 417, "no").await;
        }
        if &stream.request.path[..] == b"/granted" {
            let (source, headers) = (Source::Upstream, Headers::EMPTY);
            stream.answer.send_head(&Head { end: false, status: 100, source, headers }).unwrap();
        }
        let body = read_body(&mut stream).await;
        answer(stream, 200, &String::from_utf8(body).unwrap()).await;
    })
    .await;
    let expect = "Content-Length: 4\r\nExpect: 100-continue\r\n";
    for path in ["/granted", "/silent"] {
        let mut raw = Raw::connect(gateway.address()).await;
        raw.write(head("POST", path, expect).as_bytes()).await;
        raw.read_until("HTTP/1.1 100 Continue\r\n\r\n").await;
        raw.take();
        raw.write(b"body").await;
        assert_eq!(raw.response().await.body, "body");
    }
    let mut raw = Raw::connect(gateway.address()).await;
    raw.write(head("POST", "/refused", expect).as_bytes()).await;
    assert_eq!(raw.response().await.status, 417);
    gateway.drain().await;
}

#[tokio::test]
async fn an_early_answer_ends_the_upload() {
    let gateway = TestInstance::start(config(None)).await;
    let _agent = ClusterAgent::start(gateway.address(), |stream| async move {
        // Dropping the body stops its sender.
        let AcceptedStream { body, answer: mut writer, .. } = stream;
        drop(body);
        let (source, headers) = (Source::Upstream, Headers::EMPTY);
        writer.send_head(&Head { end: false, status: 413, source, headers }).unwrap();
        writer.write(Bytes::from_static(b"too much")).await.unwrap();
        writer.finish().unwrap();
    })
    .await;
    let mut raw = Raw::connect(gateway.address()).await;
    raw.write(head("POST", "/", "Content-Length: 10000000\r\n").as_bytes()).await;
    raw.write(&[b'x'; 1000]).await;
    let text = raw.read_until("too much").await;
    assert!(text.contains(" 413 "), "{text}");
    gateway.drain().await;
}

#[tokio::test]
async fn trailers_pass_where_they_are_asked_for() {
    let gateway = TestInstance::start(config(None)).await;
    let _agent = ClusterAgent::start(gateway.address(), |mut stream| async move {
        let mut seen = String::new();
        loop {
            match stream.body.read().await.unwrap() {
                Received::Data(_) => {}
                Received::Trailers(block) => {
                    seen = crate::support::cluster_agent::lines(block.headers());
                    break;
                }
                Received::End => break,
            }
        }
        send_head(&mut stream, 200, false, &[("trailer", "x-sum")]);
        stream.answer.write(Bytes::from(format!("[{}]", seen.trim()))).await.unwrap();
        let mut block = HeaderBlock::new();
        block.push(b"x-sum", b"7").unwrap();
        stream.answer.finish_with_trailers(block.headers()).unwrap();
    })
    .await;
    let chunked = "Transfer-Encoding: chunked\r\nTrailer: x-in\r\n";
    for (te, sees) in [("TE: trailers\r\nConnection: te\r\n", true), ("", false)] {
        let mut raw = Raw::connect(gateway.address()).await;
        raw.write(head("POST", "/", &format!("{chunked}{te}")).as_bytes()).await;
        raw.write(b"1\r\na\r\n0\r\nX-In: 5\r\n\r\n").await;
        let text = raw.read_until("\r\n0\r\n").await;
        assert_eq!(text.contains("[x-in: 5]"), sees, "{text}");
        let text = raw.read_until(if sees { "x-sum: 7\r\n\r\n" } else { "0\r\n\r\n" }).await;
        assert_eq!(text.contains("x-sum: 7"), sees, "{text}");
    }
    gateway.drain().await;
}

#[tokio::test]
async fn a_body_above_the_limit_is_refused() {
    let mut config = config(None);
    config.tunnel.body_max = 1000;
    let gateway = TestInstance::start(config).await;
    let (tell, _ended) = ends();
    let agent = ClusterAgent::start(gateway.address(), tell).await;
    let mut raw = Raw::connect(gateway.address()).await;
    raw.write(head("POST", "/", "Content-Length: 1001\r\n").as_bytes()).await;
    assert_eq!(raw.response().await.status, 413);
    let mut raw = Raw::connect(gateway.address()).await;
    raw.write(head("POST", "/", "Transfer-Encoding: chunked\r\n").as_bytes()).await;
    raw.write(format!("3e9\r\n{}\r\n", "x".repeat(1001)).as_bytes()).await;
    let answer = raw.response().await;
    assert_eq!((answer.status, answer.header("connection")), (413, "close"));
    eventually("nothing is left", || agent.lane.streams() == 0).await;
    gateway.drain().await;
}
