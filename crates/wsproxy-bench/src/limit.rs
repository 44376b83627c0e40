//! The raw limit: a server that only writes prebuilt frames, one system call per message and socket.
//!
//! It knows only as much of HTTP and Redis as the clients need, which also measure real servers.

use std::collections::HashMap;
use std::io::Write;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};

use anyhow::{Context, Result};
use rustix::buffer::spare_capacity;
use rustix::event::epoll;
use rustix::fd::OwnedFd;
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, SocketFlags};

use wsproxy_proto::ws::frame::Opcode;

use crate::frame;
use crate::handshake::ACCEPT;
use crate::resp;

/// The server's state.
struct Limit {
    epoll: OwnedFd,
    listener: TcpListener,
    control: TcpListener,
    publisher: Option<TcpStream>,
    publisher_input: Vec<u8>,
    bus: Option<TcpStream>,
    bus_input: Vec<u8>,
    sockets: Vec<Option<Socket>>,
    free: Vec<u32>,
    sessions: HashMap<Vec<u8>, u32>,
    frame: Vec<u8>,
    output: Vec<u8>,
}

struct Socket {
    fd: OwnedFd,
    head: Vec<u8>,
    channel: Vec<u8>,
    open: bool,
}

/// Serves until it is killed. Without `redis`, every message published on its control port goes to all clients;
/// with it, each client's session is subscribed there.
pub fn serve(redis: Option<SocketAddr>) -> Result<()> {
    let mut limit = Limit::bind(redis)?;
    println!(
        "ready server={} publish={}",
        limit.listener.local_addr()?,
        limit.control.local_addr()?
    );
    limit.run()
}

impl Limit {
    fn bind(redis: Option<SocketAddr>) -> Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let bind = || -> Result<TcpListener> {
            let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
            rustix::net::listen(&listener, BACKLOG)?;
            listener.set_nonblocking(true)?;
            Ok(listener)
        };
        let (listener, control) = (bind()?, bind()?);
        let readable = epoll::EventFlags::IN;
        epoll::add(&epoll, &listener, epoll::EventData::new_u64(LISTENER), readable)?;
        epoll::add(&epoll, &control, epoll::EventData::new_u64(CONTROL), readable)?;
        let bus = redis.map(TcpStream::connect).transpose().context("no Redis")?;
        if let Some(bus) = &bus {
            bus.set_nodelay(true)?;
            epoll::add(&epoll, bus, epoll::EventData::new_u64(BUS), readable)?;
        }
        Ok(Self {
            epoll,
            listener,
            control,
            publisher: None,
            publisher_input: Vec::new(),
            bus,
            bus_input: Vec::new(),
            sockets: Vec::new(),
            free: Vec::new(),
            sessions: HashMap::new(),
            frame: Vec::new(),
            output: Vec::new(),
        })
    }

    fn run(&mut self) -> Result<()> {
        let mut events = Vec::with_capacity(EVENTS_MAX);
        let mut buffer = vec![0u8; READ_BYTES];
        loop {
            events.clear();
            match epoll::wait(&self.epoll, spare_capacity(&mut events), None) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
            for event in &events {
                match event.data.u64() {
                    LISTENER => self.accept()?,
                    CONTROL => self.accept_publisher()?,
                    PUBLISHER => self.on_publisher(&mut buffer)?,
                    BUS => self.on_bus(&mut buffer)?,
                    slot => self.on_socket(slot as u32, &mut buffer)?,
                }
            }
            self.flush_bus()?;
        }
    }

    fn accept(&mut self) -> Result<()> {
        loop {
            let fd = match rustix::net::accept_with(
                &self.listener,
                SocketFlags::NONBLOCK | SocketFlags::CLOEXEC,
            ) {
                Ok(fd) => fd,
                Err(Errno::AGAIN) => return Ok(()),
                Err(error) => return Err(error.into()),
            };
            rustix::net::sockopt::set_tcp_nodelay(&fd, true)?;
            let slot = self.free.pop().unwrap_or_else(|| {
                self.sockets.push(None);
                self.sockets.len() as u32 - 1
            });
            let data = epoll::EventData::new_u64(u64::from(slot));
            epoll::add(&self.epoll, &fd, data, epoll::EventFlags::IN)?;
            let socket = Socket { fd, head: Vec::new(), channel: Vec::new(), open: false };
            self.sockets[slot as usize] = Some(socket);
        }
    }

    fn accept_publisher(&mut self) -> Result<()> {
        let (stream, _) = self.control.accept()?;
        stream.set_nodelay(true)?;
        let data = epoll::EventData::new_u64(PUBLISHER);
        epoll::add(&self.epoll, &stream, data, epoll::EventFlags::IN)?;
        self.publisher = Some(stream);
        Ok(())
    }

    fn on_socket(&mut self, slot: u32, buffer: &mut [u8]) -> Result<()> {
        let Some(socket) = &mut self.sockets[slot as usize] else { return Ok(()) };
        let read = match rustix::net::recv(&socket.fd, &mut *buffer, RecvFlags::empty()) {
            Ok((_, 0)) => return self.close(slot),
            Ok((_, read)) => read,
            Err(Errno::AGAIN | Errno::INTR) => return Ok(()),
            Err(_) => return self.close(slot),
        };
        if socket.open {
            // A client only sends pongs and its close frame.
            let farewell = buffer[0] == 0x80 | Opcode::Close as u8;
            return if farewell { self.close(slot) } else { Ok(()) };
        }
        socket.head.extend_from_slice(&buffer[..read]);
        if !socket.head.ends_with(b"\r\n\r\n") {
            return Ok(());
        }
        let path = socket.head.split(|byte| *byte == b' ').nth(1).unwrap_or_default();
        let id = path.rsplit(|byte| *byte == b'/').next().unwrap_or_default();
        let mut channel = b"session:".to_vec();
        channel.extend_from_slice(id);
        channel.extend_from_slice(b":down");
        socket.head = Vec::new();
        if self.bus.is_none() {
            return self.upgrade(slot);
        }
        resp::push_command(&[b"SUBSCRIBE", &channel], &mut self.output);
        socket.channel.clone_from(&channel);
        self.sessions.insert(channel, slot);
        Ok(())
    }

    fn upgrade(&mut self, slot: u32) -> Result<()> {
        let Some(socket) = &mut self.sockets[slot as usize] else { return Ok(()) };
        let answer = format!(
            "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
             Sec-WebSocket-Accept: {ACCEPT}\r\n\r\n"
        );
        socket.open = true;
        match rustix::net::send(&socket.fd, answer.as_bytes(), SendFlags::NOSIGNAL) {
            Ok(_) => Ok(()),
            Err(_) => self.close(slot),
        }
    }

    fn close(&mut self, slot: u32) -> Result<()> {
        if let Some(socket) = self.sockets[slot as usize].take() {
            self.free.push(slot);
            if self.sessions.get(&socket.channel) == Some(&slot) {
                self.sessions.remove(&socket.channel);
                resp::push_command(&[b"UNSUBSCRIBE", &socket.channel], &mut self.output);
            }
        }
        Ok(())
    }

    /// Sends each message to all clients: one frame, then one write per socket.
    fn on_publisher(&mut self, buffer: &mut [u8]) -> Result<()> {
        let Some(publisher) = &self.publisher else { return Ok(()) };
        let read = match rustix::net::recv(publisher, &mut *buffer, RecvFlags::empty()) {
            Ok((_, 0)) | Err(Errno::CONNRESET) => {
                self.publisher = None;
                return Ok(());
            }
            Ok((_, read)) => read,
            Err(error) => return Err(error.into()),
        };
        let mut input = std::mem::take(&mut self.publisher_input);
        input.extend_from_slice(&buffer[..read]);
        let (mut at, mut values, mut replies) = (0, Vec::new(), Vec::new());
        while let Ok(Some(used)) = resp::read(&input[at..], &mut values) {
            at += used;
            let mut reached = 0;
            if let [_, _, payload] = values[..] {
                self.frame.clear();
                frame::push_server_frame(Opcode::Text, payload.text(), &mut self.frame);
                for slot in 0..self.sockets.len() as u32 {
                    reached += u64::from(self.write(slot));
                }
            }
            replies.extend_from_slice(format!(":{reached}\r\n").as_bytes());
        }
        input.drain(..at);
        self.publisher_input = input;
        if let Some(publisher) = &self.publisher {
            // A publisher that is gone shows on its next read.
            let _ = rustix::net::send(publisher, &replies, SendFlags::NOSIGNAL);
        }
        Ok(())
    }

    /// Sends each message to its session's client: one frame, one write.
    fn on_bus(&mut self, buffer: &mut [u8]) -> Result<()> {
        let Some(bus) = &self.bus else { return Ok(()) };
        let (_, read) = rustix::net::recv(bus, &mut *buffer, RecvFlags::empty())?;
        anyhow::ensure!(read > 0, "Redis closed the connection");
        let mut input = std::mem::take(&mut self.bus_input);
        input.extend_from_slice(&buffer[..read]);
        let (mut at, mut values) = (0, Vec::new());
        while let Ok(Some(used)) = resp::read(&input[at..], &mut values) {
            at += used;
            let [kind, channel, payload] = values[..] else { continue };
            let Some(&slot) = self.sessions.get(channel.text()) else { continue };
            match kind.text() {
                b"message" => {
                    self.frame.clear();
                    frame::push_server_frame(Opcode::Text, payload.text(), &mut self.frame);
                    self.write(slot);
                }
                b"subscribe" => self.upgrade(slot)?,
                _ => {}
            }
        }
        input.drain(..at);
        self.bus_input = input;
        Ok(())
    }

    fn write(&mut self, slot: u32) -> bool {
        let Some(socket) = &self.sockets[slot as usize] else { return false };
        if !socket.open {
            return false;
        }
        let sent = rustix::net::send(&socket.fd, &self.frame, SendFlags::NOSIGNAL);
        if sent == Ok(self.frame.len()) {
            return true;
        }
        // The bare loop keeps no bytes: a client that does not take a frame whole is dropped.
        let _ = self.close(slot);
        false
    }

    fn flush_bus(&mut self) -> Result<()> {
        if let Some(bus) = &mut self.bus
            && !self.output.is_empty()
        {
            bus.write_all(&self.output)?;
        }
        self.output.clear();
        Ok(())
    }
}

const LISTENER: u64 = u64::MAX;
const CONTROL: u64 = u64::MAX - 1;
const PUBLISHER: u64 = u64::MAX - 2;
const BUS: u64 = u64::MAX - 3;
const BACKLOG: i32 = 4096;
const EVENTS_MAX: usize = 1024;
const READ_BYTES: usize = 64 * 1024;
