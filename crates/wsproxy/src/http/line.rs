//! The socket under an HTTP connection, which an answer that lasts can take away from it.

use std::{
    io::{self, IoSlice},
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    task::{Context, Poll},
    time::Duration,
};

use hyper::rt::{Read, ReadBufCursor, Write};
use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use tokio::{net::TcpStream, sync::Notify};

/// A socket for whoever answers requests on it.
#[derive(Debug)]
pub struct Line {
    stream: Mutex<Option<TokioIo<TcpStream>>>,
    taken: Notify,
    cut: Notify,
    /// Nothing came since the start, or since the last answer.
    quiet: AtomicBool,
    answered: AtomicBool,
}

impl Line {
    /// The line of a socket that was accepted.
    #[must_use]
    pub fn new(stream: TcpStream) -> Arc<Self> {
        let stream = Mutex::new(Some(TokioIo::new(stream)));
        Arc::new(Self {
            stream,
            taken: Notify::new(),
            cut: Notify::new(),
            quiet: true.into(),
            answered: false.into(),
        })
    }

    /// From now on written bytes may stay unacknowledged for this long, and the peer's window closed.
    pub fn be_patient(&self, unacknowledged_max: Duration) {
        #[cfg(target_os = "linux")]
        if let Some(stream) = &*self.stream.lock() {
            // The only errors are those of a peer that left, which writing finds as well.
            let _ = socket2::SockRef::from(stream.inner())
                .set_tcp_user_timeout(Some(unacknowledged_max));
        }
    }

    /// Takes the socket away from the HTTP connection, which ends without touching it; `None` the second time.
    #[must_use]
    pub fn take(&self) -> Option<TcpStream> {
        let stream = self.stream.lock().take();
        self.taken.notify_one();
        stream.map(TokioIo::into_inner)
    }

    /// Whether the socket was taken, so that the HTTP connection finds none.
    fn is_taken(&self) -> bool {
        self.stream.lock().is_none()
    }

    /// A request was answered; the client need not have another one.
    pub fn answered(&self) {
        self.answered.store(true, Relaxed);
        self.quiet.store(true, Relaxed);
    }

    /// Whether a client that ends like this had begun a request, or never sent one in time. A probe that only connects
    /// and a connection that is kept for further requests have no fault.
    #[must_use]
    pub fn is_at_fault(&self, is_timeout: bool) -> bool {
        let is_quiet = self.quiet.load(Relaxed);
        !self.is_taken() && (!is_quiet || (is_timeout && !self.answered.load(Relaxed)))
    }

    /// Resolves when the socket was taken.
    pub async fn wait_taken(&self) {
        self.taken.notified().await;
    }

    /// Tells whoever took the socket to close it, whatever is on its way.
    pub fn cut(&self) {
        self.cut.notify_one();
    }

    /// Resolves when it is to be closed.
    pub async fn wait_cut(&self) {
        self.cut.notified().await;
    }
}

/// The HTTP connection's end of a [`Line`].
#[derive(Debug)]
pub struct LineSocket(pub Arc<Line>);

impl LineSocket {
    fn with<T>(
        &self,
        act: impl FnOnce(Pin<&mut TokioIo<TcpStream>>) -> Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        match &mut *self.0.stream.lock() {
            Some(stream) => act(Pin::new(stream)),
            None => Poll::Ready(Err(io::ErrorKind::NotConnected.into())),
        }
    }
}

impl Read for LineSocket {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: ReadBufCursor<'_>,
    ) -> Poll<io::Result<()>> {
        let read = self.with(|stream| stream.poll_read(cx, buffer));
        if matches!(read, Poll::Ready(Ok(()))) {
            self.0.quiet.store(false, Relaxed);
        }
        read
    }
}

impl Write for LineSocket {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.with(|stream| stream.poll_write(cx, bytes))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.with(|stream| stream.poll_write_vectored(cx, slices))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.with(|stream| stream.poll_flush(cx))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.with(|stream| stream.poll_shutdown(cx))
    }
}
