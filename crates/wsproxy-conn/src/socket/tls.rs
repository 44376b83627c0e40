//! TLS over TCP, from either end; knows bytes only.

use std::{
    future::poll_fn,
    io::{self, ErrorKind::WouldBlock, IoSlice, Read, Write},
    sync::Arc,
    task::{Context, Poll, ready},
};

use parking_lot::Mutex;
use rustls::{
    ClientConfig, ClientConnection, Connection, HandshakeKind, ServerConfig, ServerConnection,
    pki_types::ServerName,
};
use tokio::net::TcpStream;

use crate::{
    outbox::SLICES_MAX,
    socket::{is_passing, poll_write},
};

/// Encrypted socket that its own task reads and that any task writes, without `&mut`.
///
/// Accepted bytes become a record, of which the kernel may take only a part. The last accepted byte counts as written
/// only when the kernel has taken the whole record. So a caller that has written everything leaves nothing in here,
/// and needs to know of no second buffer.
///
/// The caller must offer a byte that does not count as written again, and nothing else in its place. The outbox does
/// so: it never drops or overtakes a frame that is partly written.
#[derive(Debug)]
pub struct TlsSocket {
    pub(super) stream: TcpStream,
    /// Lock: taken while the state of a link may be locked; no other lock is taken under it.
    session: Mutex<Session>,
}

#[derive(Debug)]
struct Session {
    tls: Connection,
    /// Decrypted bytes wait: the last reader had no more room.
    has_unread: bool,
    /// The last read stopped at its bound of encrypted bytes, so that the kernel may have more.
    stopped_early: bool,
    /// Encrypted bytes that came since the last decrypted one.
    barren: usize,
    /// Bytes of the record that the kernel has taken in part or not at all. The last of them does not count as written
    /// yet. 0 where the kernel has everything.
    held: usize,
}

/// The kernel's socket, which never blocks.
struct Kernel<'a>(&'a TcpStream);

impl TlsSocket {
    /// Encrypts a socket that was dialled, and checks the certificate of the server as `config` says. Set a deadline.
    ///
    /// # Errors
    /// [`io::ErrorKind::InvalidData`] where the server's certificate or its TLS is not accepted; otherwise an error of
    /// the socket.
    pub async fn client(
        stream: TcpStream,
        config: Arc<ClientConfig>,
        server: ServerName<'static>,
    ) -> io::Result<Self> {
        let tls = ClientConnection::new(config, server).map_err(invalid)?;
        Self::new(stream, tls.into()).handshake().await
    }

    /// Encrypts a socket that was accepted. Set a deadline.
    ///
    /// # Errors
    /// [`io::ErrorKind::InvalidData`] where the client's TLS is not accepted; otherwise an error of the socket.
    pub async fn server(stream: TcpStream, config: Arc<ServerConfig>) -> io::Result<Self> {
        Self::accepted(stream, config)?.handshake().await
    }

    /// Prepares a socket that was accepted. Nothing else may be read or written before [`Self::poll_handshake`] is
    /// ready.
    ///
    /// # Errors
    /// [`io::ErrorKind::InvalidData`] where the configuration cannot be used.
    pub fn accepted(stream: TcpStream, config: Arc<ServerConfig>) -> io::Result<Self> {
        let tls = ServerConnection::new(config).map_err(invalid)?;
        Ok(Self::new(stream, tls.into()))
    }

    fn new(stream: TcpStream, tls: Connection) -> Self {
        let session = Session { tls, has_unread: false, stopped_early: false, barren: 0, held: 0 };
        Self { stream, session: Mutex::new(session) }
    }

    async fn handshake(self) -> io::Result<Self> {
        poll_fn(|cx| self.poll_handshake(cx)).await?;
        Ok(self)
    }

    /// Exchanges the messages of the handshake. Ready once bytes can be read and written.
    ///
    /// # Errors
    /// [`io::ErrorKind::InvalidData`] where the peer's TLS is not accepted; otherwise an error of the socket.
    pub fn poll_handshake(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut session = self.session.lock();
        loop {
            match session.flush(&self.stream) {
                Ok(()) => {}
                Err(error) if error.kind() == WouldBlock => {
                    ready!(self.stream.poll_write_ready(cx))?;
                    continue;
                }
                Err(error) => return Poll::Ready(Err(error)),
            }
            if !session.tls.is_handshaking() {
                return Poll::Ready(Ok(()));
            }
            ready!(self.stream.poll_read_ready(cx))?;
            match session.tls.read_tls(&mut Kernel(&self.stream)) {
                Ok(0) => return Poll::Ready(Err(io::ErrorKind::UnexpectedEof.into())),
                // The peer's first bytes may come with its last message of the handshake.
                Ok(_) => session.has_unread = session.process(&self.stream)? > 0,
                Err(error) if error.kind() == WouldBlock => {}
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
    }

    /// Returns whether the handshake resumed an earlier session, which needs no signature.
    #[must_use]
    pub fn is_resumed(&self) -> bool {
        self.session.lock().tls.handshake_kind() == Some(HandshakeKind::Resumed)
    }

    /// Reads decrypted bytes, from a bounded number of encrypted ones: a peer may send few bytes in each record, and
    /// others wait for the session meanwhile.
    pub(super) fn try_read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        let mut session = self.session.lock();
        let (mut filled, mut encrypted) = (0, 0);
        let ended = loop {
            match session.fill(&self.stream, &mut buffer[filled..], &mut encrypted) {
                Ok(0) => break Ok(()),
                Ok(count) => filled += count,
                Err(error) => break Err(error),
            }
            if filled == buffer.len() || encrypted >= ENCRYPTED_BYTES_MAX {
                break Ok(());
            }
        };
        session.stopped_early = encrypted >= ENCRYPTED_BYTES_MAX;
        // Answers to the peer's handshake messages; where the socket takes none of them now, the next write does.
        let _ = session.flush(&self.stream);
        // The next read finds the end or the error again.
        if filled > 0 { Ok(filled) } else { ended.map(|()| 0) }
    }

    pub(super) fn try_write_vectored(&self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        let mut session = self.session.lock();
        session.flush(&self.stream)?;
        let written = usize::from(std::mem::take(&mut session.held) > 0);
        let accepted = session.accept(slices, written)?;
        match session.flush(&self.stream) {
            Ok(()) => Ok(written + accepted),
            Err(error) if error.kind() == WouldBlock && accepted > 0 => {
                session.held = accepted;
                match written + accepted - 1 {
                    0 => Err(error),
                    count => Ok(count),
                }
            }
            Err(error) => Err(error),
        }
    }

    /// Writes as [`Self::try_write_vectored`] does; waits where the kernel takes nothing.
    pub(super) fn poll_write_vectored(
        &self,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        poll_write(|| self.try_write_vectored(slices), || self.stream.poll_write_ready(cx))
    }

    pub(super) fn held_bytes(&self) -> usize {
        self.session.lock().held
    }

    pub(super) fn stopped_early(&self) -> bool {
        self.session.lock().stopped_early
    }

    pub(super) fn poll_read_ready(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.session.lock().has_unread {
            return Poll::Ready(Ok(()));
        }
        self.stream.poll_read_ready(cx)
    }

    /// Tells the peer that the end of the stream is meant. The alert is lost where the kernel takes no more.
    pub(super) fn say_goodbye(&self) {
        let mut session = self.session.lock();
        session.tls.send_close_notify();
        let _ = session.flush(&self.stream);
    }

    /// As [`Self::say_goodbye`]; waits where the kernel takes no more.
    pub(super) fn poll_goodbye(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        loop {
            let mut session = self.session.lock();
            session.tls.send_close_notify();
            match session.flush(&self.stream) {
                Err(error) if is_passing(&error) => {}
                result => return Poll::Ready(result),
            }
            drop(session);
            ready!(self.stream.poll_write_ready(cx))?;
        }
    }
}

impl Session {
    /// Gives the kernel what is encrypted.
    fn flush(&mut self, stream: &TcpStream) -> io::Result<()> {
        while self.tls.wants_write() {
            if self.tls.write_tls(&mut Kernel(stream))? == 0 {
                return Err(io::ErrorKind::WriteZero.into());
            }
        }
        Ok(())
    }

    /// Decrypts what came. Returns how many bytes can be read. An error is found again by the next call; bytes of the
    /// records before it can still be read.
    fn process(&mut self, stream: &TcpStream) -> io::Result<usize> {
        match self.tls.process_new_packets() {
            Ok(state) => Ok(state.plaintext_bytes_to_read()),
            Err(error) => {
                // The alert that tells the peer what is wrong.
                let _ = self.flush(stream);
                Err(invalid(error))
            }
        }
    }

    /// Reads decrypted bytes, after more from the kernel where there are none. `Ok(0)` is the end of the stream. Adds
    /// what came from the kernel to `encrypted`.
    fn fill(
        &mut self,
        stream: &TcpStream,
        buffer: &mut [u8],
        encrypted: &mut usize,
    ) -> io::Result<usize> {
        loop {
            let unread = match self.process(stream) {
                Ok(unread) => unread,
                // The peer wrote these bytes before the bad record, and may have meant them as its last words.
                Err(error) => match self.tls.reader().read(buffer) {
                    Ok(count @ 1..) => {
                        self.has_unread = true;
                        return Ok(count);
                    }
                    _ => return Err(error),
                },
            };
            let count = match self.tls.reader().read(buffer) {
                Err(error) if error.kind() == WouldBlock => {
                    if self.barren > BARREN_BYTES_MAX {
                        return Err(io::ErrorKind::InvalidData.into());
                    }
                    let came = self.tls.read_tls(&mut Kernel(stream))?;
                    *encrypted += came;
                    self.barren += came;
                    continue;
                }
                // The end of the stream without the alert counts as the end: the WebSocket's close frame tells whether
                // the peer had sent everything.
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => 0,
                result => result?,
            };
            self.has_unread = unread > count;
            if count > 0 {
                self.barren = 0;
            }
            return Ok(count);
        }
    }

    /// Encrypts bytes of `slices` for one record, without the first `written` bytes, which are encrypted already.
    fn accept(&mut self, slices: &[IoSlice<'_>], written: usize) -> io::Result<usize> {
        let mut parts = [IoSlice::new(&[]); SLICES_MAX];
        let (mut count, mut left) = (0, RECORD_BYTES);
        // A byte that counts as unwritten is the first of the first slice that has any.
        let slices = slices.iter().filter(|slice| !slice.is_empty());
        for (part, slice) in parts.iter_mut().zip(slices) {
            let slice = &slice[if count == 0 { written } else { 0 }..];
            let taken = slice.len().min(left);
            // The last byte of a record counts as written only later. A frame gets at least two bytes of a record, so
            // that a frame that is begun never looks untouched.
            if left == 0 || count > 0 && taken == 1 {
                break;
            }
            *part = IoSlice::new(&slice[..taken]);
            left -= taken;
            count += 1;
        }
        self.tls.writer().write_vectored(&parts[..count])
    }
}

impl Read for Kernel<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.try_read(buffer)
    }
}

impl Write for Kernel<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.try_write(bytes)
    }

    fn write_vectored(&mut self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        self.0.try_write_vectored(slices)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn invalid(error: rustls::Error) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}

/// Bytes that are encrypted at once: those of one record.
const RECORD_BYTES: usize = 16 * 1024;

/// Number of encrypted bytes after which a read stops.
const ENCRYPTED_BYTES_MAX: usize = 64 * 1024;

/// Upper bound of the encrypted bytes between two decrypted ones. Beyond it the connection ends: the peer sends nothing
/// but empty records, new keys or tickets. A whole record and dozens of tickets fit.
const BARREN_BYTES_MAX: usize = 32 * 1024;
