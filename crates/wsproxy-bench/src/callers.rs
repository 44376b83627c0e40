//! Callers of tools, each kind by its own way: what a scenario needs of all of them. Knows no scenario.

pub mod answers;
pub mod each;
pub mod http;
pub mod own;

use anyhow::Result;
use hdrhistogram::Histogram;

use crate::clock::sleep_until;
use crate::stamp::CallStamp;

/// A caller of tools on users' agents. Each call has a stamp as its request id.
#[derive(Debug)]
pub enum Caller {
    /// Over Redis, with one channel for all answers.
    Own(own::OwnCaller),
    /// Over Redis, with a channel for each answer, as existing callers do.
    Each(each::EachCaller),
    /// Over HTTP.
    Http(http::HttpCaller),
}

/// Number of the calls that ended.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Ended {
    /// Calls that were answered with success.
    pub answered: u64,
    /// All others.
    pub failed: u64,
}

impl Ended {
    /// Returns the number of calls.
    #[must_use]
    pub fn all(self) -> u64 {
        self.answered + self.failed
    }
}

impl Caller {
    /// Waits until a time, and takes the answers that come meanwhile.
    ///
    /// # Errors
    /// The way is broken.
    pub fn wait_until(&mut self, at_ns: u64) -> Result<()> {
        match self {
            Self::Own(_) | Self::Each(_) => sleep_until(at_ns),
            Self::Http(caller) => caller.take_until(at_ns)?,
        }
        Ok(())
    }

    /// Adds a call to the next flush.
    pub fn call(&mut self, agent: u32, stamp: CallStamp) {
        match self {
            Self::Own(caller) => caller.call(agent, stamp),
            Self::Each(caller) => caller.call(stamp),
            Self::Http(caller) => caller.call(agent, stamp),
        }
    }

    /// Sends the calls that were added.
    ///
    /// # Errors
    /// The way is broken.
    pub fn flush(&mut self) -> Result<()> {
        match self {
            Self::Own(caller) => caller.flush(),
            Self::Each(caller) => caller.flush(),
            Self::Http(caller) => caller.flush(),
        }
    }

    /// Returns the number of calls that ended so far.
    #[must_use]
    pub fn ended(&self) -> Ended {
        match self {
            Self::Own(caller) => caller.answers.ended(),
            Self::Each(caller) => caller.answers.ended(),
            Self::Http(caller) => caller.ended(),
        }
    }

    /// Returns the durations of calls since the last report, in nanoseconds.
    #[must_use]
    pub fn report(&mut self) -> Histogram<u64> {
        match self {
            Self::Own(caller) => caller.answers.report(),
            Self::Each(caller) => caller.answers.report(),
            Self::Http(caller) => caller.report(),
        }
    }

    /// Returns the number of calls that reached no agent, by Redis' account.
    ///
    /// # Errors
    /// The way is broken.
    pub fn unheard(&mut self) -> Result<u64> {
        match self {
            Self::Own(caller) => caller.unheard(),
            // Their calls fail.
            Self::Each(_) | Self::Http(_) => Ok(0),
        }
    }
}

/// Appends the parameters of a call with `size` bytes of text.
fn push_params(size: usize, output: &mut Vec<u8>) {
    output.extend_from_slice(br#"{"text":""#);
    output.resize(output.len() + size, b'x');
    output.extend_from_slice(br#""}"#);
}
