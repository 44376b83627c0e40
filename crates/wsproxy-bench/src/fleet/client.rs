//! One client: its socket, the state of its handshake and the numbers it expects; knows no epoll.

use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};

use rustix::fd::OwnedFd;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SendFlags, SocketFlags, SocketType};

use wsproxy_proto::history::Position;

use super::secure::Secure;
use crate::frame::FrameReader;

/// State of a client's connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Phase {
    Idle,
    Handshake,
    Open,
    Closing,
}

/// One client of a fleet; its slot is used again when it reconnects.
#[derive(Debug)]
pub(crate) struct Client {
    pub(crate) socket: Option<OwnedFd>,
    /// Encryption of the socket; `None`: it is plain.
    pub(crate) secure: Option<Box<Secure>>,
    pub(crate) phase: Phase,
    /// Distinguishes this connection from earlier ones of the slot, whose events may still be queued.
    pub(crate) generation: u32,
    pub(crate) reader: FrameReader,
    /// The answer's head while it is incomplete.
    pub(crate) head: Vec<u8>,
    /// Bytes that the socket did not take yet.
    pub(crate) unsent: Vec<u8>,
    /// Number of the next message of its own channel, and of the channel that all clients share.
    pub(crate) expected: [Option<u32>; 2],
    /// Position of the last message that had one.
    pub(crate) position: Option<Position>,
    pub(crate) sent: u32,
    pub(crate) started_ns: u64,
    pub(crate) stalled: bool,
}

impl Client {
    pub(crate) fn new() -> Self {
        Self {
            socket: None,
            secure: None,
            phase: Phase::Idle,
            generation: 0,
            reader: FrameReader::default(),
            head: Vec::new(),
            unsent: Vec::new(),
            expected: [None; 2],
            position: None,
            sent: 0,
            started_ns: 0,
            stalled: false,
        }
    }

    /// Starts to connect from `source`; on loopback the connection usually stands when this returns.
    pub(crate) fn connect(&mut self, server: SocketAddr, source: Ipv4Addr) -> Result<(), Errno> {
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let socket =
            rustix::net::socket_with(AddressFamily::INET, SocketType::STREAM, flags, None)?;
        rustix::net::sockopt::set_tcp_nodelay(&socket, true)?;
        rustix::net::bind(&socket, &SocketAddr::V4(SocketAddrV4::new(source, 0)))?;
        match rustix::net::connect(&socket, &server) {
            Ok(()) | Err(Errno::INPROGRESS) => {}
            Err(error) => return Err(error),
        }
        self.socket = Some(socket);
        self.phase = Phase::Handshake;
        self.reader = FrameReader::default();
        self.head.clear();
        self.unsent.clear();
        self.stalled = false;
        Ok(())
    }

    /// Sends as much as the socket takes and keeps the rest; true when all of it went.
    pub(crate) fn send(&mut self, bytes: &[u8]) -> Result<bool, Errno> {
        match &mut self.secure {
            Some(secure) => {
                let encrypted = secure.write(bytes);
                self.send_as_is(&encrypted)
            }
            None => self.send_as_is(bytes),
        }
    }

    /// As [`Self::send`], without encryption.
    pub(crate) fn send_as_is(&mut self, bytes: &[u8]) -> Result<bool, Errno> {
        let Some(socket) = &self.socket else { return Ok(true) };
        if !self.unsent.is_empty() {
            self.unsent.extend_from_slice(bytes);
            return Ok(false);
        }
        let sent = match rustix::net::send(socket, bytes, SendFlags::NOSIGNAL) {
            Ok(sent) => sent,
            Err(Errno::AGAIN | Errno::NOTCONN) => 0,
            Err(error) => return Err(error),
        };
        self.unsent.extend_from_slice(&bytes[sent..]);
        Ok(self.unsent.is_empty())
    }

    /// Sends the bytes that were left over; true when none is left.
    pub(crate) fn flush(&mut self) -> Result<bool, Errno> {
        let unsent = std::mem::take(&mut self.unsent);
        self.send_as_is(&unsent)
    }

    /// Forgets the messages of the previous connection.
    pub(crate) fn start_over(&mut self) {
        self.expected = [None; 2];
        self.position = None;
    }

    /// Forgets the connection; its events of this round no longer count.
    pub(crate) fn reset(&mut self) {
        (self.socket, self.secure) = (None, None);
        self.phase = Phase::Idle;
        self.generation = self.generation.wrapping_add(1);
        self.head = Vec::new();
        self.unsent = Vec::new();
    }
}
