//! Socket of a connection: TCP, a unix socket, or TLS over TCP. Knows bytes only.

use std::{
    io::{self, IoSlice, Read},
    net::Shutdown,
    os::fd::{AsFd, BorrowedFd},
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use rustix::net::RecvFlags;
use socket2::SockRef;
use tokio::{
    io::{AsyncRead, AsyncWrite, Interest, ReadBuf},
    net::{TcpStream, UnixStream},
};

mod options;
pub mod tls;
pub mod unix;
pub mod unread;
pub mod watch;

use tls::TlsSocket;
use unix::UnixSocket;

/// Stream socket that its own task reads and that any task writes, without `&mut`.
#[derive(Debug)]
pub enum Socket {
    /// TCP, to a client, a proxy or a server.
    Tcp(TcpStream),
    /// A unix socket, to a proxy on the same machine. Boxed, so that TCP sockets are smaller.
    Unix(Box<UnixSocket>),
    /// TLS over TCP. Boxed for the same reason.
    Tls(Box<TlsSocket>),
}

impl From<TlsSocket> for Socket {
    fn from(socket: TlsSocket) -> Self {
        Self::Tls(Box::new(socket))
    }
}

impl From<TcpStream> for Socket {
    fn from(stream: TcpStream) -> Self {
        Self::Tcp(stream)
    }
}

impl From<UnixStream> for Socket {
    fn from(stream: UnixStream) -> Self {
        Self::Unix(Box::new(UnixSocket::new(stream)))
    }
}

impl Socket {
    /// Reads the bytes that have come. `Ok(0)` is the end of the stream.
    ///
    /// # Errors
    /// [`io::ErrorKind::WouldBlock`] where no bytes have come.
    pub fn try_read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(stream) => {
                read_some(buffer, stream.into(), |read| stream.try_io(Interest::READABLE, read))
            }
            Self::Unix(socket) => {
                let stream = &socket.stream;
                let socket = SockRef::from(stream);
                read_some(buffer, socket, |read| stream.try_io(Interest::READABLE, read))
            }
            Self::Tls(socket) => socket.try_read(buffer),
        }
    }

    /// Copies the bytes that have come, and leaves them in the socket. `Ok(0)` is the end of the stream.
    ///
    /// # Errors
    /// The socket failed. [`io::ErrorKind::Unsupported`]: it is encrypted.
    pub fn poll_peek(&self, cx: &mut Context<'_>, buffer: &mut [u8]) -> Poll<io::Result<usize>> {
        loop {
            ready!(self.poll_read_ready(cx))?;
            let peeked = match self {
                Self::Tcp(stream) => {
                    stream.try_io(Interest::READABLE, || peek(stream.as_fd(), buffer))
                }
                Self::Unix(socket) => {
                    let stream = &socket.stream;
                    stream.try_io(Interest::READABLE, || peek(stream.as_fd(), buffer))
                }
                Self::Tls(_) => Err(io::ErrorKind::Unsupported.into()),
            };
            match peeked {
                Err(error) if is_passing(&error) => {}
                peeked => return Poll::Ready(peeked),
            }
        }
    }

    /// Returns whether the last read may have left bytes although it did not fill its buffer.
    pub(crate) fn stopped_early(&self) -> bool {
        match self {
            Self::Tcp(_) | Self::Unix(_) => false,
            Self::Tls(socket) => socket.stopped_early(),
        }
    }

    /// Writes as much as the kernel takes at once.
    ///
    /// # Errors
    /// [`io::ErrorKind::WouldBlock`] where it takes nothing.
    pub fn try_write(&self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(stream) => stream.try_write(bytes),
            Self::Unix(socket) => socket.try_write_vectored(&[IoSlice::new(bytes)]),
            Self::Tls(socket) => socket.try_write_vectored(&[IoSlice::new(bytes)]),
        }
    }

    /// Writes as much of several slices as the kernel takes at once.
    ///
    /// # Errors
    /// [`io::ErrorKind::WouldBlock`] where it takes nothing.
    pub fn try_write_vectored(&self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        match self {
            Self::Tcp(stream) => stream.try_write_vectored(slices),
            Self::Unix(socket) => socket.try_write_vectored(slices),
            Self::Tls(socket) => socket.try_write_vectored(slices),
        }
    }

    /// Returns whether a read is worth trying. Registers the waker of the task where it is not.
    ///
    /// # Errors
    /// The runtime is shutting down.
    pub fn poll_read_ready(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self {
            Self::Tcp(stream) => stream.poll_read_ready(cx),
            Self::Unix(socket) => socket.stream.poll_read_ready(cx),
            Self::Tls(socket) => socket.poll_read_ready(cx),
        }
    }

    /// Returns whether a write is worth trying. Registers the waker of the task where it is not.
    ///
    /// # Errors
    /// The runtime is shutting down. [`io::ErrorKind::TimedOut`]: the peer at a unix socket has taken nothing for the time
    /// of [`Self::set_unacknowledged_max`].
    pub fn poll_write_ready(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self {
            Self::Tcp(stream) => stream.poll_write_ready(cx),
            Self::Unix(socket) => socket.poll_write_ready(cx),
            Self::Tls(socket) => socket.stream.poll_write_ready(cx),
        }
    }

    /// Upper bound of the bytes that count as written and that the kernel has not taken: part of a TLS record.
    #[must_use]
    pub fn held_bytes(&self) -> usize {
        match self {
            Self::Tcp(_) | Self::Unix(_) => 0,
            Self::Tls(socket) => socket.held_bytes(),
        }
    }

    /// As [`Self::finish_writing`]. Where TLS has to tell the peer of the end, and the kernel takes no more, waits until it
    /// does.
    pub fn poll_finish_writing(&self, cx: &mut Context<'_>) -> Poll<()> {
        if let Self::Tls(socket) = self {
            // An error means that the peer left.
            let _ = ready!(socket.poll_goodbye(cx));
        }
        let _ = self.with_ref(|socket| socket.shutdown(Shutdown::Write));
        Poll::Ready(())
    }

    /// Ends our half of the stream. Does nothing where the socket is gone already.
    pub fn finish_writing(&self) {
        if let Self::Tls(socket) = self {
            socket.say_goodbye();
        }
        // An error means that the peer left, which reading finds too.
        let _ = self.with_ref(|socket| socket.shutdown(Shutdown::Write));
    }

    /// Ends both halves of the stream. Does nothing where the socket is gone already.
    pub fn shut_down(&self) {
        if let Self::Tls(socket) = self {
            socket.say_goodbye();
        }
        // An error means that the peer left, which reading finds too.
        let _ = self.with_ref(|socket| socket.shutdown(Shutdown::Both));
    }

    /// Sets the options of a socket that carries messages: no Nagle delay, and an upper bound of the time for which
    /// written bytes stay unacknowledged, which finds peers that vanished.
    ///
    /// # Errors
    /// The kernel refused an option.
    pub fn prepare(&self, unacknowledged_max: Duration) -> io::Result<()> {
        if let Some(stream) = self.tcp() {
            stream.set_nodelay(true)?;
        }
        self.set_unacknowledged_max(unacknowledged_max)
    }

    /// Sets the upper bound of the time for which written bytes stay unacknowledged, or the peer's window closed.
    ///
    /// # Errors
    /// The kernel refused the option.
    pub fn set_unacknowledged_max(&self, unacknowledged_max: Duration) -> io::Result<()> {
        if let Self::Unix(socket) = self {
            socket.set_unacknowledged_max(unacknowledged_max);
        }
        #[cfg(target_os = "linux")]
        if let Some(stream) = self.tcp() {
            SockRef::from(stream).set_tcp_user_timeout(Some(unacknowledged_max))?;
        }
        Ok(())
    }

    fn tcp(&self) -> Option<&TcpStream> {
        match self {
            Self::Tcp(stream) => Some(stream),
            Self::Tls(socket) => Some(&socket.stream),
            Self::Unix(_) => None,
        }
    }

    fn with_ref<T>(&self, f: impl FnOnce(SockRef<'_>) -> T) -> T {
        match self {
            Self::Tcp(stream) => f(SockRef::from(stream)),
            Self::Unix(socket) => f(SockRef::from(&socket.stream)),
            Self::Tls(socket) => f(SockRef::from(&socket.stream)),
        }
    }
}

/// For HTTP, whose one task reads and writes.
impl AsyncRead for Socket {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let socket = match self.get_mut() {
            Self::Tcp(stream) => return Pin::new(stream).poll_read(cx, buffer),
            Self::Unix(socket) => return Pin::new(&mut socket.stream).poll_read(cx, buffer),
            Self::Tls(socket) => socket,
        };
        loop {
            ready!(socket.poll_read_ready(cx))?;
            match socket.try_read(buffer.initialize_unfilled()) {
                Ok(count) => {
                    buffer.advance(count);
                    return Poll::Ready(Ok(()));
                }
                Err(error) if is_passing(&error) => {}
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
    }
}

impl AsyncWrite for Socket {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_write(cx, bytes),
            Self::Unix(socket) => socket.poll_write_vectored(cx, &[IoSlice::new(bytes)]),
            Self::Tls(socket) => socket.poll_write_vectored(cx, &[IoSlice::new(bytes)]),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_write_vectored(cx, slices),
            Self::Unix(socket) => socket.poll_write_vectored(cx, slices),
            Self::Tls(socket) => socket.poll_write_vectored(cx, slices),
        }
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    /// Does nothing: bytes that count as written are with the kernel.
    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_shutdown(cx),
            Self::Unix(socket) => Pin::new(&mut socket.stream).poll_shutdown(cx),
            tls @ Self::Tls(_) => tls.poll_finish_writing(cx).map(Ok),
        }
    }
}

/// Returns whether an error only says that the call is to be repeated.
fn is_passing(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}

/// Calls `write` until it has an outcome; waits with `poll_ready` where the kernel takes nothing.
#[inline]
fn poll_write(
    write: impl Fn() -> io::Result<usize>,
    mut poll_ready: impl FnMut() -> Poll<io::Result<()>>,
) -> Poll<io::Result<usize>> {
    loop {
        match write() {
            Err(error) if is_passing(&error) => ready!(poll_ready())?,
            result => return Poll::Ready(result),
        }
    }
}

/// Copies the bytes that have come to a socket.
fn peek(socket: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<usize> {
    let (count, _) = rustix::net::recv(socket, buffer, RecvFlags::PEEK)?;
    Ok(count)
}

/// Reads within `try_io` of a stream. After a read that did not fill the buffer nothing is left, and the runtime is told
/// so: the next look at the stream waits for the next bytes, without a read that finds none.
fn read_some(
    buffer: &mut [u8],
    socket: SockRef<'_>,
    try_io: impl FnOnce(&mut dyn FnMut() -> io::Result<usize>) -> io::Result<usize>,
) -> io::Result<usize> {
    let mut part = None;
    let read = try_io(&mut || {
        let count = (&*socket).read(buffer)?;
        if (1..buffer.len()).contains(&count) {
            part = Some(count);
            return Err(io::ErrorKind::WouldBlock.into());
        }
        Ok(count)
    });
    part.map_or(read, Ok)
}
