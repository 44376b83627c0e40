//! Agents and clients that break the rules on purpose: each is refused with its code, and others do not notice.

use wsproxy_conn::lane::AcceptedStream;
use wsproxy_proto::tunnel::{
    DATA_BYTES_MAX, WINDOW_MAX,
    code::Code,
    frame::{Data, DataFlag, Frame, Frames, Head, Open, Reset, Source, StreamFrame},
    headers::{HeaderBlock, Headers},
    hello::Hello,
};

use crate::support::{
    cluster_agent::{ClusterAgent, Name, agent_token, answer, ask, config, handshake, head, send},
    eventually,
    gateway::TestInstance,
    raw::Raw,
};

/// An agent of the cluster `c1` whose frames are written by hand.
struct Hostile(Raw);

impl Hostile {
    /// Connects, and says `first`.
    async fn connect(gateway: &TestInstance, first: &[u8]) -> Self {
        let mut raw = Raw::connect(gateway.address()).await;
        raw.write(handshake(Name::default()).as_bytes()).await;
        assert_eq!(raw.response().await.status, 101);
        let mut agent = Self(raw);
        agent.says(first).await;
        agent
    }

    async fn ready(gateway: &TestInstance) -> Self {
        Self::connect(gateway, &message(&[Frame::Hello(Hello::default())])).await
    }

    async fn says(&mut self, message: &[u8]) {
        self.0.frame(0x82, message).await;
    }

    /// Reads until a request comes, and returns the number of its stream.
    async fn hears_open(&mut self) -> u32 {
        loop {
            let heard = self.0.next_frame().await.expect("a message");
            for frame in Frames::new(&heard.payload).unwrap() {
                if let Frame::Stream(number, StreamFrame::Open(_)) = frame.unwrap() {
                    return number;
                }
            }
        }
    }

    /// Reads to the close frame, and returns its code and reason.
    async fn ended(mut self, what: &str) -> (u16, String) {
        loop {
            let frame =
                self.0.next_frame().await.unwrap_or_else(|| panic!("no close frame: {what}"));
            if frame.first == 0x88 {
                let code = u16::from_be_bytes([frame.payload[0], frame.payload[1]]);
                return (code, String::from_utf8(frame.payload[2..].to_vec()).unwrap());
            }
        }
    }
}

/// Returns a message of several frames.
fn message(frames: &[Frame<'_>]) -> Vec<u8> {
    let mut message = Vec::new();
    frames.iter().for_each(|frame| frame.encode(&mut message).unwrap());
    message
}

fn answered(end: bool, headers: Headers<'_>) -> StreamFrame<'_> {
    StreamFrame::Head(Head { end, status: 200, source: Source::Upstream, headers })
}

/// An instance, and an agent of another cluster, `d1`, that does no wrong.
async fn start() -> (TestInstance, ClusterAgent) {
    let mut config = config(None);
    config.tunnel.agents.push(agent_token("d1", "token-of-d1"));
    config.tunnel.wait = std::time::Duration::from_millis(100);
    let gateway = TestInstance::start(config).await;
    let name = Name { cluster: "d1", token: "token-of-d1", ..Name::default() };
    let hello = |stream: AcceptedStream| async { answer(stream, 200, "hello").await };
    let neighbour = ClusterAgent::named(gateway.address(), name, Default::default(), hello).await;
    (gateway, neighbour.unwrap())
}

async fn assert_neighbour_serves(gateway: &TestInstance, after: &str) {
    let request = head("GET", "/", "").replace("/c1/", "/d1/");
    let answer = ask(gateway, &request).await;
    assert_eq!((answer.status, &*answer.body), (200, "hello"), "{after}");
}

#[tokio::test]
async fn an_agent_that_breaks_a_rule_loses_its_own_lane() {
    let (gateway, neighbour) = start().await;
    let data = [b'x'; DATA_BYTES_MAX];
    let bytes = StreamFrame::Data(Data { bytes: &data, flag: DataFlag::None });
    let last = StreamFrame::Data(Data { bytes: b"x", flag: DataFlag::End });
    let whole = answered(false, Headers::EMPTY);
    let open = StreamFrame::Open(Open { end: true, ..Open::new(b"GET", b"/") });
    let reset = StreamFrame::Reset(Reset::new(Code::Cancelled));
    for (what, frames, code) in [
        ("too much data", vec![whole, bytes, bytes, bytes], "flow_control"),
        ("too much credit", vec![StreamFrame::Credit(WINDOW_MAX)], "flow_control"),
        ("a body without a head", vec![bytes], "protocol"),
        ("trailers without a head", vec![StreamFrame::Trailers(Headers::EMPTY)], "protocol"),
        ("two heads", vec![whole, whole], "protocol"),
        ("bytes behind the end", vec![whole, last, last], "protocol"),
        (
            "trailers behind the end",
            vec![whole, last, StreamFrame::Trailers(Headers::EMPTY)],
            "protocol",
        ),
        (
            "a switch that was not asked for",
            vec![StreamFrame::Head(Head {
                end: false,
                status: 101,
                source: Source::Upstream,
                headers: Headers::EMPTY,
            })],
            "protocol",
        ),
        ("a request to the gateway", vec![open], "protocol"),
    ] {
        let mut agent = Hostile::ready(&gateway).await;
        // The body does not come, so that the stream is open in both directions.
        let mut client = send(&gateway, &head("POST", "/", "Content-Length: 9\r\n")).await;
        let number = agent.hears_open().await;
        let frames: Vec<_> = frames.iter().map(|frame| Frame::Stream(number, *frame)).collect();
        agent.says(&message(&frames)).await;
        assert_eq!(agent.ended(what).await, (1002, code.to_owned()), "{what}");
        if !what.ends_with("behind the end") {
            while client.read().await > 0 {}
            let text = String::from_utf8_lossy(client.rest()).into_owned();
            assert!(!text.contains(" 200 ") || !text.ends_with("0\r\n\r\n"), "{what}: {text}");
        }
        assert_neighbour_serves(&gateway, what).await;
        eventually("no stream is left", || gateway.metric("wsproxy_tunnel_streams") == 0.0).await;
    }
    // Streams that the agent does not have: one that was never opened, and one that is gone.
    for (number, frame, code) in
        [(99, reset, Some("protocol")), (1, reset, None), (2, whole, Some("protocol"))]
    {
        let mut agent = Hostile::ready(&gateway).await;
        let client = send(&gateway, &head("GET", "/", "")).await;
        assert_eq!(agent.hears_open().await, 1);
        agent.says(&message(&[Frame::Stream(1, answered(true, Headers::EMPTY))])).await;
        drop(client);
        agent.says(&message(&[Frame::Stream(number, frame)])).await;
        match code {
            Some(code) => {
                let ended = agent.ended(&format!("stream {number}")).await;
                assert_eq!(ended, (1002, code.to_owned()), "{number}");
            }
            None => {
                let _client = send(&gateway, &head("GET", "/", "")).await;
                assert_eq!(agent.hears_open().await, 3);
            }
        }
    }
    assert!(neighbour.lane.status().end.is_none());
    gateway.drain().await;
}

#[tokio::test]
async fn heads_that_are_bombs_end_their_request_alone() {
    let (gateway, _neighbour) = start().await;
    let mut agent = Hostile::ready(&gateway).await;
    let mut block = HeaderBlock::new();
    block.push(b"a", &[b'v'; 40_000]).unwrap();
    let large = block;
    let mut block = HeaderBlock::new();
    (0..8000).for_each(|_| block.push(b"a", b"").unwrap());
    let many = block;
    let mut block = HeaderBlock::new();
    (0..2000_u32).for_each(|n| block.push(format!("x-{n}").as_bytes(), b"v").unwrap());
    let different = block;
    let mut length = HeaderBlock::new();
    length.push(b"content-length", b"18446744073709551616").unwrap();
    for (what, headers, code) in [
        ("one large value", &large, Some("head_too_large")),
        ("many empty values", &many, None),
        ("many names", &different, None),
        ("a length without end", &length, None),
    ] {
        let client = tokio::spawn({
            let request = head("GET", "/", "");
            let address = gateway.address();
            async move {
                let mut raw = Raw::connect(address).await;
                raw.write(request.as_bytes()).await;
                raw.read_until("\r\n\r\n").await
            }
        });
        let number = agent.hears_open().await;
        agent.says(&message(&[Frame::Stream(number, answered(true, headers.headers()))])).await;
        let text = crate::support::soon(what, client).await.unwrap();
        if let Some(code) = code {
            assert!(text.starts_with("HTTP/1.1 502") && text.contains(code), "{what}: {text}");
        }
        // The lane takes the next request.
        let mut client = send(&gateway, &head("GET", "/", "")).await;
        let number = agent.hears_open().await;
        agent.says(&message(&[Frame::Stream(number, answered(true, Headers::EMPTY))])).await;
        assert_eq!(client.response().await.status, 200, "{what}");
        assert_neighbour_serves(&gateway, what).await;
    }
    gateway.drain().await;
}

#[tokio::test]
async fn a_hello_that_is_a_bomb_is_taken_or_ends_the_lane() {
    let (gateway, _neighbour) = start().await;
    let hello = message(&[Frame::Hello(Hello::default())]);
    // Unknown members are skipped, however many and large they are.
    let with_members = |member: &[u8], count: usize| {
        let mut message = hello.clone();
        (0..count).for_each(|_| message.extend_from_slice(member));
        let length = u16::try_from(message.len() - 8).unwrap();
        message[6..8].copy_from_slice(&length.to_be_bytes());
        message
    };
    let large = [&[200, 0xea, 0x60][..], &[0; 60_000]].concat();
    for first in [with_members(&[200, 0, 0], 21_000), with_members(&large, 1)] {
        let mut agent = Hostile::connect(&gateway, &first).await;
        let _client = send(&gateway, &head("GET", "/", "")).await;
        agent.hears_open().await;
    }
    let cut = with_members(&[200, 0xff, 0xff], 1);
    let again = [hello.clone(), hello.clone()].concat();
    let flood = hello.repeat(1000);
    let beyond = vec![0; (256 << 10) + 1];
    for first in [&cut, &again, &flood, &beyond, &message(&[Frame::Ping(1)])] {
        let agent = Hostile::connect(&gateway, first).await;
        let ended = agent.ended("a HELLO").await;
        assert_eq!(ended, (1002, "protocol".into()), "{:?}", &first[..8]);
        assert_neighbour_serves(&gateway, "a HELLO").await;
    }
    gateway.drain().await;
}

#[tokio::test]
async fn a_request_with_a_head_that_is_a_bomb_is_refused() {
    let (gateway, neighbour) = start().await;
    let value = "v".repeat(60_000);
    for headers in [
        format!("X-A: {value}\r\nX-B: {value}\r\nX-C: {value}\r\nX-D: {value}\r\nX-E: {value}\r\n"),
        "a:\r\n".repeat(20_000),
    ] {
        let mut raw = Raw::connect(gateway.address()).await;
        let request = head("GET", "/", &headers).replace("/c1/", "/d1/");
        // The gateway may close before it has read all.
        let _ = tokio::io::AsyncWriteExt::write_all(&mut raw.socket, request.as_bytes()).await;
        let answer = raw.response().await;
        assert_eq!(answer.status, 431, "{answer:?}");
        assert_neighbour_serves(&gateway, "a head").await;
    }
    // Within the bounds of HTTP, and beyond those of a lane.
    let headers = format!("X-A: {}\r\n", "v".repeat(40_000));
    let answer = ask(&gateway, &head("GET", "/", &headers).replace("/c1/", "/d1/")).await;
    assert_eq!(answer.status, 431, "{answer:?}");
    assert!(neighbour.lane.status().end.is_none() && neighbour.lane.streams() == 0);
    gateway.drain().await;
}
