//! Detached answers: a task of their own writes long-lived bodies, since hyper's buffers are ten times as large.
//!
//! Path of such an answer through the code:
//! 1. `listener::accept` puts three values into the extensions of each request: the client's address, the seat of its
//!    socket, and the [`SharedSocket`](crate::core::socket::SharedSocket) that hyper reads and writes through.
//! 2. `handshake::event_stream` takes the last two out. Its answer has the stream as the body and a [`Detached`] among its
//!    extensions.
//! 3. `listener::answer` finds the [`Detached`], takes the socket out of the shared one, spawns [`write`] with it,
//!    and never returns the answer to hyper.
//! 4. Taking the socket wakes `listener::accept`, which drops the HTTP connection and with it the waiting
//!    `listener::answer`. Only the task of [`write`] is left.
//! 5. [`write`] asks the body for chunks until the body ends, the client leaves, or the outbox is aborted.

use std::{
    io::{self, IoSlice},
    pin::Pin,
    sync::{Arc, atomic::Ordering::Relaxed},
    task::{Context, Poll, ready},
    time::SystemTime,
};

use bytes::{Buf, Bytes};
use http::{Response, Version, header, response::Parts};
use hyper::body::Body as _;
use tracing::debug;
use wsproxy_conn::{Profile, Socket};

use crate::{client::event_stream_outbox::EventStreamOutbox, http::Body};

/// Extension of an answer that marks it as detached. It must be the last answer on its connection.
#[derive(Debug, Clone)]
pub struct Detached {
    /// Counters of written bytes.
    pub profile: Arc<Profile>,
    /// Outbox of the client. The task closes the socket when the outbox is aborted.
    pub outbox: Arc<EventStreamOutbox>,
}

/// Writes a detached answer until the body ends, the client leaves, or the outbox is aborted.
pub fn write(
    socket: Socket,
    version: Version,
    detached: Detached,
    response: Response<Body>,
) -> impl Future<Output = ()> {
    let Detached { profile, outbox } = detached;
    let (parts, body) = response.into_parts();
    // Not an `async fn`: its future would hold the response's headers as long as the body lasts.
    let queue = Arc::clone(&outbox);
    let mut answer = Answer::new(body, version == Version::HTTP_11, &parts, profile, queue);
    async move {
        let result = tokio::select! {
            result = std::future::poll_fn(|cx| answer.poll(&socket, cx)) => result,
            () = outbox.wait_aborted() => Err(io::ErrorKind::TimedOut.into()),
        };
        outbox.set_stalled(0);
        if let Err(error) = result {
            debug!(%error, "An answer was cut off.");
        }
    }
}

struct Answer {
    body: Body,
    chunked: bool,
    profile: Arc<Profile>,
    /// Outbox of the client, which accounts for the bytes that the socket does not take.
    outbox: Arc<EventStreamOutbox>,
    /// Bytes to write before the next poll of the body.
    out: [Bytes; 3],
    /// The socket was full; counted once until it has room again.
    blocked: bool,
    /// Bytes that the client sent after its request.
    heard: usize,
    over: bool,
}

impl Answer {
    fn new(
        body: Body,
        chunked: bool,
        parts: &Parts,
        profile: Arc<Profile>,
        outbox: Arc<EventStreamOutbox>,
    ) -> Self {
        let out = [head(parts, chunked), Bytes::new(), Bytes::new()];
        Self { body, chunked, profile, outbox, out, blocked: false, heard: 0, over: false }
    }

    fn poll(&mut self, socket: &Socket, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.listen(socket, cx)?;
        for _ in 0..FRAMES_AT_ONCE {
            ready!(self.poll_write(socket, cx))?;
            if self.over {
                // Half-close: the kernel still delivers what was written, and the client sees the end.
                return socket.poll_finish_writing(cx).map(Ok);
            }
            self.out = match ready!(Pin::new(&mut self.body).poll_frame(cx)) {
                Some(Ok(frame)) => self.framed(frame.into_data().unwrap_or_default()),
                Some(Err(error)) => return Poll::Ready(Err(io::Error::other(error))),
                None => {
                    self.over = true;
                    let end: &'static [u8] = if self.chunked { b"0\r\n\r\n" } else { b"" };
                    [Bytes::from_static(end), Bytes::new(), Bytes::new()]
                }
            };
        }
        // Yield: a client with an endless supply of messages must not starve other tasks.
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    /// Frames a chunk of the body. An empty chunk is not framed: it would end the body.
    fn framed(&self, data: Bytes) -> [Bytes; 3] {
        if !self.chunked || data.is_empty() {
            return [data, Bytes::new(), Bytes::new()];
        }
        let head = Bytes::from(format!("{:x}\r\n", data.len()));
        [head, data, Bytes::from_static(b"\r\n")]
    }

    fn poll_write(&mut self, socket: &Socket, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while self.out.iter().any(|bytes| !bytes.is_empty()) {
            let slices = [0, 1, 2].map(|n| IoSlice::new(&self.out[n]));
            match socket.try_write_vectored(&slices) {
                Ok(0) => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                Ok(count) => self.wrote(count),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    if !std::mem::replace(&mut self.blocked, true) {
                        self.profile.stats.blocked.fetch_add(1, Relaxed);
                    }
                    let left: usize = self.out.iter().map(Bytes::len).sum();
                    self.outbox.set_stalled(left + socket.held_bytes());
                    ready!(socket.poll_write_ready(cx))?;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
        if std::mem::take(&mut self.blocked) {
            self.outbox.set_stalled(0);
        }
        // Free the memory of a long event at once.
        self.out = Default::default();
        Poll::Ready(Ok(()))
    }

    fn wrote(&mut self, mut count: usize) {
        self.profile.stats.bytes_sent.fetch_add(count as u64, Relaxed);
        for bytes in &mut self.out {
            let part = count.min(bytes.len());
            bytes.advance(part);
            count -= part;
        }
    }

    /// Reads and drops what the client sends, so that its leaving is noticed.
    fn listen(&mut self, socket: &Socket, cx: &mut Context<'_>) -> io::Result<()> {
        while let Poll::Ready(readable) = socket.poll_read_ready(cx) {
            readable?;
            let mut buffer = [0; 256];
            match socket.try_read(&mut buffer) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(count) => self.heard += count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
            if self.heard > HEARD_BYTES_MAX {
                return Err(io::ErrorKind::InvalidData.into());
            }
        }
        Ok(())
    }
}

/// Returns the status line and the headers.
fn head(parts: &Parts, chunked: bool) -> Bytes {
    let mut head = Vec::with_capacity(512);
    head.extend_from_slice(b"HTTP/1.1 ");
    head.extend_from_slice(parts.status.as_str().as_bytes());
    head.extend_from_slice(b" OK\r\n");
    for (name, value) in &parts.headers {
        head.extend_from_slice(name.as_str().as_bytes());
        head.extend_from_slice(b": ");
        head.extend_from_slice(value.as_bytes());
        head.extend_from_slice(b"\r\n");
    }
    let date = format!("date: {}\r\n", httpdate::fmt_http_date(SystemTime::now()));
    head.extend_from_slice(date.as_bytes());
    if chunked {
        head.extend_from_slice(header::TRANSFER_ENCODING.as_str().as_bytes());
        head.extend_from_slice(b": chunked\r\n");
    }
    head.extend_from_slice(b"\r\n");
    Bytes::from(head)
}

/// Upper bound of the chunks that one poll writes.
const FRAMES_AT_ONCE: usize = 16;

/// Upper bound of the bytes that a client may send after its request. Beyond it the connection is closed.
const HEARD_BYTES_MAX: usize = 16 * 1024;
