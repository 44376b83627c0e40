//! Answers that last: their sockets leave the HTTP connection, whose buffers would be ten times what they need.

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
use tokio::{io::AsyncWriteExt, net::TcpStream};
use tracing::debug;
use wsproxy_conn::Profile;

use crate::http::{Body, line::Line};

/// Marks an answer as one that lasts, as an extension. It must be the last one on its connection.
#[derive(Debug, Clone)]
pub struct Lasting(pub Arc<Profile>);

/// Writes such an answer, until its body or its client ends or somebody cuts the line.
pub fn write(
    mut stream: TcpStream,
    line: Arc<Line>,
    version: Version,
    profile: Arc<Profile>,
    response: Response<Body>,
) -> impl Future<Output = ()> {
    let (parts, body) = response.into_parts();
    // Whatever is not part of the future from here on is not kept as long as the answer.
    let mut answer = Answer::new(body, version == Version::HTTP_11, &parts, profile);
    async move {
        let result = tokio::select! {
            result = std::future::poll_fn(|cx| answer.poll(&stream, cx)) => result,
            () = line.wait_cut() => Err(io::ErrorKind::TimedOut.into()),
        };
        match result {
            // What was written is still delivered; the peer learns that nothing follows.
            Ok(()) => drop(stream.shutdown().await),
            Err(error) => debug!(%error, "An answer was cut off."),
        }
    }
}

struct Answer {
    body: Body,
    chunked: bool,
    profile: Arc<Profile>,
    /// What is to be written before the body is asked for more.
    out: [Bytes; 3],
    blocked: bool,
    /// Bytes that the client sent behind its request.
    heard: usize,
    over: bool,
}

impl Answer {
    fn new(body: Body, chunked: bool, parts: &Parts, profile: Arc<Profile>) -> Self {
        let out = [head(parts, chunked), Bytes::new(), Bytes::new()];
        Self { body, chunked, profile, out, blocked: false, heard: 0, over: false }
    }

    fn poll(&mut self, stream: &TcpStream, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.listen(stream, cx)?;
        for _ in 0..FRAMES_AT_ONCE {
            ready!(self.poll_write(stream, cx))?;
            if self.over {
                return Poll::Ready(Ok(()));
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
        // Other answers have their turn before a client for whom there is always more.
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    /// A chunk of the body. An empty one would be its end.
    fn framed(&self, data: Bytes) -> [Bytes; 3] {
        if !self.chunked || data.is_empty() {
            return [data, Bytes::new(), Bytes::new()];
        }
        let head = Bytes::from(format!("{:x}\r\n", data.len()));
        [head, data, Bytes::from_static(b"\r\n")]
    }

    fn poll_write(&mut self, stream: &TcpStream, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while self.out.iter().any(|bytes| !bytes.is_empty()) {
            let slices = [0, 1, 2].map(|n| IoSlice::new(&self.out[n]));
            match stream.try_write_vectored(&slices) {
                Ok(0) => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                Ok(count) => self.wrote(count),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    if !std::mem::replace(&mut self.blocked, true) {
                        self.profile.stats.blocked.fetch_add(1, Relaxed);
                    }
                    ready!(stream.poll_write_ready(cx))?;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
        self.blocked = false;
        // A long event is not held until there is another one.
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

    /// A client has nothing more to say: what counts is its leaving.
    fn listen(&mut self, stream: &TcpStream, cx: &mut Context<'_>) -> io::Result<()> {
        while let Poll::Ready(readable) = stream.poll_read_ready(cx) {
            readable?;
            let mut buffer = [0; 256];
            match stream.try_read(&mut buffer) {
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

/// Status line and headers.
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

/// Parts of the body that are written in one go.
const FRAMES_AT_ONCE: usize = 16;

/// A client that talks more than this behind its request did not mean it.
const HEARD_BYTES_MAX: usize = 16 * 1024;
