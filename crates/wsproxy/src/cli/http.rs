//! One HTTP request of a command to a running instance, bounded in time and size: over TCP, TLS or a unix socket.

use std::{
    fmt,
    io::{self, Read, Write},
    net::{SocketAddr, TcpStream, ToSocketAddrs},
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, anyhow, bail};
use rustls::{ClientConfig, ClientConnection, Stream};
use rustls_pki_types::ServerName;
use socket2::{Domain, SockAddr, Socket, Type};

use crate::{
    config::{
        Config,
        peer::{Peer, TrustedProxy},
    },
    http::listener::open,
};

/// An instance and a path of its routes.
#[derive(Debug)]
pub(super) struct HttpPlace {
    end: End,
    /// Path and query.
    path: String,
    /// Peers of which the instance expects a header of the PROXY protocol.
    senders: Vec<TrustedProxy>,
}

/// The end of an instance's listener.
#[derive(Debug)]
enum End {
    /// A port: whether it speaks TLS, and its name or address as in the header `Host`.
    Port(bool, String),
    /// The file of a unix socket.
    Unix(String),
}

/// A request without a body.
pub(super) struct Question<'a> {
    pub(super) method: &'static str,
    /// Further lines of the head, each with its end.
    pub(super) headers: &'a str,
    /// Upper bound of the time to the end of the answer.
    pub(super) time_max: Duration,
}

impl HttpPlace {
    /// Reads a URL; `http://unix:/file.sock:/path` is that of a unix socket, as nginx writes it.
    ///
    /// # Errors
    /// The scheme is another one.
    pub(super) fn read(url: &str) -> anyhow::Result<Self> {
        let senders = Vec::new();
        if let Some(rest) = url.strip_prefix(UNIX) {
            let (file, path) = rest.split_once(':').unwrap_or((rest, ""));
            return Ok(Self { end: End::Unix(file.to_owned()), path: rooted(path), senders });
        }
        let (rest, is_encrypted) = match (url.strip_prefix("http://"), url.strip_prefix("https://"))
        {
            (Some(rest), _) => (rest, false),
            (_, Some(rest)) => (rest, true),
            _ => bail!("the URL must start with http:// or https://"),
        };
        let (host, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
        Ok(Self { end: End::Port(is_encrypted, host.to_owned()), path: rooted(path), senders })
    }

    /// Returns the place of the admin routes of an instance with this configuration, for this machine.
    pub(super) fn own(config: &Config) -> Self {
        let Some(port) = config.admin.port else { return Self::of_clients(config) };
        let address = SocketAddr::new(config.admin.bind.unwrap_or(config.server.bind), port);
        let end = End::Port(config.tls.admin, open::reachable(address).to_string());
        Self { end, path: rooted(""), senders: Vec::new() }
    }

    /// Returns the place of the clients' listener of an instance with this configuration, for this machine.
    pub(super) fn of_clients(config: &Config) -> Self {
        let server = &config.server;
        let is_encrypted = config.tls.certificate.is_some();
        let address = open::reachable(SocketAddr::new(server.bind, server.port));
        let end = match &server.unix {
            Some(path) => End::Unix(path.display().to_string()),
            None => End::Port(is_encrypted, address.to_string()),
        };
        let senders =
            if server.proxy_protocol { server.trusted_proxies.clone() } else { Vec::new() };
        Self { end, path: rooted(""), senders }
    }

    /// Returns the place of a route below this one.
    pub(super) fn route(self, path: &str) -> Self {
        Self { path: format!("{}{path}", self.path.trim_end_matches('/')), ..self }
    }

    /// Asks, and reads the answer. `trust` makes the configuration for TLS.
    ///
    /// # Errors
    /// There is no connection, or no answer in time; or what `read` returns.
    pub(super) fn ask<T>(
        &self,
        question: &Question<'_>,
        trust: impl FnOnce() -> anyhow::Result<ClientConfig>,
        read: impl FnOnce(&mut dyn Read) -> anyhow::Result<T>,
    ) -> anyhow::Result<T> {
        let Question { method, headers, time_max } = question;
        let deadline = Instant::now() + *time_max;
        let connect_max = CONNECT_MAX.min(*time_max);
        let host = if let End::Port(_, host) = &self.end { host } else { "localhost" };
        let request = format!(
            "{method} {} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n{headers}\r\n",
            self.path
        );
        let (socket, own) = match &self.end {
            End::Port(is_encrypted, host) => {
                let (name, port) = name_and_port(host);
                let port = port.unwrap_or(if *is_encrypted { "443" } else { "80" });
                let mut addresses = format!("{name}:{port}").to_socket_addrs()?;
                let address = addresses.next().context("the host has no address")?;
                let socket = TcpStream::connect_timeout(&address, connect_max)?;
                let own = Peer::of(socket.local_addr()?.ip());
                (socket.into(), own)
            }
            End::Unix(file) => {
                let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
                // A listener whose queue is full would let a connect wait without end.
                socket.connect_timeout(&SockAddr::unix(file)?, connect_max)?;
                (socket, Peer::Unix)
            }
        };
        let mut stream = Bounded { socket, deadline };
        if own.is_trusted(&self.senders) {
            stream.write_all(NO_CLIENT)?;
        }
        let End::Port(true, host) = &self.end else {
            stream.write_all(request.as_bytes())?;
            return read(&mut stream);
        };
        let name = name_and_port(host).0.trim_matches(['[', ']']).to_owned();
        let mut connection =
            ClientConnection::new(Arc::new(trust()?), ServerName::try_from(name)?)?;
        let mut stream = Stream::new(&mut connection, &mut stream);
        let answer = stream.write_all(request.as_bytes()).map_err(anyhow::Error::from);
        answer.and_then(|()| read(&mut stream)).map_err(|error| match speaks_no_tls(&error) {
            true => anyhow!("the port speaks no TLS: ask with http://"),
            false => error,
        })
    }
}

/// Returns whether a handshake failed since the other side answered without TLS.
fn speaks_no_tls(error: &anyhow::Error) -> bool {
    let of_io = error.downcast_ref::<io::Error>().and_then(io::Error::get_ref);
    let of_tls = of_io.and_then(|cause| cause.downcast_ref::<rustls::Error>());
    let wrong = rustls::InvalidMessage::InvalidContentType;
    of_tls.is_some_and(|error| *error == rustls::Error::InvalidMessage(wrong))
}

impl fmt::Display for HttpPlace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.end {
            End::Port(true, host) => write!(f, "https://{host}{}", self.path),
            End::Port(false, host) => write!(f, "http://{host}{}", self.path),
            End::Unix(file) => write!(f, "{UNIX}{file}:{}", self.path),
        }
    }
}

fn rooted(path: &str) -> String {
    if path.is_empty() { "/".to_owned() } else { path.to_owned() }
}

/// Cuts off a port. An address of IPv6 stands in brackets.
fn name_and_port(host: &str) -> (&str, Option<&str>) {
    match host.rsplit_once(':') {
        Some((name, port)) if !port.contains(']') => (name, Some(port)),
        _ => (host, None),
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
    socket: Socket,
    deadline: Instant,
}

impl Bounded {
    fn left(&self) -> io::Result<Option<Duration>> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        if left.is_zero() { Err(io::ErrorKind::TimedOut.into()) } else { Ok(Some(left)) }
    }
}

impl Read for Bounded {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.socket.set_read_timeout(self.left()?)?;
        (&self.socket).read(buffer)
    }
}

impl Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.socket.set_write_timeout(self.left()?)?;
        (&self.socket).write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Beginning of the URL of a unix socket. The path of the request follows the file behind a colon.
const UNIX: &str = "http://unix:";

/// Header of the PROXY protocol that names no client.
const NO_CLIENT: &[u8] = b"PROXY UNKNOWN\r\n";

/// Upper bound of the time to connect.
const CONNECT_MAX: Duration = Duration::from_secs(3);

/// Upper bound of the head of an answer.
const HEAD_BYTES_MAX: usize = 64 * 1024;

/// Upper bound of the body of an answer.
const BODY_BYTES_MAX: usize = 4 * 1024 * 1024;

#[cfg(test)]
mod tests {
    use std::net::{IpAddr, Ipv6Addr};

    use super::*;

    #[test]
    fn urls_are_read_and_written_as_they_are() {
        for url in [
            "http://127.0.0.1:8080/health",
            "https://[::1]:8443/health?x=1",
            "http://gateway/",
            "http://unix:/run/a.sock:/ready",
        ] {
            assert_eq!(HttpPlace::read(url).unwrap().to_string(), url);
        }
        let read = |url: &str| HttpPlace::read(url).unwrap().route("/x").to_string();
        assert_eq!(read("http://gateway"), "http://gateway/x");
        assert_eq!(read("https://gateway/base/"), "https://gateway/base/x");
        assert_eq!(read("http://unix:/run/a.sock"), "http://unix:/run/a.sock:/x");
        assert!(HttpPlace::read("ftp://localhost/").is_err());
        assert_eq!(name_and_port("[::1]"), ("[::1]", None));
        assert_eq!(name_and_port("[::1]:80"), ("[::1]", Some("80")));
    }

    #[test]
    fn the_configured_port_is_asked_on_this_machine() {
        let url = |config: &Config| HttpPlace::own(config).route("/health").to_string();
        let mut config = Config::default();
        assert_eq!(url(&config), "http://127.0.0.1:8080/health");
        config.tls.certificate = Some("cert.pem".into());
        assert_eq!(url(&config), "https://127.0.0.1:8080/health");
        config.server.unix = Some("/run/wsproxy/a.sock".into());
        assert_eq!(url(&config), "http://unix:/run/wsproxy/a.sock:/health");
        config.admin.port = Some(9000);
        assert_eq!(url(&config), "http://127.0.0.1:9000/health");
        config.tls.admin = true;
        assert_eq!(url(&config), "https://127.0.0.1:9000/health");
        config.tls.admin = false;
        config.admin.bind = Some(IpAddr::V6(Ipv6Addr::UNSPECIFIED));
        assert_eq!(url(&config), "http://[::1]:9000/health");
    }
}
