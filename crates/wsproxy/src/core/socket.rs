//! The socket under an HTTP connection. A detached answer or a WebSocket can take it over.

use std::{
    io::{self, IoSlice},
    mem::MaybeUninit,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, Ordering::Relaxed},
    },
    task::{Context, Poll, ready},
    time::Duration,
};

use hyper::rt::{Read, ReadBufCursor, Write};
use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use rustls::ServerConfig;
use tokio::sync::Notify;
use wsproxy_conn::{
    Socket,
    socket::{tls::TlsSocket, watch::PeerWatch},
};
use wsproxy_proto::proxy_header::HEADER_BYTES_MAX;

/// Socket that the HTTP connection shares with the answers to its requests.
#[derive(Debug)]
pub struct SharedSocket {
    stream: Mutex<Option<TokioIo<Socket>>>,
    taken: Notify,
    /// No byte came since the start or since the last answer.
    quiet: AtomicBool,
    answered: AtomicBool,
    /// The client began with TLS, which the socket does not speak.
    greeted_in_tls: AtomicBool,
    /// Time of [`Self::prepare_stream`] that the kernel knows, in milliseconds. 0: none.
    prepared_ms: AtomicU32,
}

impl SharedSocket {
    /// Wraps an accepted socket, over TCP or a unix socket.
    #[must_use]
    pub fn new(socket: impl Into<Socket>) -> Arc<Self> {
        let stream = Mutex::new(Some(TokioIo::new(socket.into())));
        Arc::new(Self {
            stream,
            taken: Notify::new(),
            quiet: true.into(),
            answered: false.into(),
            greeted_in_tls: false.into(),
            prepared_ms: 0.into(),
        })
    }

    /// Sets the time for which written bytes may stay unacknowledged, or the client's window closed.
    pub fn set_unacknowledged_max(&self, unacknowledged_max: Duration) {
        self.prepared_ms.store(0, Relaxed);
        if let Some(stream) = &*self.stream.lock() {
            // An error means that the client left, which the next write finds too.
            let _ = stream.inner().set_unacknowledged_max(unacknowledged_max);
        }
    }

    /// Prepares the socket for an answer whose pieces go on as they come: little waits in the kernel, and a client that
    /// reads nothing may take its time. The kernel keeps both options from one request of a connection to the next, so
    /// that later calls with the same time cost nothing.
    pub fn prepare_stream(&self, unacknowledged_max: Duration) {
        let ms = u32::try_from(unacknowledged_max.as_millis()).unwrap_or(u32::MAX);
        if self.prepared_ms.swap(ms, Relaxed) == ms {
            return;
        }
        if let Some(stream) = &*self.stream.lock() {
            // An error means that the client left, which the next write finds too.
            let _ = stream.inner().set_unsent_max(UNSENT_BYTES_MAX);
            let _ = stream.inner().set_unacknowledged_max(unacknowledged_max);
        }
    }

    /// Watches whether the client leaves. `None`: the socket was taken, or there is no descriptor for the watch.
    pub fn watch_peer(&self) -> Option<PeerWatch> {
        let stream = self.stream.lock();
        stream.as_ref().and_then(|stream| stream.inner().watch_peer().ok())
    }

    /// Makes the end of the connection a reset.
    pub fn reset_at_end(&self) {
        if let Some(stream) = &*self.stream.lock() {
            let _ = stream.inner().reset_at_end();
        }
    }

    /// Waits for the first byte of a client, and leaves it in the socket. `None`: the client left.
    ///
    /// # Errors
    /// The socket failed, was taken, or is encrypted.
    pub fn poll_first_byte(&self, cx: &mut Context<'_>) -> Poll<io::Result<Option<u8>>> {
        let stream = self.stream.lock();
        let Some(socket) = stream.as_ref().map(TokioIo::inner) else {
            return Poll::Ready(Err(io::ErrorKind::NotConnected.into()));
        };
        let mut byte = [0];
        let count = ready!(socket.poll_peek(cx, &mut byte))?;
        Poll::Ready(Ok(byte[..count].first().copied()))
    }

    /// Waits for bytes, and copies those that have come into the end of `buffer`. They stay in the socket.
    ///
    /// # Errors
    /// The socket failed, was taken, is encrypted, or ended without a further byte.
    pub fn poll_peek(&self, cx: &mut Context<'_>, buffer: &mut Vec<u8>) -> Poll<io::Result<usize>> {
        let stream = self.stream.lock();
        let Some(socket) = stream.as_ref().map(TokioIo::inner) else {
            return Poll::Ready(Err(io::ErrorKind::NotConnected.into()));
        };
        let mut bytes = [0; HEADER_BYTES_MAX];
        match ready!(socket.poll_peek(cx, &mut bytes))? {
            0 => Poll::Ready(Err(io::ErrorKind::UnexpectedEof.into())),
            count => {
                buffer.extend_from_slice(&bytes[..count]);
                Poll::Ready(Ok(count))
            }
        }
    }

    /// Reads bytes that have come, and drops them.
    ///
    /// # Errors
    /// The socket failed, was taken, or has fewer bytes.
    pub fn skip(&self, count: usize) -> io::Result<()> {
        let stream = self.stream.lock();
        let Some(socket) = stream.as_ref().map(TokioIo::inner) else {
            return Err(io::ErrorKind::NotConnected.into());
        };
        let mut buffer = [0; HEADER_BYTES_MAX];
        let buffer = buffer.get_mut(..count).ok_or(io::ErrorKind::InvalidInput)?;
        // These bytes were there a moment ago, and only this task reads.
        match socket.try_read(buffer)? {
            read if read == count => Ok(()),
            _ => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }

    /// Makes the socket encrypt. The handshake is still to come: see [`Self::poll_handshake`].
    ///
    /// # Errors
    /// The socket was taken, or the configuration cannot be used.
    pub fn encrypt(&self, config: Arc<ServerConfig>) -> io::Result<()> {
        let mut socket = self.stream.lock();
        let Some(Socket::Tcp(stream)) = socket.take().map(TokioIo::into_inner) else {
            return Err(io::ErrorKind::NotConnected.into());
        };
        *socket = Some(TokioIo::new(TlsSocket::accepted(stream, config)?.into()));
        Ok(())
    }

    /// Goes through the handshake of TLS. Returns whether it resumed an earlier session.
    ///
    /// # Errors
    /// The socket failed or was taken, or the client's TLS is not accepted ([`io::ErrorKind::InvalidData`]).
    pub fn poll_handshake(&self, cx: &mut Context<'_>) -> Poll<io::Result<bool>> {
        let stream = self.stream.lock();
        let Some(Socket::Tls(socket)) = stream.as_ref().map(TokioIo::inner) else {
            return Poll::Ready(Err(io::ErrorKind::NotConnected.into()));
        };
        ready!(socket.poll_handshake(cx))?;
        Poll::Ready(Ok(socket.is_resumed()))
    }

    /// Takes the socket out of the HTTP connection, which then ends without touching the socket. `None` the second
    /// time.
    #[must_use]
    pub fn take(&self) -> Option<Socket> {
        let stream = self.stream.lock().take();
        self.taken.notify_one();
        stream.map(TokioIo::into_inner)
    }

    /// Returns whether the socket was taken.
    #[must_use]
    pub fn is_taken(&self) -> bool {
        self.stream.lock().is_none()
    }

    /// Notes that a request was answered. The client need not send another one.
    pub fn answered(&self) {
        self.answered.store(true, Relaxed);
        self.quiet.store(true, Relaxed);
    }

    /// Returns whether the client is to blame for a failed connection: it broke off a request, or sent none in time.
    /// Probes that only connect and idle kept-alive connections are not to blame.
    #[must_use]
    pub fn is_at_fault(&self, is_timeout: bool) -> bool {
        let is_quiet = self.quiet.load(Relaxed);
        !self.is_taken() && (!is_quiet || (is_timeout && !self.answered.load(Relaxed)))
    }

    /// Returns whether the client began with TLS, and the socket does not speak it. Such a client was told so.
    #[must_use]
    pub fn greeted_in_tls(&self) -> bool {
        self.greeted_in_tls.load(Relaxed)
    }

    /// Returns whether no byte has come yet.
    fn is_untouched(&self) -> bool {
        self.quiet.load(Relaxed) && !self.answered.load(Relaxed)
    }

    /// Waits until the socket is taken.
    pub async fn wait_taken(&self) {
        self.taken.notified().await;
    }
}

/// The HTTP connection's end of a [`SharedSocket`].
#[derive(Debug)]
pub struct HttpSocket(pub Arc<SharedSocket>);

impl HttpSocket {
    fn with<T>(
        &self,
        act: impl FnOnce(Pin<&mut TokioIo<Socket>>) -> Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        match &mut *self.0.stream.lock() {
            Some(stream) => act(Pin::new(stream)),
            None => Poll::Ready(Err(io::ErrorKind::NotConnected.into())),
        }
    }

    /// Reads the first bytes of a client. Answers a greeting of TLS here, since hyper would say no more than 400, and
    /// shows hyper the end of the stream in its place.
    fn poll_first_read(
        &self,
        cx: &mut Context<'_>,
        mut buffer: ReadBufCursor<'_>,
    ) -> Poll<io::Result<()>> {
        // Not zeroed: that would cost more than the rest of the read.
        let mut bytes = [MaybeUninit::uninit(); FIRST_BYTES_MAX];
        let room = buffer.remaining().min(FIRST_BYTES_MAX);
        let mut first = hyper::rt::ReadBuf::uninit(&mut bytes[..room]);
        ready!(self.with(|stream| stream.poll_read(cx, first.unfilled())))?;
        let first = first.filled();
        let is_greeting = first.starts_with(&[HANDSHAKE, 3]) || first == [HANDSHAKE];
        if is_greeting && self.tell_plain() {
            self.0.greeted_in_tls.store(true, Relaxed);
        } else {
            buffer.put_slice(first);
        }
        Poll::Ready(Ok(()))
    }

    /// Tells a client that the socket speaks plain HTTP. Returns whether it does.
    fn tell_plain(&self) -> bool {
        let stream = self.0.stream.lock();
        let Some(socket) = stream.as_ref().map(TokioIo::inner) else { return false };
        if matches!(socket, Socket::Tls(_)) {
            return false;
        }
        // The send buffer of a new socket is empty, so one write is enough.
        let _ = socket.try_write(PLAIN);
        true
    }
}

impl Read for HttpSocket {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: ReadBufCursor<'_>,
    ) -> Poll<io::Result<()>> {
        let read = match self.0.is_untouched() {
            true => self.poll_first_read(cx, buffer),
            false => self.with(|stream| stream.poll_read(cx, buffer)),
        };
        if matches!(read, Poll::Ready(Ok(()))) {
            self.0.quiet.store(false, Relaxed);
        }
        read
    }
}

impl Write for HttpSocket {
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

/// Upper bound of the bytes of an answer that wait in the kernel for their first transmission.
const UNSENT_BYTES_MAX: u32 = 64 << 10;

/// First byte of a TLS connection: the type of a record with a message of the handshake. No request begins with it.
pub const HANDSHAKE: u8 = 22;

/// Upper bound of the first read: a greeting of TLS fits.
const FIRST_BYTES_MAX: usize = 4096;

/// Answer to a client that speaks TLS to a plain port. Programs that know TLS only call it a `wrong version number`, the
/// well-known sign of such a port.
const PLAIN: &[u8] = b"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\n\
x-content-type-options: nosniff\r\nconnection: close\r\ncontent-length: 122\r\n\r\n\
{\"error\":{\"code\":\"bad_request\",\"message\":\"This port speaks plain HTTP, not TLS: use http:// or ws://.\",\"retryable\":false}}";

#[cfg(test)]
mod tests {
    use socket2::SockRef;
    use tokio::net::{TcpListener, TcpStream};

    use super::*;

    #[tokio::test]
    async fn a_socket_is_prepared_once_for_each_time() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (client, _) =
            tokio::join!(TcpStream::connect(listener.local_addr().unwrap()), listener.accept());
        let client = client.unwrap().into_std().unwrap();
        let twin = client.try_clone().unwrap();
        let shared = SharedSocket::new(TcpStream::from_std(client).unwrap());
        let time = || SockRef::from(&twin).tcp_user_timeout().unwrap().unwrap().as_secs();
        shared.prepare_stream(Duration::from_secs(300));
        assert_eq!(time(), 300);
        assert_eq!(SockRef::from(&twin).tcp_notsent_lowat().unwrap(), UNSENT_BYTES_MAX);
        // Another time of which the socket does not know shows whether the kernel is told again.
        SockRef::from(&twin).set_tcp_user_timeout(Some(Duration::from_secs(7))).unwrap();
        shared.prepare_stream(Duration::from_secs(300));
        assert_eq!(time(), 7);
        shared.prepare_stream(Duration::from_secs(900));
        assert_eq!(time(), 900);
        shared.set_unacknowledged_max(Duration::from_secs(60));
        shared.prepare_stream(Duration::from_secs(900));
        assert_eq!(time(), 900);
    }
}
