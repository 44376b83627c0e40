//! The kernel's end of a connection; knows bytes only.

use std::{
    io::{self, IoSlice},
    net::Shutdown,
    task::{Context, Poll},
    time::Duration,
};

use tokio::net::{TcpStream, UnixStream};

/// A stream socket that can be read by its task and written by anybody, without `&mut`.
#[derive(Debug)]
pub enum Socket {
    /// TCP, from a client or a proxy.
    Tcp(TcpStream),
    /// A unix socket, from a proxy on the same machine. Boxed, so that the others are smaller.
    Unix(Box<UnixStream>),
}

impl From<TcpStream> for Socket {
    fn from(stream: TcpStream) -> Self {
        Self::Tcp(stream)
    }
}

impl From<UnixStream> for Socket {
    fn from(stream: UnixStream) -> Self {
        Self::Unix(Box::new(stream))
    }
}

impl Socket {
    /// Reads what is there. `Ok(0)` is the end of the stream.
    ///
    /// # Errors
    /// [`io::ErrorKind::WouldBlock`] where nothing is there.
    pub fn try_read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(stream) => stream.try_read(buffer),
            Self::Unix(stream) => stream.try_read(buffer),
        }
    }

    /// Writes as much as the kernel takes at once.
    ///
    /// # Errors
    /// [`io::ErrorKind::WouldBlock`] where it takes nothing.
    pub fn try_write(&self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(stream) => stream.try_write(bytes),
            Self::Unix(stream) => stream.try_write(bytes),
        }
    }

    /// Writes as much of several slices as the kernel takes at once.
    ///
    /// # Errors
    /// [`io::ErrorKind::WouldBlock`] where it takes nothing.
    pub fn try_write_vectored(&self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        match self {
            Self::Tcp(stream) => stream.try_write_vectored(slices),
            Self::Unix(stream) => stream.try_write_vectored(slices),
        }
    }

    /// Whether a read is worth trying; registers the task's waker if not.
    ///
    /// # Errors
    /// The runtime is shutting down.
    pub fn poll_read_ready(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self {
            Self::Tcp(stream) => stream.poll_read_ready(cx),
            Self::Unix(stream) => stream.poll_read_ready(cx),
        }
    }

    /// Whether a write is worth trying; registers the task's waker if not.
    ///
    /// # Errors
    /// The runtime is shutting down.
    pub fn poll_write_ready(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self {
            Self::Tcp(stream) => stream.poll_write_ready(cx),
            Self::Unix(stream) => stream.poll_write_ready(cx),
        }
    }

    /// Tells the peer that nothing more will come. A socket that is gone already is fine.
    pub fn finish_writing(&self) {
        // The only errors are those of a peer that left, which reading finds as well.
        let _ = self.with_ref(|socket| socket.shutdown(Shutdown::Write));
    }

    /// Ends both directions.
    pub fn shut_down(&self) {
        // As above.
        let _ = self.with_ref(|socket| socket.shutdown(Shutdown::Both));
    }

    /// Options of a socket that carries messages: no Nagle delay, and an upper bound for how
    /// long written bytes may stay unacknowledged, which finds peers that vanished.
    ///
    /// # Errors
    /// The kernel refused an option.
    pub fn prepare(&self, unacknowledged_max: Duration) -> io::Result<()> {
        if let Self::Tcp(stream) = self {
            stream.set_nodelay(true)?;
            let socket = socket2::SockRef::from(stream);
            #[cfg(target_os = "linux")]
            socket.set_tcp_user_timeout(Some(unacknowledged_max))?;
        }
        Ok(())
    }

    fn with_ref<T>(&self, f: impl FnOnce(socket2::SockRef<'_>) -> T) -> T {
        match self {
            Self::Tcp(stream) => f(socket2::SockRef::from(stream)),
            Self::Unix(stream) => f(socket2::SockRef::from(&**stream)),
        }
    }
}
