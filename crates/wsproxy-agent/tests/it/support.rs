//! An agent with its gateway and its upstream, and what tests ask of them.

use std::{
    io::Write,
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use tempfile::NamedTempFile;
use tokio::{net::TcpListener, task::JoinHandle, time::sleep};
use tokio_util::sync::CancellationToken;
use wsproxy_agent::{agent, config::AgentConfig, settings::Settings};
use wsproxy_conn::lane::{OpenedStream, Received};
use wsproxy_proto::tunnel::{
    code::Code,
    event::{Answer, End, ResetByPeer},
    frame::Open,
    headers::{HeaderBlock, SharedHeaders},
};

use crate::{
    gateway::{Gateway, GatewayLane},
    upstream::Upstream,
};

/// An agent whose lane is ready.
pub(crate) struct Bench {
    pub(crate) gateway: Gateway,
    pub(crate) lane: GatewayLane,
    pub(crate) upstream: Upstream,
    pub(crate) agent: Agent,
}

/// Agent that runs until it is dropped.
pub(crate) struct Agent {
    pub(crate) stop: CancellationToken,
    pub(crate) task: JoinHandle<()>,
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Agent {
    pub(crate) fn new(config: AgentConfig) -> Self {
        let stop = CancellationToken::new();
        let task = tokio::spawn(agent::run(config, stop.clone()));
        Self { stop, task }
    }
}

impl Bench {
    pub(crate) async fn new() -> Self {
        Self::with(|_| {}).await
    }

    pub(crate) async fn with(change: impl FnOnce(&mut Settings)) -> Self {
        let (gateway, upstream) = (Gateway::new().await, Upstream::new().await);
        let mut settings = settings(gateway.port, upstream.port);
        change(&mut settings);
        let agent = Agent::new(config(&settings));
        let lane = gateway.lane().await;
        Self { gateway, lane, upstream, agent }
    }

    /// Opens a stream without a body.
    pub(crate) fn get(&self, path: &str) -> OpenedStream {
        self.open(&Open { end: true, ..Open::new(b"GET", path.as_bytes()) })
    }

    pub(crate) fn open(&self, open: &Open<'_>) -> OpenedStream {
        self.lane.handle.open(open).unwrap()
    }
}

/// Settings of an agent without probes that would come between the requests of a test.
pub(crate) fn settings(gateway: u16, upstream: u16) -> Settings {
    Settings {
        gateway: Some(format!("ws://127.0.0.1:{gateway}")),
        cluster: Some("c1".into()),
        agent_id: Some("a1".into()),
        token: Some("opens-c1".into()),
        upstream: Some(format!("http://127.0.0.1:{upstream}")),
        ..Settings::default()
    }
}

/// Configuration with short waits.
pub(crate) fn config(settings: &Settings) -> AgentConfig {
    let mut config = settings.config().unwrap();
    config.pauses.first = Duration::from_millis(10);
    config.health = None;
    config
}

/// Returns a block of headers.
pub(crate) fn block(headers: &[(&str, &str)]) -> HeaderBlock {
    let mut block = HeaderBlock::new();
    for (name, value) in headers {
        block.push(name.as_bytes(), value.as_bytes()).unwrap();
    }
    block
}

/// Returns a request of an upgrade, or with a body.
pub(crate) fn post<'a>(path: &'a str, headers: &'a HeaderBlock) -> Open<'a> {
    Open { headers: headers.headers(), ..Open::new(b"POST", path.as_bytes()) }
}

/// Returns headers as lines.
pub(crate) fn lines(headers: &SharedHeaders) -> Vec<String> {
    let line = |(name, value): (&[u8], Bytes)| {
        format!("{}: {}", String::from_utf8_lossy(name), String::from_utf8_lossy(&value))
    };
    headers.iter().map(line).collect()
}

/// Waits for the head of an answer.
pub(crate) async fn head(stream: &mut OpenedStream) -> Answer {
    within(stream.answer.head()).await.unwrap()
}

/// Reads an answer to its end, and returns its body and its trailers.
pub(crate) async fn read_all(stream: &mut OpenedStream) -> Result<(Vec<u8>, Vec<String>), End> {
    let mut body = Vec::new();
    loop {
        match within(stream.answer.read()).await? {
            Received::Data(bytes) => body.extend_from_slice(&bytes),
            Received::Trailers(trailers) => return Ok((body, lines(&trailers))),
            Received::End => return Ok((body, Vec::new())),
        }
    }
}

/// Waits for the reset of a stream, and drops its bytes.
pub(crate) async fn reset(stream: &mut OpenedStream) -> ResetByPeer {
    let end = match within(stream.answer.head()).await {
        Err(end) => end,
        Ok(_) => read_all(stream).await.unwrap_err(),
    };
    match end {
        End::Reset(reset) => reset,
        end => panic!("{end:?}"),
    }
}

/// Waits for the reset of a stream, and returns its code.
pub(crate) async fn code(stream: &mut OpenedStream) -> Code {
    reset(stream).await.code
}

/// Waits, but not for ever.
pub(crate) async fn within<T>(future: impl Future<Output = T>) -> T {
    tokio::select! {
        biased;
        value = future => value,
        () = sleep(PATIENCE) => panic!("it takes too long"),
    }
}

/// Waits until a condition holds.
pub(crate) async fn until(reason: &str, holds: impl Fn() -> bool) {
    let wait = async {
        while !holds() {
            sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(PATIENCE, wait).await.unwrap_or_else(|_| panic!("{reason}"));
}

/// Listens on a random port below those that the kernel gives to clients.
pub(crate) async fn listen() -> TcpListener {
    loop {
        let now = SystemTime::UNIX_EPOCH.elapsed().unwrap().subsec_nanos();
        let port = 15_000 + (now / 100 % 17_000) as u16;
        if let Ok(listener) = TcpListener::bind(("127.0.0.1", port)).await {
            return listener;
        }
    }
}

/// Returns a file with this text.
pub(crate) fn file(text: &str) -> NamedTempFile {
    let mut file = NamedTempFile::new().unwrap();
    file.write_all(text.as_bytes()).unwrap();
    file
}

/// Time after which a test gives up.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);
