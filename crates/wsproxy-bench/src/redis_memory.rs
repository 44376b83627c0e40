//! Memory that connected agents take in Redis, as Redis itself counts it; knows no scenario.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::resp::{self, Value};
use crate::target::Target;

/// Returns the bytes of one agent, the average of some: its own keys, and its share of its instance's hash.
///
/// # Errors
/// Redis is away, or does not answer.
pub fn bytes_per_agent(redis: SocketAddr, target: &Target, agents: u32) -> Result<f64> {
    let stream = TcpStream::connect(redis).context("there is no Redis")?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    let mut redis = Connection { stream, input: Vec::new() };
    let sample = agents.clamp(1, SAMPLE_MAX);
    let mut bytes = 0;
    for agent in 0..sample {
        for key in target.agent_keys(agent) {
            bytes += redis.number(&["MEMORY", "USAGE", &key, "SAMPLES", "0"])?;
        }
    }
    let server = redis.text(&["GET", &target.agent_server(0)])?;
    let hash = target.agents_of(&server);
    let (of_hash, entries) = (
        redis.number(&["MEMORY", "USAGE", &hash, "SAMPLES", "0"])?,
        redis.number(&["HLEN", &hash])?,
    );
    Ok(bytes as f64 / f64::from(sample) + of_hash as f64 / entries.max(1) as f64)
}

struct Connection {
    stream: TcpStream,
    input: Vec<u8>,
}

impl Connection {
    /// Asks for a number; 0 for an absent key.
    fn number(&mut self, words: &[&str]) -> Result<i64> {
        self.ask(words, |value| match value {
            Value::Integer(number) => Ok(number),
            Value::Null => Ok(0),
            other => bail!("Redis answers {other:?}"),
        })
    }

    fn text(&mut self, words: &[&str]) -> Result<String> {
        self.ask(words, |value| Ok(String::from_utf8_lossy(value.text()).into_owned()))
    }

    fn ask<T>(&mut self, words: &[&str], take: impl FnOnce(Value<'_>) -> Result<T>) -> Result<T> {
        let words: Vec<_> = words.iter().map(|word| word.as_bytes()).collect();
        let mut command = Vec::new();
        resp::push_command(&words, &mut command);
        self.stream.write_all(&command)?;
        self.input.clear();
        let mut buffer = [0u8; 4096];
        loop {
            let read = self.stream.read(&mut buffer)?;
            if read == 0 {
                bail!("Redis closed the connection");
            }
            self.input.extend_from_slice(&buffer[..read]);
            let mut values = Vec::new();
            match resp::read(&self.input, &mut values) {
                Ok(None) => {}
                Ok(Some(_)) => return take(values.first().copied().unwrap_or(Value::Null)),
                Err(_) => bail!("Redis answers something else than its protocol"),
            }
        }
    }
}

/// Agents whose keys are looked at.
const SAMPLE_MAX: u32 = 200;
const TIMEOUT: Duration = Duration::from_secs(10);
