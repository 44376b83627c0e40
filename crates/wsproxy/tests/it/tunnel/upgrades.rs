//! Upgraded connections: raw bytes in both directions.

use bytes::Bytes;
use tokio::io::AsyncWriteExt as _;
use wsproxy_conn::lane::{AcceptedStream, Received};
use wsproxy_proto::tunnel::{code::Code, frame::Reset};

use crate::support::{
    cluster_agent::{ClusterAgent, answer, config, head, send_head},
    eventually,
    gateway::TestInstance,
    raw::Raw,
    soon,
};

/// Greets, sends all back, and says goodbye behind the client's end.
async fn switched(mut stream: AcceptedStream) {
    assert!(stream.request.upgrade);
    send_head(&mut stream, 101, false, &[("connection", "upgrade"), ("upgrade", "SPDY/3.1")]);
    stream.answer.write(Bytes::from_static(b"early ")).await.unwrap();
    loop {
        match stream.body.read().await {
            Ok(Received::Data(bytes)) => stream.answer.write(bytes).await.unwrap(),
            Ok(_) => break,
            Err(_) => return,
        }
    }
    stream.answer.write(Bytes::from_static(b" bye")).await.unwrap();
    stream.answer.finish().unwrap();
}

async fn rest(raw: &mut Raw) -> String {
    while raw.read().await > 0 {}
    String::from_utf8_lossy(&raw.take()).into_owned()
}

#[tokio::test]
async fn bytes_pass_early_and_behind_a_half_close() {
    let gateway = TestInstance::start(config(None)).await;
    let agent = ClusterAgent::start(gateway.address(), switched).await;
    let mut raw = Raw::connect(gateway.address()).await;
    // The first bytes come in the same packet as the head.
    raw.write(format!("{}first ", head("GET", "/exec", UPGRADE)).as_bytes()).await;
    let answer = raw.response().await;
    assert_eq!((answer.status, answer.header("upgrade")), (101, "SPDY/3.1"));
    raw.write(b"second").await;
    raw.socket.shutdown().await.unwrap();
    assert_eq!(rest(&mut raw).await, "early first second bye");
    eventually("nothing is left", || agent.lane.streams() == 0).await;
    gateway.drain().await;
}

#[tokio::test]
async fn an_upgrade_that_is_not_granted_is_an_ordinary_answer() {
    let gateway = TestInstance::start(config(None)).await;
    let agent =
        ClusterAgent::start(gateway.address(), |stream| answer(stream, 403, "no exec")).await;
    let mut raw = Raw::connect(gateway.address()).await;
    for _ in 0..2 {
        raw.write(head("POST", "/exec", UPGRADE).as_bytes()).await;
        let answer = raw.response().await;
        assert_eq!((answer.status, &*answer.body), (403, "no exec"));
    }
    eventually("nothing is left", || agent.lane.streams() == 0).await;
    gateway.drain().await;
}

#[tokio::test]
async fn a_failed_side_of_an_upgrade_ends_the_other() {
    let gateway = TestInstance::start(config(None)).await;
    let agent = ClusterAgent::start(gateway.address(), |mut stream| async move {
        if &stream.request.path[..] == b"/reset" {
            send_head(&mut stream, 101, false, &[("upgrade", "SPDY/3.1")]);
            let _ = stream.answer.write(Bytes::from_static(b"x")).await;
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
            return stream.answer.reset(&Reset::new(Code::UpstreamReset));
        }
        switched(stream).await;
    })
    .await;
    let mut raw = Raw::connect(gateway.address()).await;
    raw.write(head("GET", "/reset", UPGRADE).as_bytes()).await;
    assert_eq!(raw.response().await.status, 101);
    let mut buffer = [0; 10];
    let failed = async {
        loop {
            match tokio::io::AsyncReadExt::read(&mut raw.socket, &mut buffer).await {
                Ok(0) => return false,
                Ok(_) => {}
                Err(_) => return true,
            }
        }
    };
    assert!(soon("the end", failed).await, "the client takes a part for the whole");
    let mut raw = Raw::connect(gateway.address()).await;
    raw.write(head("GET", "/exec", UPGRADE).as_bytes()).await;
    assert_eq!(raw.response().await.status, 101);
    raw.reset();
    eventually("nothing is left", || agent.lane.streams() == 0).await;
    gateway.drain().await;
}

const UPGRADE: &str = "Connection: Upgrade\r\nUpgrade: SPDY/3.1\r\n";
