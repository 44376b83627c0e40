//! A lane whose peer is written by hand, byte by byte.

use std::sync::Arc;

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    task::JoinHandle,
};
use wsproxy_conn::lane::{self, LaneEnd, LaneHandle, LaneSettings};
use wsproxy_proto::{
    tunnel::{
        frame::{Frame, Frames, StreamFrame},
        hello::Hello,
        memory::{Memory, MemoryLimits},
    },
    ws::frame::{Opcode, client_frame},
};

use super::pair::{tcp, within};
use crate::support::{frames, until};

/// A gateway's lane, and the socket of its agent.
pub(crate) struct Peer {
    pub(crate) lane: LaneHandle,
    pub(crate) socket: TcpStream,
    pub(crate) task: JoinHandle<LaneEnd>,
    pub(crate) memory: Arc<Memory>,
    /// Bytes that came behind the frames that were looked at.
    unread: Vec<u8>,
}

impl Peer {
    /// Returns a gateway's lane that has read `leftover` behind the handshake.
    pub(crate) async fn new(settings: &LaneSettings, leftover: &[u8]) -> Self {
        let (ours, socket) = tcp().await;
        let memory = Memory::new(MemoryLimits::default());
        let (driver, lane) =
            lane::gateway(ours.into(), leftover, settings.clone(), Arc::clone(&memory)).unwrap();
        Self { lane, socket, task: tokio::spawn(driver), memory, unread: Vec::new() }
    }

    /// Returns a gateway's lane that has had HELLO.
    pub(crate) async fn ready(settings: &LaneSettings) -> Self {
        let peer = Self::new(settings, &masked(Opcode::Binary, &message(&hello()))).await;
        within(peer.lane.ready()).await.unwrap();
        peer
    }

    pub(crate) async fn says(&mut self, opcode: Opcode, payload: &[u8]) {
        self.socket.write_all(&masked(opcode, payload)).await.unwrap();
    }

    pub(crate) async fn says_frame(&mut self, frame: &Frame<'_>) {
        self.says(Opcode::Binary, &message(frame)).await;
    }

    /// Reads up to a WebSocket frame that is none of a message.
    pub(crate) async fn hears_control(&mut self) -> (Opcode, Vec<u8>) {
        loop {
            let (mut all, rest) = frames(&self.unread);
            self.unread.drain(..self.unread.len() - rest);
            all.retain(|(opcode, _)| opcode.is_control());
            if !all.is_empty() {
                assert_eq!(all.len(), 1, "{all:?}");
                return all.swap_remove(0);
            }
            let read = within(self.socket.read_buf(&mut self.unread)).await.unwrap();
            assert!(read > 0, "the stream ended");
        }
    }

    /// Reads to a close frame, answers it, and ends its stream. Returns its code and reason, and the end of the lane.
    pub(crate) async fn ends_closed(mut self) -> (u16, String, LaneEnd) {
        let (opcode, payload) = self.hears_control().await;
        assert_eq!(opcode, Opcode::Close);
        let reason = String::from_utf8(payload[2..].to_vec()).unwrap();
        let code = u16::from_be_bytes([payload[0], payload[1]]);
        // The end of the stream follows at once, and not a reset.
        let mut rest = Vec::new();
        within(self.socket.read_to_end(&mut rest)).await.unwrap();
        assert_eq!(rest, b"");
        // A lane that was closed by its peer is gone by now.
        let _ = self.socket.write_all(&masked(Opcode::Close, &payload[..2])).await;
        let _ = self.socket.shutdown().await;
        let end = within(self.task).await.unwrap();
        assert_eq!(self.lane.status().end, Some(end));
        until("no stream is left", || self.lane.numbers().streams == 0).await;
        assert_eq!(self.memory.streams(), 0);
        (code, reason, end)
    }

    /// Reads messages until OPEN of a stream has come.
    pub(crate) async fn hears_open(&mut self) -> u32 {
        loop {
            let (all, rest) = frames(&self.unread);
            self.unread.drain(..self.unread.len() - rest);
            for (_, message) in all {
                for frame in Frames::new(&message).unwrap() {
                    if let Frame::Stream(number, StreamFrame::Open(_)) = frame.unwrap() {
                        return number;
                    }
                }
            }
            let read = within(self.socket.read_buf(&mut self.unread)).await.unwrap();
            assert!(read > 0, "the stream ended");
        }
    }

    /// Reads messages until so many streams were opened. Returns how many each message opened.
    pub(crate) async fn hears_opens(&mut self, count: usize) -> Vec<usize> {
        let mut opens = Vec::new();
        while opens.iter().sum::<usize>() < count {
            let read = within(self.socket.read_buf(&mut self.unread)).await.unwrap();
            assert!(read > 0, "the stream ended");
            let (all, rest) = frames(&self.unread);
            self.unread.drain(..self.unread.len() - rest);
            let is_open =
                |frame: &Frame<'_>| matches!(frame, Frame::Stream(_, StreamFrame::Open(_)));
            let all = all.iter().map(|(_, message)| {
                Frames::new(message)
                    .unwrap()
                    .filter(|frame| is_open(frame.as_ref().unwrap()))
                    .count()
            });
            opens.extend(all.filter(|opens| *opens > 0));
        }
        opens
    }
}

pub(crate) fn masked(opcode: Opcode, payload: &[u8]) -> Vec<u8> {
    client_frame(opcode, payload, false, [1, 2, 3, 4]).to_vec()
}

pub(crate) fn hello() -> Frame<'static> {
    Frame::Hello(Hello::default())
}

/// Returns the message of one frame.
pub(crate) fn message(frame: &Frame<'_>) -> Vec<u8> {
    let mut message = Vec::new();
    frame.encode(&mut message).unwrap();
    message
}
