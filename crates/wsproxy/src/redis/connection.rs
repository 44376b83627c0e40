//! One connection to a server: writes bytes and reads frames, independently of each other. Knows no commands.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::{Buf, BytesMut};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::Instant,
};

use crate::redis::{
    fault::Fault,
    outlet::Birth,
    resp::{Broken, Scanner},
};

/// A TCP, TLS or Unix stream.
pub(super) trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

/// A connection that reads and writes within one task.
pub(super) struct RedisConnection {
    stream: Box<dyn Stream>,
    /// Bytes that were read and not yet taken.
    pub(super) input: ReadBuffer,
    /// Bytes to write; look at its length before appending.
    pub(super) output: BytesMut,
    unflushed: bool,
    /// Time of the latest read.
    pub(super) last_read: Instant,
    /// Number among the connections of the instance.
    pub(super) birth: Birth,
}

/// Result of [`RedisConnection::drive`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Progress {
    /// New bytes are in [`RedisConnection::input`].
    Read,
    /// Everything in [`RedisConnection::output`] has been written.
    Written,
}

impl RedisConnection {
    /// Creates a connection on a stream that has just been opened.
    pub(super) fn new(stream: Box<dyn Stream>) -> Self {
        Self {
            stream,
            input: ReadBuffer::default(),
            output: BytesMut::new(),
            unflushed: false,
            last_read: Instant::now(),
            birth: 0,
        }
    }

    /// Writes [`Self::output`] until all of it is written or bytes were read. The future can be dropped at any time.
    pub(super) async fn drive(&mut self) -> Result<Progress, Fault> {
        let progress = std::future::poll_fn(|cx| self.poll_drive(cx)).await?;
        if progress == Progress::Read {
            self.last_read = Instant::now();
        }
        Ok(progress)
    }

    fn poll_drive(&mut self, cx: &mut Context<'_>) -> Poll<Result<Progress, Fault>> {
        let had_output = !self.output.is_empty();
        while !self.output.is_empty() {
            match Pin::new(&mut self.stream).poll_write(cx, &self.output) {
                Poll::Ready(Ok(0)) => return Poll::Ready(Err(Fault::Closed)),
                Poll::Ready(Ok(written)) => self.output.advance(written),
                Poll::Ready(Err(error)) => return Poll::Ready(Err(error.into())),
                Poll::Pending => break,
            }
            self.unflushed = true;
        }
        // TLS keeps records in its buffer until it is flushed.
        if self.unflushed && Pin::new(&mut self.stream).poll_flush(cx)?.is_ready() {
            self.unflushed = false;
        }
        match self.input.poll_fill(&mut self.stream, cx)? {
            Poll::Ready(0) => Poll::Ready(Err(Fault::Closed)),
            Poll::Ready(_) => Poll::Ready(Ok(Progress::Read)),
            Poll::Pending if had_output && self.output.is_empty() => {
                if self.output.capacity() > BUFFER_BYTES {
                    self.output = BytesMut::new();
                }
                Poll::Ready(Ok(Progress::Written))
            }
            Poll::Pending => Poll::Pending,
        }
    }
}

/// Bytes that were read and not yet parsed, in one buffer for all reads. It grows for a frame that does not fit, and
/// shrinks again afterwards.
#[derive(Default)]
pub(super) struct ReadBuffer {
    buffer: Vec<u8>,
    start: usize,
    end: usize,
    scanner: Scanner,
}

impl ReadBuffer {
    /// Returns the next whole frame.
    pub(super) fn next(&mut self) -> Result<Option<&[u8]>, Broken> {
        Ok(self.next_and_last()?.map(|(frame, _)| frame))
    }

    /// Returns the next whole frame, and whether it is the last one in the buffer.
    pub(super) fn next_and_last(&mut self) -> Result<Option<(&[u8], bool)>, Broken> {
        let Some(length) = self.scanner.scan(&self.buffer[self.start..self.end])? else {
            return Ok(None);
        };
        let from = self.start;
        self.start += length;
        Ok(Some((&self.buffer[from..self.start], self.start == self.end)))
    }

    fn poll_fill(
        &mut self,
        stream: &mut dyn Stream,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<usize>> {
        self.make_room();
        let mut room = ReadBuf::new(&mut self.buffer[self.end..]);
        ready!(Pin::new(stream).poll_read(cx, &mut room))?;
        let read = room.filled().len();
        self.end += read;
        Poll::Ready(Ok(read))
    }

    fn make_room(&mut self) {
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
            if self.buffer.len() != BUFFER_BYTES {
                self.buffer = vec![0; BUFFER_BYTES];
            }
        } else if self.end == self.buffer.len() {
            // The rest is a part of one frame: it moves to the front once, then the buffer doubles.
            self.buffer.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
            if self.end > self.buffer.len() / 2 {
                self.buffer.resize(self.buffer.len() * 2, 0);
            }
        }
    }
}

/// Upper bound of one read, and so of one round of deliveries.
const BUFFER_BYTES: usize = 256 * 1024;

#[cfg(test)]
mod tests {
    use tokio::io::AsyncWriteExt;

    use super::*;

    #[tokio::test]
    #[expect(clippy::disallowed_methods, reason = "the test waits for its task")]
    async fn frames_larger_than_the_buffer_arrive_and_memory_comes_back() {
        let (mut server, client) = tokio::io::duplex(100_000);
        let mut connection = RedisConnection::new(Box::new(client));
        let large = vec![b'x'; 3_000_000];
        let writer = tokio::task::spawn(async move {
            for _ in 0..2 {
                let frame = [b"+small\r\n$3000000\r\n", &large[..], b"\r\n"].concat();
                server.write_all(&frame).await.unwrap();
            }
            server.write_all(b"+last\r\n").await.unwrap();
            server
        });
        let mut lengths = Vec::new();
        while lengths.len() < 5 {
            assert_eq!(connection.drive().await.unwrap(), Progress::Read);
            while let Some(frame) = connection.input.next().unwrap() {
                lengths.push(frame.len());
            }
        }
        assert_eq!(lengths, [8, 3_000_012, 8, 3_000_012, 7]);
        drop(writer.await.unwrap());
        assert!(matches!(connection.drive().await, Err(Fault::Closed)));
        assert_eq!(connection.input.buffer.len(), BUFFER_BYTES);
    }

    #[tokio::test]
    async fn a_peer_that_does_not_read_does_not_stop_reading() {
        let (mut server, client) = tokio::io::duplex(64);
        let mut connection = RedisConnection::new(Box::new(client));
        connection.output.extend_from_slice(&[b'x'; 1000]);
        server.write_all(b"+hello\r\n").await.unwrap();
        assert_eq!(connection.drive().await.unwrap(), Progress::Read);
        assert_eq!(connection.input.next().unwrap(), Some(&b"+hello\r\n"[..]));
        assert!(!connection.output.is_empty());
    }
}
