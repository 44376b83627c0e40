//! A client that writes any bytes, however wrong, and sees every byte of the answer.

use std::net::SocketAddr;

use socket2::SockRef;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use super::{http::Response, soon};

/// A TCP connection.
pub struct Raw {
    /// The socket.
    pub socket: TcpStream,
    buffer: Vec<u8>,
}

/// A frame from the server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    /// FIN, RSV and opcode.
    pub first: u8,
    /// As on the wire: perhaps compressed.
    pub payload: Vec<u8>,
}

impl Raw {
    /// Connects.
    pub async fn connect(address: SocketAddr) -> Self {
        let socket = TcpStream::connect(address).await.unwrap();
        socket.set_nodelay(true).unwrap();
        Self { socket, buffer: Vec::new() }
    }

    /// Connects with a small receive window, so that little fits between the two ends.
    pub async fn narrow(address: SocketAddr) -> Self {
        let socket = tokio::net::TcpSocket::new_v4().unwrap();
        socket.set_recv_buffer_size(4096).unwrap();
        Self { socket: socket.connect(address).await.unwrap(), buffer: Vec::new() }
    }

    /// Reads until a text has come, and returns all that was read and not taken. The end of the connection is a failure.
    pub async fn read_until(&mut self, end: &str) -> String {
        loop {
            let text = String::from_utf8_lossy(self.rest()).into_owned();
            if text.contains(end) {
                return text;
            }
            assert!(self.read().await > 0, "{end:?} did not come: {text}");
        }
    }

    /// Asks for an upgrade with further header lines, each ended by CRLF; it must succeed.
    /// Returns the response's head.
    pub async fn upgrade(&mut self, path: &str, headers: &str) -> Response {
        self.write(format!("GET {path} HTTP/1.1\r\n{UPGRADE}{headers}\r\n").as_bytes()).await;
        let response = self.response().await;
        assert_eq!(response.status, 101, "{response:?}");
        response
    }

    /// The same for a session with a token.
    pub async fn open(&mut self, session: &str, token: &str) -> Response {
        let token = format!("Authorization: Bearer {token}\r\n");
        self.upgrade(&format!("/agent/ws/{session}"), &token).await
    }

    /// Writes bytes.
    pub async fn write(&mut self, bytes: &[u8]) {
        soon("a write", self.socket.write_all(bytes)).await.unwrap();
    }

    /// Writes a masked frame. `first`: FIN, RSV and opcode.
    pub async fn frame(&mut self, first: u8, payload: &[u8]) {
        self.write(&frame(first, payload)).await;
    }

    /// The head of a response, and its body where its length is told.
    pub async fn response(&mut self) -> Response {
        loop {
            if let Some((response, used)) = Response::parse(&self.buffer) {
                self.buffer.drain(..used);
                return response;
            }
            assert!(self.read().await > 0, "{:?}", String::from_utf8_lossy(&self.buffer));
        }
    }

    /// The next frame; `None` at the end of the stream.
    pub async fn next_frame(&mut self) -> Option<Frame> {
        loop {
            if let Some((frame, used)) = parse(&self.buffer) {
                self.buffer.drain(..used);
                return Some(frame);
            }
            if self.read().await == 0 {
                assert!(self.buffer.is_empty(), "half a frame");
                return None;
            }
        }
    }

    /// The next frame, which must be text that is not compressed.
    pub async fn text(&mut self) -> String {
        let frame = self.next_frame().await.expect("a frame");
        assert_eq!(frame.first, 0x81, "{frame:?}");
        String::from_utf8(frame.payload).unwrap()
    }

    /// Code and reason of the next frame, which must be a close frame.
    pub async fn close_frame(&mut self) -> (u16, String) {
        let frame = self.next_frame().await.expect("a close frame");
        assert_eq!(frame.first, 0x88, "{frame:?}");
        let code = u16::from_be_bytes([frame.payload[0], frame.payload[1]]);
        (code, String::from_utf8(frame.payload[2..].to_vec()).unwrap())
    }

    /// Waits for the end of the stream; whatever comes before it is dropped.
    pub async fn end(&mut self) {
        while self.read().await > 0 {
            self.buffer.clear();
        }
    }

    /// Goes away with a RST.
    pub fn reset(self) {
        SockRef::from(&self.socket).set_linger(Some(std::time::Duration::ZERO)).unwrap();
    }

    /// Reads what is there; 0 at the end, a reset included.
    pub async fn read(&mut self) -> usize {
        soon("bytes", self.socket.read_buf(&mut self.buffer)).await.unwrap_or(0)
    }

    /// Takes the bytes that were read and not parsed yet.
    pub fn take(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.buffer)
    }

    /// Returns the bytes that were read and not parsed yet.
    pub fn rest(&self) -> &[u8] {
        &self.buffer
    }
}

/// A masked frame, as a client sends it.
pub fn frame(first: u8, payload: &[u8]) -> Vec<u8> {
    let mask = [0x37, 0xfa, 0x21, 0x3d];
    let mut bytes = vec![first];
    match payload.len() {
        length @ 0..=125 => bytes.push(0x80 | length as u8),
        length @ 126..=0xffff => {
            bytes.push(0xfe);
            bytes.extend((length as u16).to_be_bytes());
        }
        length => {
            bytes.push(0xff);
            bytes.extend((length as u64).to_be_bytes());
        }
    }
    bytes.extend(mask);
    bytes.extend(payload.iter().zip(mask.iter().cycle()).map(|(byte, mask)| byte ^ mask));
    bytes
}

fn parse(bytes: &[u8]) -> Option<(Frame, usize)> {
    let [first, second, ..] = *bytes else { return None };
    assert_eq!(second & 0x80, 0, "a server's frame is not masked");
    let (length, head) = match second {
        126 => (usize::from(u16::from_be_bytes(bytes.get(2..4)?.try_into().unwrap())), 4),
        127 => (u64::from_be_bytes(bytes.get(2..10)?.try_into().unwrap()) as usize, 10),
        length => (usize::from(length), 2),
    };
    let payload = bytes.get(head..head + length)?.to_vec();
    Some((Frame { first, payload }, head + length))
}

/// A handshake's headers, complete but for credentials.
pub const UPGRADE: &str = "Host: test\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
    Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n";
