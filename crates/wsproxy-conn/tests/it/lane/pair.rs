//! Two lanes with a connection between them, and bodies that cannot be mistaken for each other.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use tokio::{
    net::{TcpListener, TcpStream},
    task::JoinHandle,
    time::sleep,
};
use wsproxy_conn::{
    Socket,
    lane::{
        self, AcceptedStream, LaneEnd, LaneHandle, LaneSettings, OpenedStream, Received,
        StreamAcceptor, StreamReader, StreamWriter, WriteError,
    },
};
use wsproxy_proto::tunnel::{
    event::End,
    frame::{Head, Open, Source},
    headers::Headers,
    memory::{Memory, MemoryLimits},
};

use crate::support::{PATIENCE, until};

/// A gateway's lane and an agent's lane.
pub(crate) struct Pair {
    pub(crate) gateway: LaneHandle,
    pub(crate) agent: LaneHandle,
    pub(crate) acceptor: StreamAcceptor,
    pub(crate) tasks: [JoinHandle<LaneEnd>; 2],
    pub(crate) memories: [Arc<Memory>; 2],
}

impl Pair {
    pub(crate) async fn new() -> Self {
        Self::with(&LaneSettings::default()).await
    }

    pub(crate) async fn with(settings: &LaneSettings) -> Self {
        let (ours, theirs) = tcp().await;
        Self::over(ours.into(), theirs.into(), settings).await
    }

    pub(crate) async fn over(ours: Socket, theirs: Socket, settings: &LaneSettings) -> Self {
        let memories = [(); 2].map(|()| Memory::new(MemoryLimits::default()));
        let memory = |side: usize| Arc::clone(&memories[side]);
        let (driver, gateway) = lane::gateway(ours, &[], settings.clone(), memory(0)).unwrap();
        let ours = tokio::spawn(driver);
        let (driver, agent, acceptor) =
            lane::agent(theirs, &[], settings.clone(), memory(1)).unwrap();
        let theirs = tokio::spawn(driver);
        within(gateway.ready()).await.unwrap();
        Self { gateway, agent, acceptor, tasks: [ours, theirs], memories }
    }

    pub(crate) fn open(&self, end: bool) -> OpenedStream {
        self.gateway.open(&request(end)).unwrap()
    }

    /// Opens a stream, and returns both sides of it.
    pub(crate) async fn stream(&mut self, end: bool) -> (OpenedStream, AcceptedStream) {
        let opened = self.open(end);
        let accepted = self.accept().await;
        assert_eq!(accepted.body.number(), opened.answer.number());
        (opened, accepted)
    }

    pub(crate) async fn accept(&mut self) -> AcceptedStream {
        within(self.acceptor.accept()).await.expect("the lane has ended")
    }

    /// Waits until neither side knows a stream.
    pub(crate) async fn is_empty(&self) {
        let streams = || [&self.gateway, &self.agent].map(LaneHandle::streams);
        until("no stream is left", || streams() == [0, 0]).await;
        for memory in &self.memories {
            assert_eq!((memory.streams(), memory.growth_bytes()), (0, 0));
        }
    }

    /// Waits for the ends of both lanes.
    pub(crate) async fn ends(&mut self) -> [LaneEnd; 2] {
        let [ours, theirs] = &mut self.tasks;
        [within(ours).await.unwrap(), within(theirs).await.unwrap()]
    }
}

/// Returns both ends of a TCP connection.
pub(crate) async fn tcp() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let theirs = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
    let (ours, _) = listener.accept().await.unwrap();
    (ours, theirs)
}

/// Waits, but not for ever. A future that would be ready only because of the timer is late as well.
pub(crate) async fn within<T>(future: impl Future<Output = T>) -> T {
    tokio::select! {
        biased;
        () = sleep(PATIENCE) => panic!("it takes too long"),
        value = future => value,
    }
}

/// Settings of a lane whose times are short.
pub(crate) fn short(ping: Duration, silence_max: Duration) -> LaneSettings {
    let mut settings = LaneSettings::default();
    settings.protocol.ping = ping.as_micros() as u64;
    settings.protocol.silence_max = silence_max.as_micros() as u64;
    settings
}

pub(crate) fn request(end: bool) -> Open<'static> {
    Open { end, ..Open::new(b"POST", b"/path?query") }
}

pub(crate) fn head(status: u16, end: bool) -> Head<'static> {
    Head { end, status, source: Source::Upstream, headers: Headers::default() }
}

/// Random numbers that are the same in each run.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        // xorshift64*
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub(crate) fn below(&mut self, bound: usize) -> usize {
        (self.next() >> 32) as usize % bound
    }

    pub(crate) fn body(&mut self, length: usize) -> Bytes {
        let mut body = Vec::with_capacity(length + 8);
        while body.len() < length {
            body.extend_from_slice(&self.next().to_le_bytes());
        }
        body.truncate(length);
        body.into()
    }
}

/// Writes a body in pieces of any size.
pub(crate) async fn write_all(
    writer: &mut StreamWriter,
    mut body: Bytes,
    random: &mut Random,
) -> Result<(), WriteError> {
    while !body.is_empty() {
        let most = if random.below(4) == 0 { 100_000 } else { 2000 };
        let piece = body.split_to(body.len().min(1 + random.below(most)));
        within(writer.write(piece)).await?;
    }
    Ok(())
}

/// Reads a body to its clean end. Returns whether there were trailers.
pub(crate) async fn read_all(reader: &mut StreamReader) -> Result<(Vec<u8>, bool), End> {
    let mut body = Vec::new();
    loop {
        match within(reader.read()).await? {
            Received::Data(bytes) => {
                assert!(!bytes.is_empty());
                body.extend_from_slice(&bytes);
            }
            Received::Trailers(trailers) => {
                assert_eq!(trailers.iter().count(), 1);
                return Ok((body, true));
            }
            Received::End => return Ok((body, false)),
        }
    }
}

/// Reads until a number of bytes have come.
pub(crate) async fn read_some(reader: &mut StreamReader, length: usize) -> Vec<u8> {
    let mut body = Vec::new();
    while body.len() < length {
        match within(reader.read()).await.unwrap() {
            Received::Data(bytes) => body.extend_from_slice(&bytes),
            other => panic!("{other:?} after {} bytes", body.len()),
        }
    }
    body
}
