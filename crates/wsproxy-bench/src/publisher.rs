//! Publishes messages as a worker does: pipelined to Redis (or a server with its protocol), or as HTTP posts.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rustix::net::RecvFlags;

use crate::history::{Channel, Script};
use crate::resp::{self, Value};
use crate::target::{Kind, Target};

/// A connection over which messages are published, many at a time without waiting for answers.
#[derive(Debug)]
pub struct Publisher {
    stream: TcpStream,
    target: Target,
    speech: Speech,
    /// Names of the sessions' channels, made at first use: making a name costs more than sending.
    channels: Vec<Channel>,
    broadcast: Channel,
    script: Option<Script>,
    with_history: bool,
    output: Vec<u8>,
    input: Vec<u8>,
    /// Answers that have not come yet.
    outstanding: u64,
    /// Messages that reached no subscriber, by the server's own account.
    unheard: u64,
    refused: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Speech {
    Redis,
    Http,
}

impl Publisher {
    /// Connects to the server that takes the target's messages.
    pub fn connect(address: SocketAddr, target: &Target) -> Result<Self> {
        let stream = TcpStream::connect(address)
            .with_context(|| format!("no connection to the publishing side at {address}"))?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(ANSWER_TIMEOUT))?;
        let speech = if target.kind() == Kind::Nchan { Speech::Http } else { Speech::Redis };
        Ok(Self {
            stream,
            target: target.clone(),
            speech,
            channels: Vec::new(),
            broadcast: Channel::new(target.broadcast()),
            script: None,
            with_history: false,
            output: Vec::new(),
            input: Vec::new(),
            outstanding: 0,
            unheard: 0,
            refused: 0,
        })
    }

    /// Publishes with history from now on, or plain again.
    pub fn keep_history(&mut self, with_history: bool) -> Result<()> {
        anyhow::ensure!(self.speech == Speech::Redis, "only Redis keeps histories");
        if with_history && self.script.is_none() {
            let mut load = Vec::new();
            Script::push_load(&mut load);
            let answer = self.ask(&load)?;
            let mut values = Vec::new();
            let _ = resp::read(&answer, &mut values);
            match values.first() {
                Some(Value::Text(digest)) => {
                    self.script = Some(Script::new(digest, self.target.clock()));
                }
                other => bail!("Redis does not take the script: {other:?}"),
            }
        }
        self.with_history = with_history;
        Ok(())
    }

    /// Adds a message to all clients to the next flush.
    pub fn publish_to_all(&mut self, payload: &[u8]) {
        self.outstanding += 1;
        let Self { broadcast, script, with_history, output, .. } = self;
        push(broadcast, script.as_ref().filter(|_| *with_history), payload, output);
    }

    /// Adds a message to a session to the next flush.
    pub fn publish(&mut self, session: u32, payload: &[u8]) {
        self.outstanding += 1;
        match self.speech {
            Speech::Redis => {
                let known = self.channels.len() as u32;
                let target = &self.target;
                let new = (known..=session).map(|session| Channel::new(target.down(session)));
                self.channels.extend(new);
                let channel = &self.channels[session as usize];
                let script = self.script.as_ref().filter(|_| self.with_history);
                push(channel, script, payload, &mut self.output);
            }
            Speech::Http => {
                let path = self.target.publish_path(session);
                let length = payload.len();
                let _ = write!(
                    self.output,
                    "POST {path} HTTP/1.1\r\nHost: bench\r\nContent-Length: {length}\r\n\r\n"
                );
                self.output.extend_from_slice(payload);
            }
        }
    }

    /// Stores the tokens of these sessions, a few thousand at a time.
    pub fn set_tokens(&mut self, sessions: impl Iterator<Item = u32>) -> Result<()> {
        if !self.target.needs_token() {
            return Ok(());
        }
        for session in sessions {
            let (key, token) = (self.target.token_key(session), self.target.token(session));
            let parts: [&[u8]; 5] =
                [b"SET", key.as_bytes(), token.as_bytes(), b"EX", TOKEN_SECONDS];
            resp::push_command(&parts, &mut self.output);
            self.outstanding += 1;
            if self.output.len() > CHUNK_BYTES {
                self.settle()?;
            }
        }
        self.settle()
    }

    /// Sends the added messages, and takes the answers that are there already.
    pub fn flush(&mut self) -> Result<()> {
        if !self.output.is_empty() {
            self.stream.write_all(&self.output).context("the publishing side went away")?;
            self.output.clear();
        }
        self.take_answers(RecvFlags::DONTWAIT)?;
        while self.outstanding > OUTSTANDING_MAX {
            self.take_answers(RecvFlags::empty())?;
        }
        Ok(())
    }

    /// Sends the added messages and waits for every answer.
    pub fn settle(&mut self) -> Result<()> {
        self.flush()?;
        while self.outstanding > 0 {
            self.take_answers(RecvFlags::empty())?;
        }
        Ok(())
    }

    /// Returns the number of messages that reached no subscriber so far, by the server's own account.
    #[must_use]
    pub fn unheard(&self) -> u64 {
        self.unheard
    }

    /// Returns the number of refused commands so far.
    #[must_use]
    pub fn refused(&self) -> u64 {
        self.refused
    }

    /// Returns the process behind a Redis connection; `None` where the server does not tell.
    pub fn server_pid(&mut self) -> Option<u32> {
        self.info("server", "process_id")?.parse().ok()
    }

    /// Returns the number of commands that Redis has done since its start, those of scripts included; `None` where the
    /// server does not tell.
    pub fn server_commands(&mut self) -> Option<u64> {
        self.info("stats", "total_commands_processed")?.parse().ok()
    }

    /// Returns one line of a section of Redis' `INFO`.
    fn info(&mut self, section: &str, line: &str) -> Option<String> {
        if self.speech != Speech::Redis || self.target.kind() == Kind::Raw {
            return None;
        }
        let mut info = Vec::new();
        resp::push_command(&[b"INFO", section.as_bytes()], &mut info);
        let input = self.ask(&info).ok()?;
        let mut values = Vec::new();
        resp::read(&input, &mut values).ok()??;
        let text = std::str::from_utf8(values.first()?.text()).ok()?;
        let value = text.lines().find_map(|found| found.strip_prefix(line)?.strip_prefix(':'))?;
        Some(value.trim().to_owned())
    }

    /// Sends one command and waits for its answer.
    fn ask(&mut self, command: &[u8]) -> Result<Vec<u8>> {
        self.settle()?;
        self.stream.write_all(command)?;
        let mut answer = Vec::new();
        let whole = |answer: &[u8]| resp::read(answer, &mut Vec::new());
        while whole(&answer).map_err(|_| anyhow::anyhow!("not Redis' protocol"))?.is_none() {
            let mut chunk = [0u8; 4096];
            let read = self.stream.read(&mut chunk)?;
            anyhow::ensure!(read > 0, "the publishing side closed its connection");
            answer.extend_from_slice(&chunk[..read]);
        }
        Ok(answer)
    }

    fn take_answers(&mut self, flags: RecvFlags) -> Result<()> {
        let mut chunk = [0u8; 16 * 1024];
        while self.outstanding > 0 {
            match rustix::net::recv(&self.stream, &mut chunk[..], flags) {
                Ok((_, 0)) => bail!("the publishing side closed its connection"),
                Ok((_, read)) => self.input.extend_from_slice(&chunk[..read]),
                Err(error) => match std::io::Error::from(error).kind() {
                    ErrorKind::Interrupted => continue,
                    ErrorKind::WouldBlock if flags.contains(RecvFlags::DONTWAIT) => return Ok(()),
                    kind => bail!("no answers from the publishing side: {kind}"),
                },
            }
            match self.speech {
                Speech::Redis => self.read_replies()?,
                Speech::Http => self.read_responses()?,
            }
            if !flags.contains(RecvFlags::DONTWAIT) {
                return Ok(());
            }
        }
        Ok(())
    }

    fn read_replies(&mut self) -> Result<()> {
        let mut at = 0;
        let mut values = Vec::new();
        loop {
            let used = resp::read(&self.input[at..], &mut values).map_err(|_| {
                anyhow::anyhow!("the publishing side does not speak Redis' protocol")
            })?;
            let Some(used) = used else { break };
            at += used;
            self.outstanding = self.outstanding.saturating_sub(1);
            match values.first() {
                Some(Value::Integer(0)) => self.unheard += 1,
                Some(Value::Error(_)) => self.refused += 1,
                _ => {}
            }
        }
        self.input.drain(..at);
        Ok(())
    }

    fn read_responses(&mut self) -> Result<()> {
        let mut at = 0;
        while let Some(end) = find(&self.input[at..], b"\r\n\r\n") {
            let head = std::str::from_utf8(&self.input[at..at + end]).context("not HTTP")?;
            let status = head.split(' ').nth(1).and_then(|status| status.parse::<u16>().ok());
            let body = head.lines().find_map(|line| {
                let (name, value) = line.split_once(':')?;
                name.eq_ignore_ascii_case("content-length").then(|| value.trim().parse().ok())?
            });
            let whole = end + 4 + body.unwrap_or(0usize);
            if self.input.len() < at + whole {
                break;
            }
            at += whole;
            self.outstanding = self.outstanding.saturating_sub(1);
            match status {
                Some(201) => {}
                // Nchan stored the message, but had no subscriber.
                Some(202) => self.unheard += 1,
                _ => self.refused += 1,
            }
        }
        self.input.drain(..at);
        Ok(())
    }
}

fn push(channel: &Channel, script: Option<&Script>, payload: &[u8], output: &mut Vec<u8>) {
    match script {
        Some(script) => script.push(channel, payload, None, output),
        None => channel.push_plain(payload, output),
    }
}

fn find(haystack: &[u8], needle: &[u8]) -> Option<usize> {
    haystack.windows(needle.len()).position(|window| window == needle)
}

const ANSWER_TIMEOUT: Duration = Duration::from_secs(20);
const TOKEN_SECONDS: &[u8] = b"600";
const CHUNK_BYTES: usize = 256 * 1024;
/// Upper bound of unanswered messages. Beyond it the publisher waits, and the schedule shows the delay as latency.
const OUTSTANDING_MAX: u64 = 50_000;
