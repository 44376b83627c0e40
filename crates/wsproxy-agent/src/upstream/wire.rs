//! Socket of a connection to the upstream, which counts its bytes. Knows no HTTP.

use std::{
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    task::{Context, Poll, ready},
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
};
use tokio_rustls::client::TlsStream;

/// TCP, or TLS over TCP.
#[derive(Debug)]
pub(crate) enum UpstreamSocket {
    Plain(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
}

/// Socket with its counts, which outlive it.
#[derive(Debug)]
pub(crate) struct Wire {
    socket: UpstreamSocket,
    traffic: Arc<Traffic>,
}

/// Bytes of a connection, without those of TLS.
#[derive(Debug, Default)]
pub(crate) struct Traffic {
    written: AtomicU64,
    read: AtomicU64,
}

impl Traffic {
    /// Returns the bytes that were written and read so far.
    pub(crate) fn counts(&self) -> (u64, u64) {
        (self.written.load(Relaxed), self.read.load(Relaxed))
    }

    /// Returns the bytes that were written and read since `counts`.
    pub(crate) fn since(&self, counts: (u64, u64)) -> (u64, u64) {
        let (written, read) = self.counts();
        (written - counts.0, read - counts.1)
    }
}

impl Wire {
    pub(crate) const fn new(socket: UpstreamSocket, traffic: Arc<Traffic>) -> Self {
        Self { socket, traffic }
    }
}

impl AsyncRead for Wire {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let before = buffer.filled().len();
        match &mut this.socket {
            UpstreamSocket::Plain(socket) => ready!(Pin::new(socket).poll_read(cx, buffer))?,
            UpstreamSocket::Tls(socket) => ready!(Pin::new(socket).poll_read(cx, buffer))?,
        }
        this.traffic.read.fetch_add((buffer.filled().len() - before) as u64, Relaxed);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Wire {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(cx, &[io::IoSlice::new(bytes)])
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let count = match &mut this.socket {
            UpstreamSocket::Plain(socket) => {
                ready!(Pin::new(socket).poll_write_vectored(cx, slices))?
            }
            UpstreamSocket::Tls(socket) => {
                ready!(Pin::new(socket).poll_write_vectored(cx, slices))?
            }
        };
        this.traffic.written.fetch_add(count as u64, Relaxed);
        Poll::Ready(Ok(count))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.get_mut().socket {
            UpstreamSocket::Plain(socket) => Pin::new(socket).poll_flush(cx),
            UpstreamSocket::Tls(socket) => Pin::new(socket).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.get_mut().socket {
            UpstreamSocket::Plain(socket) => Pin::new(socket).poll_shutdown(cx),
            UpstreamSocket::Tls(socket) => Pin::new(socket).poll_shutdown(cx),
        }
    }
}
