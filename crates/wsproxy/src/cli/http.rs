//! One HTTP request of a command to a running instance, bounded in time and size.

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpStream, ToSocketAddrs},
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, bail};
use rustls::{ClientConfig, ClientConnection, Stream};
use rustls_pki_types::ServerName;

/// The parts of a URL.
pub(super) struct HttpPlace<'u> {
    is_encrypted: bool,
    /// Name or address as in the header `Host`.
    pub(super) host: &'u str,
    /// Path and query.
    pub(super) path: &'u str,
}

impl<'u> HttpPlace<'u> {
    /// Reads a URL.
    ///
    /// # Errors
    /// The scheme is another one.
    pub(super) fn read(url: &'u str) -> anyhow::Result<Self> {
        let (rest, is_encrypted) = match (url.strip_prefix("http://"), url.strip_prefix("https://"))
        {
            (Some(rest), _) => (rest, false),
            (_, Some(rest)) => (rest, true),
            _ => bail!("the URL must start with http:// or https://"),
        };
        let (host, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
        Ok(Self { is_encrypted, host, path: if path.is_empty() { "/" } else { path } })
    }

    /// Sends a request and reads its answer, within `time_max`. `trust` makes the configuration for TLS.
    ///
    /// # Errors
    /// There is no connection, or no answer in time; or what `read` returns.
    pub(super) fn exchange<T>(
        &self,
        request: &str,
        trust: impl FnOnce() -> anyhow::Result<ClientConfig>,
        time_max: Duration,
        read: impl FnOnce(&mut dyn Read) -> anyhow::Result<T>,
    ) -> anyhow::Result<T> {
        let default = if self.is_encrypted { ":443" } else { ":80" };
        let (name, port) = match self.host.rsplit_once(':') {
            Some((name, port)) if !port.contains(']') => {
                (name, &self.host[self.host.len() - port.len() - 1..])
            }
            _ => (self.host, default),
        };
        let mut addresses = format!("{name}{port}").to_socket_addrs()?;
        let address: SocketAddr = addresses.next().context("the host has no address")?;
        let connect_max = time_max.min(CONNECT_MAX);
        let mut stream = Bounded {
            socket: TcpStream::connect_timeout(&address, connect_max)?,
            deadline: Instant::now() + time_max,
        };
        if !self.is_encrypted {
            stream.write_all(request.as_bytes())?;
            return read(&mut stream);
        }
        let name = ServerName::try_from(name.trim_matches(['[', ']']).to_owned())?;
        let mut connection = ClientConnection::new(Arc::new(trust()?), name)?;
        let mut stream = Stream::new(&mut connection, &mut stream);
        stream.write_all(request.as_bytes())?;
        read(&mut stream)
    }
}

/// Reads the status of an answer, and no more.
///
/// # Errors
/// The connection was closed before, or the answer is not HTTP.
pub(super) fn read_status(stream: &mut dyn Read) -> anyhow::Result<u16> {
    let mut head = [0; "HTTP/1.1 200".len()];
    let mut filled = 0;
    while filled < head.len() {
        match stream.read(&mut head[filled..])? {
            0 => bail!("the connection was closed without an answer"),
            n => filled += n,
        }
    }
    let status = match head.strip_prefix(b"HTTP/1.") {
        Some([_, b' ', status @ ..]) => str::from_utf8(status).ok(),
        _ => None,
    };
    status.and_then(|status| status.parse().ok()).context("the answer is not HTTP")
}

/// Reads an answer with a `Content-Length`: its status and body.
///
/// # Errors
/// As [`read_status`], or the body is too large.
pub(super) fn read_answer(stream: &mut dyn Read) -> anyhow::Result<(u16, Vec<u8>)> {
    let status = read_status(stream)?;
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        if head.len() > HEAD_BYTES_MAX || stream.read(&mut byte)? == 0 {
            bail!("the answer has no end");
        }
        head.extend(byte);
    }
    let head = String::from_utf8_lossy(&head).to_ascii_lowercase();
    let length = head.lines().find_map(|line| line.strip_prefix("content-length:"));
    let length: usize = length.and_then(|length| length.trim().parse().ok()).unwrap_or(0);
    if length > BODY_BYTES_MAX {
        bail!("the answer is too large");
    }
    let mut body = vec![0; length];
    stream.read_exact(&mut body).context("the answer was cut off")?;
    Ok((status, body))
}

/// A socket whose reads and writes end at a deadline.
struct Bounded {
    socket: TcpStream,
    deadline: Instant,
}

impl Bounded {
    fn left(&self) -> Option<Duration> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        Some(left.max(Duration::from_millis(1)))
    }
}

impl Read for Bounded {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        self.socket.set_read_timeout(self.left())?;
        self.socket.read(buffer)
    }
}

impl Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.socket.set_write_timeout(self.left())?;
        self.socket.write(bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Upper bound of the time to connect.
const CONNECT_MAX: Duration = Duration::from_secs(3);

/// Upper bound of the head of an answer.
const HEAD_BYTES_MAX: usize = 64 * 1024;

/// Upper bound of the body of an answer.
const BODY_BYTES_MAX: usize = 4 * 1024 * 1024;
