//! A caller over HTTP: a pool of connections on one epoll loop, each with one call at a time.

use std::collections::VecDeque;
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};

use anyhow::{Context, Result, bail};
use hdrhistogram::Histogram;
use rustix::buffer::spare_capacity;
use rustix::event::{Timespec, epoll};
use rustix::fd::OwnedFd;

use super::answers::DURATION_NS_MAX;
use super::{Ended, push_params};
use crate::clock::{NS_PER_SECOND, now_ns};
use crate::stamp::CallStamp;
use crate::target::Target;

/// The caller. A call that finds no free connection waits for one, and its time runs.
#[derive(Debug)]
pub struct HttpCaller {
    target: Target,
    server: SocketAddr,
    key: String,
    size: usize,
    epoll: OwnedFd,
    connections: Vec<Connection>,
    /// Connections without a call, the longest idle one first: the gateway closes those that idle for long.
    free: VecDeque<usize>,
    /// Calls without a connection: agent and stamp.
    due: VecDeque<(u32, CallStamp)>,
    ended: Ended,
    durations: Histogram<u64>,
    request: Vec<u8>,
}

#[derive(Debug)]
struct Connection {
    stream: TcpStream,
    input: Vec<u8>,
    /// The time at which the present call was due.
    sent_ns: u64,
}

impl HttpCaller {
    /// Connects; calls have `size` bytes of parameters.
    ///
    /// # Errors
    /// There is no server.
    pub fn start(server: SocketAddr, key: &str, target: &Target, size: usize) -> Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let mut connections = Vec::with_capacity(CONNECTIONS);
        for number in 0..CONNECTIONS {
            let stream = TcpStream::connect(server).context("the caller has no gateway")?;
            stream.set_nodelay(true)?;
            stream.set_nonblocking(true)?;
            let data = epoll::EventData::new_u64(number as u64);
            epoll::add(&epoll, &stream, data, epoll::EventFlags::IN)?;
            connections.push(Connection { stream, input: Vec::new(), sent_ns: 0 });
        }
        Ok(Self {
            target: target.clone(),
            server,
            key: key.to_owned(),
            size,
            epoll,
            free: (0..connections.len()).collect(),
            connections,
            due: VecDeque::new(),
            ended: Ended::default(),
            durations: Histogram::new_with_bounds(1, DURATION_NS_MAX, 3)?,
            request: Vec::new(),
        })
    }

    pub(super) fn call(&mut self, agent: u32, stamp: CallStamp) {
        self.due.push_back((agent, stamp));
    }

    /// Sends due calls over the connections that are free.
    pub(super) fn flush(&mut self) -> Result<()> {
        while !self.due.is_empty()
            && let Some(free) = self.free.pop_front()
            && let Some((agent, stamp)) = self.due.pop_front()
        {
            self.write_request(agent, stamp);
            let connection = &mut self.connections[free];
            connection.sent_ns = stamp.sent_ns;
            // An empty socket takes a request of this size.
            connection.stream.write_all(&self.request)?;
        }
        Ok(())
    }

    fn write_request(&mut self, agent: u32, stamp: CallStamp) {
        let mut body = Vec::with_capacity(self.size + 48);
        body.extend_from_slice(br#"{"tool":"echo","params":"#);
        push_params(self.size, &mut body);
        body.push(b'}');
        let mut id = Vec::with_capacity(32);
        stamp.write(&mut id);
        self.request.clear();
        // Writing into a Vec cannot fail.
        let _ = write!(
            self.request,
            "POST /api/v1/agents/{}/calls HTTP/1.1\r\nHost: {}\r\nAuthorization: Bearer {}\r\n\
             Idempotency-Key: {}\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n",
            self.target.session_id(agent),
            self.server,
            self.key,
            String::from_utf8_lossy(&id),
            body.len(),
        );
        self.request.extend_from_slice(&body);
    }

    /// Takes answers until a time, and sends waiting calls over the connections that they free.
    pub(super) fn take_until(&mut self, at_ns: u64) -> Result<()> {
        let mut events = Vec::with_capacity(CONNECTIONS);
        loop {
            let left = at_ns.saturating_sub(now_ns());
            let wait = Timespec {
                tv_sec: (left / NS_PER_SECOND) as i64,
                tv_nsec: (left % NS_PER_SECOND) as i64,
            };
            events.clear();
            match epoll::wait(&self.epoll, spare_capacity(&mut events), Some(&wait)) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
            for event in &events {
                let data = event.data;
                self.take(data.u64() as usize)?;
            }
            self.flush()?;
            if left == 0 {
                return Ok(());
            }
        }
    }

    fn take(&mut self, number: usize) -> Result<()> {
        let connection = &mut self.connections[number];
        let mut buffer = [0u8; 4096];
        let read = match connection.stream.read(&mut buffer) {
            Ok(0) => bail!("the gateway closed a connection"),
            Ok(read) => read,
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        connection.input.extend_from_slice(&buffer[..read]);
        let Some(status) = status_of_whole(&connection.input) else { return Ok(()) };
        connection.input.clear();
        let took_ns = now_ns().saturating_sub(connection.sent_ns);
        self.free.push_back(number);
        if status == 200 {
            self.ended.answered += 1;
            self.durations.saturating_record(took_ns);
        } else {
            self.ended.failed += 1;
        }
        Ok(())
    }

    pub(super) fn ended(&self) -> Ended {
        self.ended
    }

    pub(super) fn report(&mut self) -> Histogram<u64> {
        let taken = self.durations.clone();
        self.durations.reset();
        taken
    }
}

/// Returns the status of an answer whose body is complete.
#[must_use]
pub fn status_of_whole(input: &[u8]) -> Option<u16> {
    let end = input.windows(4).position(|window| window == b"\r\n\r\n")? + 4;
    let head = std::str::from_utf8(&input[..end]).ok()?;
    let length = head.split("\r\n").find_map(|line| {
        let (name, value) = line.split_once(':')?;
        let is_length = name.eq_ignore_ascii_case("content-length");
        is_length.then(|| value.trim().parse::<usize>().ok())?
    });
    let is_whole = input.len() >= end + length.unwrap_or(0);
    is_whole.then(|| head.split(' ').nth(1)?.parse().ok())?
}

/// Connections of the pool: with answers after 10 ms, enough for 12,800 calls a second.
const CONNECTIONS: usize = 128;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_taken_when_their_body_is_complete() {
        let answer = b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nbody";
        assert_eq!(status_of_whole(answer), Some(200));
        for end in 0..answer.len() {
            assert_eq!(status_of_whole(&answer[..end]), None);
        }
        assert_eq!(status_of_whole(b"HTTP/1.1 204 No Content\r\n\r\n"), Some(204));
    }
}
