//! Upstreams that fail: each has its code, and never a clean end.

use wsproxy_conn::lane::LaneSettings;
use wsproxy_proto::tunnel::{code::Code, event::End};

use crate::{
    gateway::Gateway,
    support::{Agent, Bench, code, config, head, read_all, reset, settings},
    upstream::Upstream,
};

#[tokio::test]
async fn an_upstream_that_does_not_listen_has_its_code() {
    let bench = Bench::new().await;
    let Bench { upstream, .. } = &bench;
    let port = upstream.port;
    let bench = Bench::with(|settings| {
        settings.upstream = Some(format!("http://127.0.0.1:{}", free(port)))
    })
    .await;
    assert_eq!(code(&mut bench.get("/")).await, Code::UpstreamConnect);
}

/// Returns a port on which no process listens, near one that is taken.
fn free(taken: u16) -> u16 {
    let is_free = |port: &u16| std::net::TcpListener::bind(("127.0.0.1", *port)).is_ok();
    (taken - 1000..taken).find(is_free).unwrap()
}

#[tokio::test]
async fn broken_heads_have_their_codes() {
    let bench = Bench::new().await;
    let large = format!("HTTP/1.1 200 x\r\nX-Large: {}\r\n\r\n", "a".repeat(40 << 10));
    for (answer, expected) in [
        ("", Code::UpstreamReset),
        ("HTTP/1.1 200 x\r\nX-Cut: ", Code::UpstreamReset),
        ("SSH-2.0-x\r\n\r\n", Code::UpstreamProtocol),
        ("HTTP/1.1 200 x\r\nContent-Length: x\r\n\r\n", Code::UpstreamProtocol),
        ("HTTP/1.1 101 x\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n", Code::UpstreamProtocol),
        ("HTTP/1.1 200 x\r\nTransfer-Encoding: gzip\r\n\r\n", Code::UpstreamProtocol),
        (&large, Code::HeadTooLarge),
    ] {
        let mut stream = bench.get("/");
        let (_, mut upstream) = bench.upstream.request().await;
        upstream.write(answer).await;
        drop(upstream);
        let reset = reset(&mut stream).await;
        assert_eq!(
            (reset.code, reset.not_dispatched, reset.head_sent),
            (expected, false, false),
            "{answer}"
        );
    }
}

#[tokio::test]
async fn a_head_that_the_gateway_does_not_take_is_too_large() {
    let (gateway, upstream) = (Gateway::new().await, Upstream::new().await);
    let agent = Agent::new(config(&settings(gateway.port, upstream.port)));
    let mut settings = LaneSettings::default();
    settings.protocol.head_bytes_max = 1000;
    let lane = gateway.handshake().await.accept(settings).await;
    let bench = Bench { gateway, lane, upstream, agent };
    let mut stream = bench.get("/");
    let (_, mut upstream) = bench.upstream.request().await;
    upstream.write(&format!("HTTP/1.1 200 x\r\nX-Large: {}\r\n\r\n", "a".repeat(1000))).await;
    assert_eq!(code(&mut stream).await, Code::HeadTooLarge);
}

#[tokio::test]
async fn a_body_that_breaks_never_ends_cleanly() {
    let bench = Bench::new().await;
    for (answer, is_reset) in [
        ("HTTP/1.1 200 x\r\nContent-Length: 10\r\n\r\npart", false),
        ("HTTP/1.1 200 x\r\nContent-Length: 10\r\n\r\npart", true),
        ("HTTP/1.1 200 x\r\nTransfer-Encoding: chunked\r\n\r\n4\r\npart\r\n", false),
        ("HTTP/1.1 200 x\r\nTransfer-Encoding: chunked\r\n\r\n4\r\npart\r\n", true),
        ("HTTP/1.0 200 x\r\n\r\npart", true),
    ] {
        let mut stream = bench.get("/");
        let (_, mut upstream) = bench.upstream.request().await;
        upstream.write(answer).await;
        head(&mut stream).await;
        let first = crate::support::within(stream.answer.read()).await.unwrap();
        assert_eq!(first, wsproxy_conn::lane::Received::Data("part".into()));
        if is_reset {
            upstream.reset()
        } else {
            drop(upstream)
        }
        let end = read_all(&mut stream).await.unwrap_err();
        let End::Reset(reset) = end else { panic!("{end:?}") };
        assert_eq!((reset.code, reset.head_sent), (Code::UpstreamReset, true), "{answer}");
    }
}
