//! Count of the bytes that wait in a socket, for another task than the one that reads them. Takes no bytes.

use std::{io, os::fd::OwnedFd};

use super::Socket;

/// Second descriptor of a socket. No event of the socket wakes a task for it.
#[derive(Debug)]
pub struct UnreadBytes(OwnedFd);

impl Socket {
    /// Returns the counter of the bytes that wait to be read.
    ///
    /// # Errors
    /// The process has no descriptor left.
    pub fn unread_bytes(&self) -> io::Result<UnreadBytes> {
        Ok(UnreadBytes(self.with_ref(|socket| socket.try_clone())?.into()))
    }
}

impl UnreadBytes {
    /// Returns the number of bytes that wait in the kernel; 0 where the kernel does not say.
    #[must_use]
    pub fn count(&self) -> u64 {
        rustix::io::ioctl_fionread(&self.0).unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    #[tokio::test]
    async fn bytes_count_until_they_are_read() {
        let (ours, theirs) = tokio::net::UnixStream::pair().unwrap();
        let (socket, mut peer) = (Socket::from(ours), theirs.into_std().unwrap());
        let unread = socket.unread_bytes().unwrap();
        assert_eq!(unread.count(), 0);
        peer.write_all(b"seven b").unwrap();
        assert_eq!(unread.count(), 7);
        std::future::poll_fn(|cx| socket.poll_read_ready(cx)).await.unwrap();
        assert_eq!(socket.try_read(&mut [0; 16]).unwrap(), 7);
        assert_eq!(unread.count(), 0);
    }
}
