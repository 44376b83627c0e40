//! The worker of the echo scenario: sends each session's upstream messages back down to the same session.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::resp;

/// The worker's thread. Dropping this ends it.
#[derive(Debug)]
pub struct EchoWorker {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl EchoWorker {
    /// Subscribes to every channel that matches `pattern`; returns when the subscription is confirmed.
    pub fn start(redis: SocketAddr, pattern: &str) -> Result<Self> {
        let mut up = TcpStream::connect(redis).context("the worker has no Redis")?;
        let down = TcpStream::connect(redis).context("the worker has no Redis")?;
        down.set_nodelay(true)?;
        down.set_nonblocking(false)?;
        let mut command = Vec::new();
        resp::push_command(&[b"PSUBSCRIBE", pattern.as_bytes()], &mut command);
        up.write_all(&command)?;
        let mut confirmation = [0u8; 256];
        let confirmed = up.read(&mut confirmation)?;
        anyhow::ensure!(confirmation[..confirmed].starts_with(b"*3"), "no subscription");
        up.set_read_timeout(Some(Duration::from_millis(100)))?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::Builder::new().name("worker".to_owned()).spawn(move || {
            // The scenario notices a failed worker: its messages do not come back.
            if let Err(error) = answer(up, down, &stopped) {
                eprintln!("The worker ended: {error:#}");
            }
        })?;
        Ok(Self { stop, thread: Some(thread) })
    }
}

impl Drop for EchoWorker {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn answer(mut up: TcpStream, mut down: TcpStream, stop: &AtomicBool) -> Result<()> {
    let mut input = Vec::new();
    let mut output = Vec::new();
    let mut channel = Vec::new();
    let mut buffer = vec![0u8; READ_BYTES];
    while !stop.load(Ordering::Acquire) {
        let read = match up.read(&mut buffer) {
            Ok(0) => anyhow::bail!("Redis closed the connection"),
            Ok(read) => read,
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                continue;
            }
            Err(error) => return Err(error.into()),
        };
        input.extend_from_slice(&buffer[..read]);
        let (mut at, mut values) = (0, Vec::new());
        while let Ok(Some(used)) = resp::read(&input[at..], &mut values) {
            at += used;
            let [_, _, from, payload] = values[..] else { continue };
            channel.clear();
            channel.extend_from_slice(from.text().strip_suffix(b"up").unwrap_or_default());
            channel.extend_from_slice(b"down");
            resp::push_command(&[b"PUBLISH", &channel, payload.text()], &mut output);
        }
        input.drain(..at);
        down.write_all(&output)?;
        output.clear();
        // Redis' answers hold only the number of receivers; taking them keeps Redis from buffering them.
        let flags = rustix::net::RecvFlags::DONTWAIT;
        while let Ok((_, 1..)) = rustix::net::recv(&down, &mut buffer[..], flags) {}
    }
    Ok(())
}

const READ_BYTES: usize = 64 * 1024;
