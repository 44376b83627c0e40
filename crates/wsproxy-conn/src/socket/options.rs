//! Options of the kernel for sockets whose writers choose late what goes next; knows no messages.

use std::io;

#[cfg(target_os = "linux")]
use socket2::SockRef;

use super::Socket;

impl Socket {
    /// Sets the upper bound of the bytes that wait in the kernel before their first transmission. A write beyond it has
    /// to wait, so its caller can still send something else first. Does nothing at unix sockets.
    ///
    /// # Errors
    /// The kernel refused the option.
    pub fn set_unsent_max(&self, bytes: u32) -> io::Result<()> {
        #[cfg(target_os = "linux")]
        if let Some(stream) = self.tcp() {
            SockRef::from(stream).set_tcp_notsent_lowat(bytes)?;
        }
        #[cfg(not(target_os = "linux"))]
        let _ = bytes;
        Ok(())
    }
}
