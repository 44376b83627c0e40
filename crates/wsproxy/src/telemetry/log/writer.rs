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

/// Returns the number of lines that were dropped since the start, because standard error was stuck or gone.
#[must_use]
pub fn dropped_lines() -> u64 {
    DROPPED.load(Ordering::Relaxed)
}

/// The buffer between the tasks that log and the thread that writes.
///
/// Invariant: never holds more than [`BUFFER_BYTES_MAX`] (and as much again is being written). Lines beyond that are
/// dropped and counted, since a message must never wait for a log.
#[derive(Clone)]
pub(super) struct LogWriter(Arc<Shared>);

struct Shared {
    state: Mutex<State>,
    /// Signals that there are lines.
    filled: Condvar,
    /// Signals that all lines are written.
    written: Condvar,
}

/// The lines behind the lock, which is not held while they are written.
#[derive(Default)]
struct State {
    lines: Vec<u8>,
    lines_count: u64,
    writing: bool,
}

impl LogWriter {
    /// Starts the thread, which lives as long as the process: the last line can come at any time.
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

    /// Adds a line; never blocks for longer than another thread copies one.
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

    /// Waits until all lines are written, for a bounded time.
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

    /// Waits for lines, and swaps them for the empty buffer; returns their number.
    fn take(&self, lines: &mut Vec<u8>) -> u64 {
        lines.clear();
        // A burst's memory is freed.
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

/// Writes like [`Write::write_all`], but goes on if the other end is non-blocking.
fn write_all(out: &mut impl Write, mut bytes: &[u8]) -> std::io::Result<()> {
    while !bytes.is_empty() {
        match out.write(bytes) {
            Ok(0) => return Err(ErrorKind::WriteZero.into()),
            Ok(n) => bytes = &bytes[n..],
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            // Another process on the same terminal may have made it non-blocking.
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                std::thread::sleep(RETRY_INTERVAL);
            }
            Err(error) => return Err(error),
        }
    }
    out.flush()
}

/// The counter of dropped lines: one log per process, and so one counter.
static DROPPED: AtomicU64 = AtomicU64::new(0);

/// Upper bound of the buffer: some ten thousand lines, or seconds of the loudest log.
const BUFFER_BYTES_MAX: usize = 2 << 20;
const KEPT_BYTES: usize = 64 << 10;
const FLUSH_TIMEOUT: Duration = Duration::from_secs(1);
const RETRY_INTERVAL: Duration = Duration::from_millis(10);

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    /// A pipe that accepts no bytes until the test lets it.
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
    fn a_stuck_output_drops_and_counts_lines() {
        let (go, stuck) = mpsc::sync_channel(1);
        let seen = Arc::new(Mutex::new(Vec::new()));
        let writer = LogWriter::start(Stuck { go: stuck, seen: Arc::clone(&seen) }).unwrap();
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
