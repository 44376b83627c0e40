//! A publisher that survives an outage of Redis: it publishes unacknowledged messages again, in the same order.

use std::collections::VecDeque;
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Result, bail};

use crate::clock::now_ns;
use crate::history::{Channel, Once, Script};
use crate::resp::{self, Value};
use crate::stamp::Stamp;
use crate::target::Target;

/// Publishes with history, each message once, however often its connection is lost.
#[derive(Debug)]
pub struct PersistentPublisher {
    address: SocketAddr,
    channels: Vec<Channel>,
    run: String,
    bytes: usize,
    /// Messages that were never sent, or whose acknowledgement did not come, in the order of their numbers.
    waiting: VecDeque<Message>,
    /// Messages that were sent, in the order in which they are acknowledged.
    sent: VecDeque<Message>,
    connection: Option<Connection>,
    retry_ns: u64,
    counts: Counts,
}

/// Counts of messages by their fate.
#[derive(Debug, Clone, Copy, Default)]
pub struct Counts {
    /// Acknowledged by Redis.
    pub acknowledged: u64,
    /// Sent again.
    pub retried: u64,
    /// Sent again, although Redis had them already.
    pub known: u64,
    /// Connections that were lost.
    pub outages: u64,
    /// Time of Redis' last answer after an outage, in monotonic nanoseconds; 0 before the first outage.
    pub answered_ns: u64,
}

#[derive(Debug, Clone, Copy)]
struct Message {
    session: u32,
    number: u32,
    sent_ns: u64,
}

#[derive(Debug)]
struct Connection {
    stream: TcpStream,
    script: Script,
    output: Vec<u8>,
    written: usize,
    input: Vec<u8>,
}

impl PersistentPublisher {
    /// Connects, to the channels of `sessions` sessions.
    pub fn connect(
        address: SocketAddr,
        target: &Target,
        sessions: u32,
        bytes: usize,
    ) -> Result<Self> {
        let Some(connection) = Connection::open(address) else {
            bail!("no Redis at {address}");
        };
        Ok(Self {
            address,
            channels: (0..sessions).map(|session| Channel::new(target.down(session))).collect(),
            run: target.session_id(0),
            bytes,
            waiting: VecDeque::new(),
            sent: VecDeque::new(),
            connection: Some(connection),
            retry_ns: 0,
            counts: Counts::default(),
        })
    }

    /// Adds a message; the next step sends it.
    pub fn publish(&mut self, session: u32, number: u32, sent_ns: u64) {
        self.waiting.push_back(Message { session, number, sent_ns });
    }

    /// Messages that are not acknowledged yet.
    #[must_use]
    pub fn outstanding(&self) -> usize {
        self.waiting.len() + self.sent.len()
    }

    /// Counts of messages so far.
    #[must_use]
    pub fn counts(&self) -> Counts {
        self.counts
    }

    /// Connects if necessary, sends what the socket takes and reads what has arrived; never waits for long.
    pub fn step(&mut self) -> Result<()> {
        if self.connection.is_none() && now_ns() >= self.retry_ns {
            self.connection = Connection::open(self.address);
            self.retry_ns = now_ns() + RETRY_NS;
            if self.connection.is_some() {
                self.counts.answered_ns = now_ns();
            }
        }
        self.encode();
        let Some(connection) = &mut self.connection else { return Ok(()) };
        let alive = connection.write() && connection.read();
        self.take_answers()?;
        if !alive {
            self.connection = None;
            self.counts.outages += 1;
            self.counts.retried += self.sent.len() as u64;
            // Unacknowledged messages go first: within a session messages leave in the order of their numbers.
            while let Some(message) = self.sent.pop_back() {
                self.waiting.push_front(message);
            }
        }
        Ok(())
    }

    fn encode(&mut self) {
        let Some(connection) = &mut self.connection else { return };
        let mut payload = Vec::with_capacity(self.bytes);
        while connection.output.len() < OUTPUT_BYTES_MAX && self.sent.len() < SENT_MAX {
            let Some(message) = self.waiting.pop_front() else { return };
            let Message { session, number, sent_ns } = message;
            payload.clear();
            Stamp { sent_ns, number, shared: false }.write(self.bytes, &mut payload);
            let key = format!("bench:{}:{session}:{number}", self.run);
            let (channel, once) = (&self.channels[session as usize], Once { key: &key });
            connection.script.push(channel, &payload, Some(once), &mut connection.output);
            self.sent.push_back(message);
        }
    }

    fn take_answers(&mut self) -> Result<()> {
        let Some(connection) = &mut self.connection else { return Ok(()) };
        let mut at = 0;
        let mut values = Vec::new();
        while let Ok(Some(used)) = resp::read(&connection.input[at..], &mut values) {
            at += used;
            match values[..] {
                [Value::Integer(_), _, Value::Integer(known)] => {
                    self.counts.known += u64::from(known == 1);
                    self.counts.acknowledged += 1;
                    self.sent.pop_front();
                }
                [Value::Error(error), ..] => {
                    bail!("Redis refused a message: {}", String::from_utf8_lossy(error))
                }
                _ => bail!("Redis answered a publish with {values:?}"),
            }
        }
        connection.input.drain(..at);
        Ok(())
    }
}

impl Connection {
    /// Opens a connection to a Redis that is ready; `None` where Redis is absent or still loads its data.
    fn open(address: SocketAddr) -> Option<Self> {
        let stream = TcpStream::connect(address).ok()?;
        stream.set_nodelay(true).ok()?;
        stream.set_read_timeout(Some(OPEN_TIMEOUT)).ok()?;
        let mut command = Vec::new();
        Script::push_load(&mut command);
        (&stream).write_all(&command).ok()?;
        let mut answer = Vec::new();
        loop {
            let mut values = Vec::new();
            if resp::read(&answer, &mut values).ok()?.is_some() {
                let [Value::Text(digest)] = values[..] else { return None };
                let script = Script::new(digest, None);
                stream.set_nonblocking(true).ok()?;
                let (output, input) = (Vec::new(), Vec::new());
                return Some(Self { stream, script, output, written: 0, input });
            }
            let mut chunk = [0u8; 4096];
            let read = (&stream).read(&mut chunk).ok().filter(|read| *read > 0)?;
            answer.extend_from_slice(&chunk[..read]);
        }
    }

    /// False when the connection is gone.
    fn write(&mut self) -> bool {
        while self.written < self.output.len() {
            match (&self.stream).write(&self.output[self.written..]) {
                Ok(written) if written > 0 => self.written += written,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return true,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                _ => return false,
            }
        }
        self.output.clear();
        self.written = 0;
        true
    }

    /// False when the connection is gone.
    fn read(&mut self) -> bool {
        let mut chunk = [0u8; 64 * 1024];
        loop {
            match (&self.stream).read(&mut chunk) {
                Ok(read) if read > 0 => self.input.extend_from_slice(&chunk[..read]),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return true,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                _ => return false,
            }
        }
    }
}

const OPEN_TIMEOUT: Duration = Duration::from_secs(1);
const RETRY_NS: u64 = 5_000_000;
const OUTPUT_BYTES_MAX: usize = 256 * 1024;
/// Upper bound of messages in flight. More of them do not make Redis faster.
const SENT_MAX: usize = 10_000;

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;
    use crate::target::Kind;

    /// Serves one connection: answers with the script's digest, then each publish from `answers`, and ends.
    /// Returns the keys that keep messages from being published twice, in the order in which they came.
    fn serve(listener: &TcpListener, answers: &[Option<&str>]) -> Vec<String> {
        let (mut stream, _) = listener.accept().unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        let (mut input, mut keys) = (Vec::new(), Vec::new());
        let mut loaded = false;
        while keys.len() < answers.len() {
            let mut values = Vec::new();
            let Some(used) = resp::read(&input, &mut values).unwrap() else {
                let mut chunk = [0u8; 4096];
                let read = stream.read(&mut chunk).unwrap();
                assert!(read > 0, "the publisher went away");
                input.extend_from_slice(&chunk[..read]);
                continue;
            };
            if loaded {
                let answer = answers[keys.len()].unwrap_or_default();
                stream.write_all(answer.as_bytes()).unwrap();
                keys.push(String::from_utf8(values[5].text().to_vec()).unwrap());
            } else {
                stream.write_all(b"$1\r\nd\r\n").unwrap();
                loaded = true;
            }
            input.drain(..used);
        }
        keys
    }

    #[test]
    fn what_was_not_acknowledged_is_published_again_in_order() {
        const NEW: Option<&str> = Some("*3\r\n:1\r\n$3\r\n5-1\r\n:0\r\n");
        const KNOWN: Option<&str> = Some("*3\r\n:0\r\n$3\r\n5-1\r\n:1\r\n");
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let redis = std::thread::spawn(move || {
            // Redis has stored the second message, but the publisher gets no answer.
            let first = serve(&listener, &[NEW, None, None]);
            (first, serve(&listener, &[KNOWN, NEW, NEW]))
        });
        let target = Target::new(Kind::Wsproxy, "", "r", false);
        let mut publisher = PersistentPublisher::connect(address, &target, 2, 64).unwrap();
        for number in 0..3 {
            publisher.publish(1, number, 7);
        }
        let deadline = now_ns() + 10_000_000_000;
        while publisher.counts().outages == 0 {
            publisher.step().unwrap();
            assert!(now_ns() < deadline);
        }
        publisher.publish(1, 3, 8);
        while publisher.outstanding() > 0 {
            publisher.step().unwrap();
            assert!(now_ns() < deadline);
        }
        let (first, second) = redis.join().unwrap();
        assert_eq!(first, ["bench:r-0:1:0", "bench:r-0:1:1", "bench:r-0:1:2"]);
        assert_eq!(second, ["bench:r-0:1:1", "bench:r-0:1:2", "bench:r-0:1:3"]);
        let Counts { acknowledged, retried, known, answered_ns, .. } = publisher.counts();
        assert_eq!((acknowledged, retried, known), (4, 2, 1));
        assert!(answered_ns > 0);
    }
}
