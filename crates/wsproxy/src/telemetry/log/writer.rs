//! A thread that writes lines, behind a buffer of bounded size.

use std::{
    io::{ErrorKind, Write},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use parking_lot::{Condvar, Mutex};

/// Lines that were dropped since the process started, because standard error was stuck or gone.
#[must_use]
pub fn dropped_lines() -> u64 {
    DROPPED.load(Ordering::Relaxed)
}

/// One log per process, and so one counter.
static DROPPED: AtomicU64 = AtomicU64::new(0);

/// The buffer between those who log and the thread that writes.
///
/// Invariant: never holds more than [`BUFFER_BYTES_MAX`] (and as much again is being written). A
/// line beyond it is dropped and counted, since a message must never wait for a log.
#[derive(Clone)]
pub(super) struct Writer(Arc<Shared>);

struct Shared {
    state: Mutex<State>,
    /// Lines came.
    filled: Condvar,
    /// Everything has been written.
    written: Condvar,
}

/// The lock guards the hand-over of lines, not the writing.
#[derive(Default)]
struct State {
    lines: Vec<u8>,
    lines_count: u64,
    writing: bool,
}

impl Writer {
    /// Starts the thread. It lives as long as the process: whoever logs last cannot be known.
    pub(super) fn start(out: impl Write + Send + 'static) -> std::io::Result<Self> {
        let (filled, written) = (Condvar::new(), Condvar::new());
        let shared = Arc::new(Shared { state: Mutex::default(), filled, written });
        let thread = std::thread::Builder::new().name("wsproxy-log".into());
        thread.spawn({
            let shared = Arc::clone(&shared);
            move || shared.write_forever(out)
        })?;
        Ok(Self(shared))
    }

    /// Hands over a line; never blocks for longer than another thread copies one.
    pub(super) fn push(&self, line: &[u8]) {
        let mut state = self.0.state.lock();
        if state.lines.len() + line.len() > BUFFER_BYTES_MAX {
            drop(state);
            DROPPED.fetch_add(1, Ordering::Relaxed);
            return;
        }
        state.lines.extend_from_slice(line);
        state.lines_count += 1;
        drop(state);
        self.0.filled.notify_one();
    }

    /// Waits until everything is written, but not for ever.
    pub(super) fn flush(&self) {
        let deadline = Instant::now() + FLUSH_TIMEOUT;
        let mut state = self.0.state.lock();
        while state.writing || !state.lines.is_empty() {
            if self.0.written.wait_until(&mut state, deadline).timed_out() {
                return;
            }
        }
    }
}

impl Shared {
    fn write_forever(&self, mut out: impl Write) {
        let mut lines = Vec::new();
        let mut reported = 0;
        loop {
            let count = self.take(&mut lines);
            if write_all(&mut out, &lines).is_err() {
                DROPPED.fetch_add(count, Ordering::Relaxed);
                continue;
            }
            let dropped = dropped_lines();
            if dropped > reported {
                tracing::warn!(lines = dropped - reported, "Log lines were dropped.");
                reported = dropped;
            }
        }
    }

    /// Waits for lines, and swaps them for the empty buffer; says how many there are.
    fn take(&self, lines: &mut Vec<u8>) -> u64 {
        lines.clear();
        // The memory of a burst is not kept.
        lines.shrink_to(KEPT_BYTES);
        let mut state = self.state.lock();
        state.writing = false;
        if state.lines.is_empty() {
            self.written.notify_all();
            self.filled.wait_while(&mut state, |state| state.lines.is_empty());
        }
        state.writing = true;
        std::mem::swap(lines, &mut state.lines);
        std::mem::take(&mut state.lines_count)
    }
}

/// As [`Write::write_all`], but goes on where the other end is set not to block.
fn write_all(out: &mut impl Write, mut bytes: &[u8]) -> std::io::Result<()> {
    while !bytes.is_empty() {
        match out.write(bytes) {
            Ok(0) => return Err(ErrorKind::WriteZero.into()),
            Ok(n) => bytes = &bytes[n..],
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            // Whoever shares a terminal with us may have made it so.
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                std::thread::sleep(RETRY_INTERVAL);
            }
            Err(error) => return Err(error),
        }
    }
    out.flush()
}

/// Some ten thousand lines: seconds of a log at its loudest.
const BUFFER_BYTES_MAX: usize = 2 << 20;
const KEPT_BYTES: usize = 64 << 10;
const FLUSH_TIMEOUT: Duration = Duration::from_secs(1);
const RETRY_INTERVAL: Duration = Duration::from_millis(10);

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    /// A pipe that takes nothing until it is told to.
    struct Stuck {
        go: mpsc::Receiver<()>,
        seen: Arc<Mutex<Vec<u8>>>,
    }

    impl Write for Stuck {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            let _ = self.go.recv();
            self.seen.lock().extend_from_slice(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_stuck_output_stops_nobody_and_what_it_costs_is_counted() {
        let (go, stuck) = mpsc::sync_channel(1);
        let seen = Arc::new(Mutex::new(Vec::new()));
        let writer = Writer::start(Stuck { go: stuck, seen: Arc::clone(&seen) }).unwrap();
        let line = [b'x'; 1024];
        let lines = 3 * (BUFFER_BYTES_MAX / line.len()) as u64;
        let before = dropped_lines();
        for _ in 0..lines {
            writer.push(&line);
        }
        let dropped = dropped_lines() - before;
        assert!(dropped > 0);
        drop(go);
        writer.flush();
        let kept = seen.lock().len() / line.len();
        assert_eq!(kept as u64 + dropped, lines);
    }
}
