//! Ends of users' agents: the time until a replaced and a revoked agent is told, and until the caller of a killed one is.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::ops::Range;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use hdrhistogram::Histogram;
use rustix::fd::OwnedFd;

use crate::callers::http::status_of_whole;
use crate::clock::now_ns;
use crate::frame::{Event, FrameReader};
use crate::handshake::{self, Answer};
use crate::options::Common;
use crate::report::Report;
use crate::resp::{self, Value};
use crate::target::{Kind, Target};

/// Options of the scenario. The database must have the users, as for `agents`; those that are revoked are removed.
#[derive(Debug, Args)]
pub struct Options {
    #[command(flatten)]
    pub(crate) common: Common,
    /// Another instance, to which newer agents connect, and which is told to revoke.
    #[arg(long)]
    other: SocketAddr,
    /// API key of that instance.
    #[arg(long)]
    api_key: String,
    /// Ends of each kind.
    #[arg(long, default_value_t = 100)]
    rounds: u32,
}

/// Runs the scenario.
pub fn run(options: &Options) -> Result<Report> {
    let common = &options.common;
    let run = common.run.as_deref().context("--run names the users")?;
    let target = Target::new(Kind::Agents, &common.path, run, false);
    let mut report = Report::new("agent-ends", "agents");
    report.set("rounds", options.rounds);
    let ends = Ends {
        server: common.server,
        other: options.other,
        redis: common.publish,
        api_key: options.api_key.clone(),
        target,
    };
    let rounds = options.rounds;
    report.quantiles("replaced", &times(0..rounds, |user| ends.replaced(user))?);
    report.quantiles("revoked", &times(rounds..2 * rounds, |user| ends.revoked(user))?);
    report.quantiles("gone", &times(2 * rounds..3 * rounds, |user| ends.gone(user))?);
    Ok(report)
}

/// Returns the times of ends of these users' agents, in nanoseconds.
fn times(users: Range<u32>, end: impl Fn(u32) -> Result<u64>) -> Result<Histogram<u64>> {
    let mut times = Histogram::new_with_bounds(1, 60_000_000_000, 3)?;
    for user in users {
        times.saturating_record(end(user).with_context(|| format!("user {user}"))?);
    }
    Ok(times)
}

struct Ends {
    server: SocketAddr,
    other: SocketAddr,
    redis: SocketAddr,
    api_key: String,
    target: Target,
}

/// Connection of an agent.
struct Agent {
    stream: TcpStream,
    frames: FrameReader,
    input: Vec<u8>,
}

impl Ends {
    /// Connects a user's agent at one instance, then at the other; returns the time until the first one is told.
    fn replaced(&self, user: u32) -> Result<u64> {
        let mut older = self.agent(self.server, user)?;
        let start_ns = now_ns();
        let _newer = self.agent(self.other, user)?;
        ensure!(older.closed()? == 4001, "another close code");
        Ok(now_ns() - start_ns)
    }

    /// Removes a user at the other instance; returns the time until the agent is told.
    fn revoked(&self, user: u32) -> Result<u64> {
        let mut agent = self.agent(self.server, user)?;
        let mut http = connect(self.other)?;
        let request = format!(
            "DELETE /api/v1/agents/{} HTTP/1.1\r\nHost: {}\r\nAuthorization: Bearer {}\r\n\r\n",
            self.target.session_id(user),
            self.other,
            self.api_key
        );
        let start_ns = now_ns();
        http.write_all(request.as_bytes())?;
        ensure!(agent.closed()? == 4401, "another close code");
        let took_ns = now_ns() - start_ns;
        let mut answer = Vec::new();
        while status_of_whole(&answer).is_none() {
            fill(&mut http, &mut answer)?;
        }
        let status = status_of_whole(&answer);
        ensure!(status.is_some_and(|status| (200..300).contains(&status)), "status {status:?}");
        Ok(took_ns)
    }

    /// Kills the process of an agent with a call in flight; returns the time until the caller is told.
    fn gone(&self, user: u32) -> Result<u64> {
        let mut agent = self.agent(self.server, user)?;
        let channel = format!("response:gone-{user}");
        let mut caller = connect(self.redis)?;
        let mut answers = Vec::new();
        send(&mut caller, &["SUBSCRIBE", &channel])?;
        message(&mut caller, &mut answers)?;
        let call = format!(
            r#"{{"type":"tool_call","requestId":"gone-{user}","tool":"never","params":{{}}}}"#
        );
        send(&mut connect(self.redis)?, &["PUBLISH", &self.target.down(user), &call])?;
        // `connected`, then the call.
        agent.message()?;
        agent.message()?;
        let socket = Stdio::from(OwnedFd::from(agent.stream));
        let mut process = Command::new("sleep").arg("60").stdin(socket).spawn()?;
        let start_ns = now_ns();
        process.kill()?;
        let answer = message(&mut caller, &mut answers)?;
        let took_ns = now_ns() - start_ns;
        process.wait()?;
        ensure!(answer.windows(10).any(|word| word == b"agent_gone"), "another outcome");
        Ok(took_ns)
    }

    fn agent(&self, server: SocketAddr, user: u32) -> Result<Agent> {
        let mut stream = connect(server)?;
        stream.write_all(&self.target.request(&server, user, None))?;
        let mut input = Vec::new();
        loop {
            fill(&mut stream, &mut input)?;
            match handshake::answer(&input) {
                Answer::Incomplete => {}
                Answer::Accepted(head) => {
                    input.drain(..head);
                    return Ok(Agent { stream, frames: FrameReader::default(), input });
                }
                other => bail!("the handshake is answered with {other:?}"),
            }
        }
    }
}

impl Agent {
    fn event(&mut self) -> Result<Event> {
        loop {
            let mut rest = &self.input[..];
            let event = self.frames.next(&mut rest);
            let used = self.input.len() - rest.len();
            self.input.drain(..used);
            match event {
                Ok(Some(event)) => return Ok(event),
                Ok(None) => fill(&mut self.stream, &mut self.input)?,
                Err(error) => bail!("the gateway breaks the protocol: {error:?}"),
            }
        }
    }

    /// Waits for a message.
    fn message(&mut self) -> Result<()> {
        while !matches!(self.event()?, Event::Message { .. }) {}
        Ok(())
    }

    /// Waits for the close frame, and returns its code.
    fn closed(&mut self) -> Result<u16> {
        loop {
            if let Event::Close(code) = self.event()? {
                return Ok(code);
            }
        }
    }
}

fn connect(address: SocketAddr) -> Result<TcpStream> {
    let stream = TcpStream::connect(address)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    Ok(stream)
}

fn fill(stream: &mut TcpStream, input: &mut Vec<u8>) -> Result<()> {
    let mut buffer = [0u8; 4096];
    let read = stream.read(&mut buffer)?;
    ensure!(read > 0, "the connection was closed");
    input.extend_from_slice(&buffer[..read]);
    Ok(())
}

fn send(redis: &mut TcpStream, words: &[&str]) -> Result<()> {
    let mut command = Vec::new();
    resp::push_command(&words.iter().map(|word| word.as_bytes()).collect::<Vec<_>>(), &mut command);
    Ok(redis.write_all(&command)?)
}

/// Waits for a message of a subscription, or its confirmation, and returns its payload.
fn message(redis: &mut TcpStream, input: &mut Vec<u8>) -> Result<Vec<u8>> {
    loop {
        let mut values = Vec::new();
        if let Ok(Some(used)) = resp::read(input, &mut values) {
            let payload = values.last().copied().map(Value::text).unwrap_or_default().to_vec();
            input.drain(..used);
            return Ok(payload);
        }
        fill(redis, input)?;
    }
}

/// Longest wait for anything.
const PATIENCE: Duration = Duration::from_secs(10);
