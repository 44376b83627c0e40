//! A caller's subscription: takes the answers of agents from one channel of Redis, and notes how long each call took.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result};
use hdrhistogram::Histogram;
use parking_lot::Mutex;

use super::Ended;
use super::each::Reaction;
use crate::clock::now_ns;
use crate::resp;
use crate::stamp::CallStamp;

/// The subscriber's thread. Dropping this ends it.
#[derive(Debug)]
pub struct Answers {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    stop: AtomicBool,
    /// Answers that say success.
    answered: AtomicU64,
    /// All other answers.
    failed: AtomicU64,
    /// Guards the durations since the last report.
    durations: Mutex<Histogram<u64>>,
}

impl Answers {
    /// Subscribes to `channel`; returns when the subscription is confirmed.
    pub fn start(redis: SocketAddr, channel: &str) -> Result<Self> {
        let mut stream = TcpStream::connect(redis).context("the caller has no Redis")?;
        let mut command = Vec::new();
        resp::push_command(&[b"SUBSCRIBE", channel.as_bytes()], &mut command);
        stream.write_all(&command)?;
        let mut confirmation = [0u8; 256];
        let confirmed = stream.read(&mut confirmation)?;
        anyhow::ensure!(confirmation[..confirmed].starts_with(b"*3"), "no subscription");
        Self::on(stream, None)
    }

    /// Takes answers from a connection; `reaction` has the calls whose channels are subscribed one by one.
    ///
    /// # Errors
    /// There is no thread.
    pub(super) fn on(stream: TcpStream, reaction: Option<Reaction>) -> Result<Self> {
        stream.set_read_timeout(Some(Duration::from_millis(100)))?;
        let shared = Arc::new(Shared {
            stop: AtomicBool::new(false),
            answered: AtomicU64::new(0),
            failed: AtomicU64::new(0),
            durations: Mutex::new(Histogram::new_with_bounds(1, DURATION_NS_MAX, 3)?),
        });
        let of_thread = Arc::clone(&shared);
        let thread = std::thread::Builder::new().name("answers".to_owned()).spawn(move || {
            // The scenario notices a failed caller: its answers do not come.
            if let Err(error) = take(stream, reaction, &of_thread) {
                eprintln!("The caller ended: {error:#}");
            }
        })?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// Returns the number of answers so far.
    #[must_use]
    pub fn ended(&self) -> Ended {
        Ended {
            answered: self.shared.answered.load(Ordering::Relaxed),
            failed: self.shared.failed.load(Ordering::Relaxed),
        }
    }

    /// Returns the durations of calls since the last report, in nanoseconds.
    #[must_use]
    pub fn report(&self) -> Histogram<u64> {
        let mut durations = self.shared.durations.lock();
        let taken = durations.clone();
        durations.reset();
        taken
    }
}

impl Drop for Answers {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn take(mut stream: TcpStream, mut reaction: Option<Reaction>, shared: &Shared) -> Result<()> {
    let mut input = Vec::new();
    let mut buffer = vec![0u8; READ_BYTES];
    while !shared.stop.load(Ordering::Acquire) {
        let read = match stream.read(&mut buffer) {
            Ok(0) => anyhow::bail!("Redis closed the connection"),
            Ok(read) => read,
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                continue;
            }
            Err(error) => return Err(error.into()),
        };
        let now = now_ns();
        input.extend_from_slice(&buffer[..read]);
        let (mut at, mut values) = (0, Vec::new());
        let mut durations = shared.durations.lock();
        while let Ok(Some(used)) = resp::read(&input[at..], &mut values) {
            at += used;
            let [kind, channel, payload] = values[..] else { continue };
            // The answers on a channel of one call do not name it.
            let of_channel = CallStamp::of_channel(channel.text());
            if let (Some(reaction), Some(call)) = (&mut reaction, of_channel) {
                match kind.text() {
                    b"subscribe" => reaction.confirmed(call),
                    b"message" => reaction.answered(call),
                    _ => {}
                }
            }
            if kind.text() != b"message" {
                continue;
            }
            let answer = payload.text();
            let is_good = answer.windows(SUCCESS.len()).any(|window| window == SUCCESS);
            let count = if is_good { &shared.answered } else { &shared.failed };
            count.fetch_add(1, Ordering::Relaxed);
            if let Some(call) = of_channel.or_else(|| CallStamp::read(answer)) {
                durations.saturating_record(now.saturating_sub(call.sent_ns));
            }
        }
        drop(durations);
        input.drain(..at);
        if let Some(reaction) = &mut reaction {
            reaction.flush()?;
        }
    }
    Ok(())
}

/// Longest duration that is told apart.
pub(super) const DURATION_NS_MAX: u64 = 60_000_000_000;
const READ_BYTES: usize = 64 * 1024;
const SUCCESS: &[u8] = b"\"success\":true";
