//! A cluster agent without an upstream: tests answer the requests of its lane.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use bytes::Bytes;
use wsproxy::config::{
    Config,
    tunnel::rows::{AgentToken, ClientToken, ClusterPattern, TokenHash},
};
use wsproxy_conn::lane::{self, AcceptedStream, LaneEnd, LaneHandle, LaneSettings, Received};
use wsproxy_proto::{
    names::Id,
    tunnel::{
        frame::{Head, Health, Source},
        headers::{HeaderBlock, Headers},
        memory::{Memory, MemoryLimits},
    },
};

use super::{
    gateway::{self, TestInstance},
    http::Response,
    raw::{Raw, UPGRADE},
};

/// A configuration with the tunnel.
pub fn config(redis: Option<&str>) -> Config {
    let mut config = gateway::config(redis);
    config.endpoints.tunnel = true;
    config.tunnel.drain = Duration::from_millis(100);
    config.tunnel.agents = vec![agent_token("c1", AGENT), agent_token("c2", "other-token")];
    let clusters = ["c1", "d*"].map(|text| ClusterPattern::parse(text).unwrap()).into();
    config.tunnel.clients = vec![ClientToken { token: hash(CLIENT), clusters }];
    config
}

/// A token of a cluster's agents.
pub fn agent_token(cluster: &str, token: &str) -> AgentToken {
    AgentToken { cluster: Id::parse(cluster).unwrap(), token: hash(token) }
}

fn hash(token: &str) -> TokenHash {
    TokenHash::parse(&sha256(token)).unwrap()
}

/// The SHA-256 of a token, in hexadecimal.
pub fn sha256(token: &str) -> String {
    let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, token.as_bytes());
    digest.as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A cluster agent with one lane.
pub struct ClusterAgent {
    /// The lane.
    pub lane: LaneHandle,
    driver: tokio::task::JoinHandle<LaneEnd>,
    accepting: tokio::task::JoinHandle<()>,
}

/// Names of an agent that connects.
#[derive(Debug, Clone, Copy)]
pub struct Name<'a> {
    /// Cluster.
    pub cluster: &'a str,
    /// Token.
    pub token: &'a str,
    /// Id of the agent.
    pub agent: &'a str,
    /// Number of its process.
    pub boot: u128,
    /// Number of the connection.
    pub number: u64,
}

impl Default for Name<'_> {
    fn default() -> Self {
        Self { cluster: "c1", token: AGENT, agent: "node-1", boot: 1, number: 1 }
    }
}

impl ClusterAgent {
    /// Connects, and answers each request with `answer`. The gateway must accept the lane.
    pub async fn start<F: Future<Output = ()> + Send + 'static>(
        address: SocketAddr,
        answer: impl Fn(AcceptedStream) -> F + Send + Sync + 'static,
    ) -> Self {
        Self::named(address, Name::default(), LaneSettings::default(), answer).await.unwrap()
    }

    /// As [`Self::start`], under a name.
    pub async fn named<F: Future<Output = ()> + Send + 'static>(
        address: SocketAddr,
        name: Name<'_>,
        settings: LaneSettings,
        answer: impl Fn(AcceptedStream) -> F + Send + Sync + 'static,
    ) -> Result<Self, Response> {
        let mut raw = Raw::connect(address).await;
        raw.write(handshake(name).as_bytes()).await;
        let response = raw.response().await;
        if response.status != 101 {
            return Err(response);
        }
        assert_eq!(response.header("sec-websocket-protocol"), "wsproxy.tunnel.v1");
        assert_eq!(response.header("sec-websocket-extensions"), "");
        let leftover = raw.take();
        let memory = Memory::new(MemoryLimits::default());
        let (driver, lane, mut acceptor) =
            lane::agent(raw.socket.into(), &leftover, settings, memory).unwrap();
        let driver = tokio::spawn(driver);
        let answer = Arc::new(answer);
        let accepting = tokio::spawn(async move {
            while let Some(stream) = acceptor.accept().await {
                let answer = Arc::clone(&answer);
                tokio::spawn(async move { answer(stream).await });
            }
        });
        lane.ready().await.unwrap();
        Ok(Self { lane, driver, accepting })
    }

    /// Tells the gateway whether the upstream is healthy.
    pub fn tell_health(&self, upstream_ok: bool) {
        self.lane.set_health(&Health {
            upstream_ok,
            upstream_round_trip_us: 0,
            streams: 0,
            memory_bytes: 0,
            disk_free_bytes: 0,
            text: "",
        });
    }

    /// Cuts the connection.
    pub fn cut(self) {
        self.driver.abort();
        self.accepting.abort();
    }

    /// Waits for the end of the lane.
    pub async fn ended(self) -> LaneEnd {
        super::soon("the end of the lane", self.driver).await.unwrap()
    }
}

/// The request of a lane's handshake.
pub fn handshake(name: Name<'_>) -> String {
    let Name { cluster, token, agent, boot, number } = name;
    format!(
        "GET /clusters/{cluster}/connect HTTP/1.1\r\n{UPGRADE}Sec-WebSocket-Protocol: wsproxy.tunnel.v1\r\n\
         Authorization: Bearer {token}\r\nX-Wsproxy-Agent: {agent} {boot:032x} {number}\r\n\r\n"
    )
}

/// Sends a head. `headers`: names in lower case.
pub fn send_head(stream: &mut AcceptedStream, status: u16, end: bool, headers: &[(&str, &str)]) {
    let mut block = HeaderBlock::new();
    for (name, value) in headers {
        block.push(name.as_bytes(), value.as_bytes()).unwrap();
    }
    let head = Head { end, status, source: Source::Upstream, headers: block.headers() };
    stream.answer.send_head(&head).unwrap();
}

/// Answers with a text.
pub async fn answer(mut stream: AcceptedStream, status: u16, text: &str) {
    send_head(&mut stream, status, false, &[("content-length", &text.len().to_string())]);
    if stream.answer.write(Bytes::copy_from_slice(text.as_bytes())).await.is_ok() {
        let _ = stream.answer.finish();
    }
}

/// Reads the whole body of a request.
pub async fn read_body(stream: &mut AcceptedStream) -> Vec<u8> {
    let mut body = Vec::new();
    loop {
        match stream.body.read().await.unwrap() {
            Received::Data(bytes) => body.extend_from_slice(&bytes),
            Received::Trailers(_) | Received::End => return body,
        }
    }
}

/// The headers of a request, as lines.
pub fn lines(headers: Headers<'_>) -> String {
    let line = |(name, value): (&[u8], &[u8])| {
        format!("{}: {}\n", String::from_utf8_lossy(name), String::from_utf8_lossy(value))
    };
    headers.iter().map(line).collect()
}

/// Answers every request with `hello`.
pub async fn hello(stream: AcceptedStream) {
    answer(stream, 200, "hello").await;
}

/// Sends a request over a connection of its own.
pub async fn send(gateway: &TestInstance, request: &str) -> Raw {
    let mut raw = Raw::connect(gateway.address()).await;
    raw.write(request.as_bytes()).await;
    raw
}

/// The answer to a request over a connection of its own.
pub async fn ask(gateway: &TestInstance, request: &str) -> Response {
    send(gateway, request).await.response().await
}

/// The head of a request for the cluster `c1`, with the token of clients.
pub fn head(method: &str, path: &str, headers: &str) -> String {
    format!(
        "{method} /clusters/c1/proxy{path} HTTP/1.1\r\nHost: gateway.example\r\n\
         Authorization: Bearer {CLIENT}\r\n{headers}\r\n"
    )
}

/// Token of the cluster `c1`'s agents in [`config`].
pub const AGENT: &str = "token-of-agents";

/// Token of clients in [`config`], which opens the cluster `c1` and those that begin with `d`.
pub const CLIENT: &str = "token-of-clients";
