//! Watch of a socket's peer that leaves while this side reads nothing. Takes no bytes.

use std::{io, os::fd::OwnedFd, time::Duration};

use socket2::SockRef;
use tokio::{
    io::Interest,
    net::{TcpStream, UnixStream},
};

use super::Socket;

/// Second descriptor of a socket, which tells that the peer left even while bytes wait that are not read.
#[derive(Debug)]
pub struct PeerWatch(Descriptor);

#[derive(Debug)]
enum Descriptor {
    Tcp(TcpStream),
    Unix(UnixStream),
}

/// Sign that a peer has left.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Leaving {
    /// The peer ended its direction of the connection, or all of it.
    Ends,
    /// The connection failed. A peer that ended its direction may still read.
    Fails,
}

impl Socket {
    /// Watches the peer.
    ///
    /// # Errors
    /// The process has no descriptor left.
    ///
    /// # Panics
    /// Outside of a tokio runtime.
    pub fn watch_peer(&self) -> io::Result<PeerWatch> {
        let descriptor = OwnedFd::from(self.with_ref(|socket| socket.try_clone())?);
        Ok(PeerWatch(match self {
            Self::Unix(_) => Descriptor::Unix(UnixStream::from_std(descriptor.into())?),
            Self::Tcp(_) | Self::Tls(_) => Descriptor::Tcp(TcpStream::from_std(descriptor.into())?),
        }))
    }

    /// Makes the end of the connection a reset, which no peer takes for the end of what it reads.
    ///
    /// # Errors
    /// The kernel refused the option.
    pub fn reset_at_end(&self) -> io::Result<()> {
        self.with_ref(|socket| socket.set_linger(Some(Duration::ZERO)))
    }
}

impl PeerWatch {
    /// Makes the end of the connection a reset, as [`Socket::reset_at_end`] does.
    ///
    /// # Errors
    /// The kernel refused the option.
    pub fn reset_at_end(&self) -> io::Result<()> {
        let linger = Some(Duration::ZERO);
        match &self.0 {
            Descriptor::Tcp(stream) => SockRef::from(stream).set_linger(linger),
            Descriptor::Unix(stream) => SockRef::from(stream).set_linger(linger),
        }
    }

    /// Waits until the peer leaves.
    pub async fn left(&self, sign: Leaving) {
        // Neither waits for bytes: the kernel tells the end of a peer's direction beside them, and urgent bytes not at all.
        let interest = match sign {
            Leaving::Ends => Interest::PRIORITY | Interest::ERROR,
            Leaving::Fails => Interest::ERROR,
        };
        // An error means that the runtime ends.
        let _ = match &self.0 {
            Descriptor::Tcp(stream) => stream.ready(interest).await,
            Descriptor::Unix(stream) => stream.ready(interest).await,
        };
    }
}

#[cfg(test)]
mod tests {
    use tokio::{io::AsyncWriteExt as _, net::TcpListener, time::timeout};

    use super::*;

    async fn pair() -> (Socket, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let peer = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        (listener.accept().await.unwrap().0.into(), peer)
    }

    async fn is_told(watch: &PeerWatch, sign: Leaving) -> bool {
        timeout(Duration::from_millis(200), watch.left(sign)).await.is_ok()
    }

    #[tokio::test]
    async fn a_peer_that_leaves_behind_unread_bytes_is_seen() {
        let (socket, mut peer) = pair().await;
        let watch = socket.watch_peer().unwrap();
        peer.write_all(b"unread").await.unwrap();
        assert!(!is_told(&watch, Leaving::Ends).await);
        peer.shutdown().await.unwrap();
        assert!(is_told(&watch, Leaving::Ends).await);
        assert!(!is_told(&watch, Leaving::Fails).await, "the peer may still read");
    }

    #[tokio::test]
    async fn a_reset_is_a_failure() {
        let (socket, mut peer) = pair().await;
        let watch = socket.watch_peer().unwrap();
        peer.write_all(b"unread").await.unwrap();
        Socket::from(peer).reset_at_end().unwrap();
        assert!(is_told(&watch, Leaving::Fails).await);
        assert!(is_told(&watch, Leaving::Ends).await);
    }
}
