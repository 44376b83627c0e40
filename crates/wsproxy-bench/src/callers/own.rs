//! A caller over Redis with one channel for the answers to all its calls.

use std::net::SocketAddr;

use anyhow::Result;

use super::answers::Answers;
use super::push_params;
use crate::publisher::Publisher;
use crate::stamp::CallStamp;
use crate::target::Target;

/// The caller.
#[derive(Debug)]
pub struct OwnCaller {
    /// The answers.
    pub answers: Answers,
    publisher: Publisher,
    /// Id of the channel of answers.
    channel: String,
    size: usize,
    payload: Vec<u8>,
}

impl OwnCaller {
    /// Connects to Redis; calls have `size` bytes of parameters.
    ///
    /// # Errors
    /// There is no Redis.
    pub fn start(redis: SocketAddr, target: &Target, size: usize) -> Result<Self> {
        let channel = target.run().to_owned();
        Ok(Self {
            answers: Answers::start(redis, &format!("response:{channel}"))?,
            publisher: Publisher::connect(redis, target)?,
            channel,
            size,
            payload: Vec::new(),
        })
    }

    pub(super) fn call(&mut self, agent: u32, stamp: CallStamp) {
        let payload = &mut self.payload;
        payload.clear();
        payload.extend_from_slice(br#"{"type":"tool_call","requestId":""#);
        stamp.write(payload);
        payload.extend_from_slice(br#"","tool":"echo","params":"#);
        push_params(self.size, payload);
        payload.extend_from_slice(br#","replyTo":"response:"#);
        payload.extend_from_slice(self.channel.as_bytes());
        payload.extend_from_slice(b"\"}");
        self.publisher.publish(agent, payload);
    }

    pub(super) fn flush(&mut self) -> Result<()> {
        self.publisher.flush()
    }

    pub(super) fn unheard(&mut self) -> Result<u64> {
        self.publisher.settle()?;
        Ok(self.publisher.unheard())
    }
}
