//! A caller over Redis as existing ones are: for each call it subscribes to a channel, asks whether the agent is there,
//! publishes, and unsubscribes.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;

use anyhow::{Context, Result};
use parking_lot::Mutex;

use super::answers::Answers;
use super::push_params;
use crate::resp;
use crate::stamp::CallStamp;
use crate::target::Target;

/// The caller. Its thread of answers publishes a call as soon as the subscription for its answer is confirmed.
#[derive(Debug)]
pub struct EachCaller {
    /// The answers.
    pub answers: Answers,
    /// Guards the writing side of the subscribing connection, which the thread of answers uses too.
    subscriber: Arc<Mutex<TcpStream>>,
    output: Vec<u8>,
}

/// Reaction of the thread of answers to the messages of its connection.
#[derive(Debug)]
pub struct Reaction {
    target: Target,
    agents: u32,
    size: usize,
    subscriber: Arc<Mutex<TcpStream>>,
    publisher: TcpStream,
    /// Commands of a round for each of the connections.
    subscribing: Vec<u8>,
    publishing: Vec<u8>,
}

impl EachCaller {
    /// Connects to Redis; calls go to `agents` agents in turn, with `size` bytes of parameters.
    ///
    /// # Errors
    /// There is no Redis.
    pub fn start(redis: SocketAddr, target: &Target, agents: u32, size: usize) -> Result<Self> {
        let stream = TcpStream::connect(redis).context("the caller has no Redis")?;
        stream.set_nodelay(true)?;
        let subscriber = Arc::new(Mutex::new(stream.try_clone()?));
        let publisher = TcpStream::connect(redis).context("the caller has no Redis")?;
        publisher.set_nodelay(true)?;
        publisher.set_nonblocking(true)?;
        let reaction = Reaction {
            target: target.clone(),
            agents,
            size,
            subscriber: Arc::clone(&subscriber),
            publisher,
            subscribing: Vec::new(),
            publishing: Vec::new(),
        };
        let answers = Answers::on(stream, Some(reaction))?;
        Ok(Self { answers, subscriber, output: Vec::new() })
    }

    pub(super) fn call(&mut self, stamp: CallStamp) {
        resp::push_command(&[b"SUBSCRIBE", &channel(stamp)], &mut self.output);
    }

    pub(super) fn flush(&mut self) -> Result<()> {
        if !self.output.is_empty() {
            self.subscriber.lock().write_all(&self.output)?;
            self.output.clear();
        }
        Ok(())
    }
}

impl Reaction {
    /// Publishes the call whose subscription is confirmed.
    pub(super) fn confirmed(&mut self, stamp: CallStamp) {
        let agent = stamp.number % self.agents;
        let mut payload = br#"{"type":"tool_call","requestId":""#.to_vec();
        stamp.write(&mut payload);
        payload.extend_from_slice(br#"","tool":"echo","params":"#);
        push_params(self.size, &mut payload);
        payload.push(b'}');
        let (server, down) = (self.target.agent_server(agent), self.target.down(agent));
        resp::push_command(&[b"EXISTS", server.as_bytes()], &mut self.publishing);
        resp::push_command(&[b"PUBLISH", down.as_bytes(), &payload], &mut self.publishing);
    }

    /// Leaves the channel of a call that was answered.
    pub(super) fn answered(&mut self, stamp: CallStamp) {
        resp::push_command(&[b"UNSUBSCRIBE", &channel(stamp)], &mut self.subscribing);
    }

    /// Sends the commands of a round, and drops Redis' answers to earlier ones.
    pub(super) fn flush(&mut self) -> Result<()> {
        if !self.subscribing.is_empty() {
            self.subscriber.lock().write_all(&self.subscribing)?;
            self.subscribing.clear();
        }
        let mut buffer = [0u8; 16 * 1024];
        while !self.publishing.is_empty() {
            match self.publisher.write(&self.publishing) {
                Ok(written) => drop(self.publishing.drain(..written)),
                Err(error) if error.kind() == ErrorKind::WouldBlock => std::thread::yield_now(),
                Err(error) => return Err(error.into()),
            }
        }
        match self.publisher.read(&mut buffer) {
            Ok(0) => anyhow::bail!("Redis closed the connection"),
            Ok(_) => Ok(()),
            Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

fn channel(stamp: CallStamp) -> Vec<u8> {
    let mut channel = b"response:".to_vec();
    stamp.write(&mut channel);
    channel
}
