//! `wsproxy health`: asks a running instance over HTTP, for containers without curl.

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpStream, ToSocketAddrs},
    process::ExitCode,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, anyhow, bail};
use rustls::{ClientConnection, Stream};
use rustls_pki_types::ServerName;
use socket2::{Domain, SockAddr, Socket, Type};

use super::{
    http,
    settings::{CliSettings, Reads},
};
use crate::{
    config::{
        Config,
        keys::Key,
        peer::{Peer, TrustedProxy},
    },
    http::listener::open,
    tls,
};

/// The keys that `health` reads: the address of an instance with the same configuration.
pub(super) struct HealthKeys;

impl Reads for HealthKeys {
    /// An instance goes on with what it has read while its files are replaced, and only it may read its keys.
    const SKIPS_FILES: bool = true;

    fn reads(key: &Key) -> bool {
        let path = key.path();
        let address = [
            "server.bind",
            "server.port",
            "server.unix",
            "server.trusted_proxies",
            "server.proxy_protocol",
            "admin.port",
            "tls.certificate",
            "tls.admin",
        ];
        address.contains(&path.as_str())
    }
}

/// Arguments of the command.
#[derive(clap::Args)]
#[command(after_help = EXAMPLE)]
pub(super) struct HealthArgs {
    /// URL to ask; http://unix:/file.sock:/health over a unix socket. Default: /health of the configured port or unix
    /// socket on this machine.
    #[arg(long, value_name = "URL")]
    url: Option<String>,
    #[command(flatten)]
    settings: CliSettings<HealthKeys>,
}

/// Returns success if the answer is a 200; else prints the reason to standard error and returns exit code 1.
pub(super) fn run(args: HealthArgs) -> anyhow::Result<ExitCode> {
    let (url, senders) = match args.url {
        Some(url) => (url, Vec::new()),
        None => {
            let config = args.settings.load()?.config;
            (url_of(&config), senders_of(&config))
        }
    };
    match ask(&url, &senders).with_context(|| format!("{url} is not healthy")) {
        Ok(()) => Ok(ExitCode::SUCCESS),
        Err(error) => {
            super::complain(format!("wsproxy: {error:#}\n"));
            Ok(ExitCode::FAILURE)
        }
    }
}

fn url_of(config: &Config) -> String {
    if let (Some(path), None) = (&config.server.unix, config.admin.port) {
        return format!("{UNIX}{}:/health", path.display());
    }
    format!("{}/health", own_url(config))
}

/// Returns the URL of the TCP port with the admin routes of an instance with this configuration, for this machine.
pub(super) fn own_url(config: &Config) -> String {
    let ip = config.admin.bind.unwrap_or(config.server.bind);
    let port = config.admin.port.unwrap_or(config.server.port);
    let is_encrypted = match config.admin.port {
        Some(_) => config.tls.admin,
        None => config.tls.certificate.is_some(),
    };
    let scheme = if is_encrypted { "https" } else { "http" };
    format!("{scheme}://{}", open::reachable(SocketAddr::new(ip, port)))
}

/// Returns the address that an instance with this configuration sees of a command on its machine.
pub(super) fn own_peer(config: &Config) -> Peer {
    let server = &config.server;
    Peer::of(open::reachable(SocketAddr::new(server.bind, server.port)).ip())
}

/// Returns the peers of which the asked port expects a header of the PROXY protocol.
fn senders_of(config: &Config) -> Vec<TrustedProxy> {
    let is_expected = config.server.proxy_protocol && config.admin.port.is_none();
    if is_expected { config.server.trusted_proxies.clone() } else { Vec::new() }
}

/// Asks `url`. If this machine's own address is among `senders`, a header of the PROXY protocol that names no client
/// goes before.
fn ask(url: &str, senders: &[TrustedProxy]) -> anyhow::Result<()> {
    let deadline = Instant::now() + TIMEOUT;
    if let Some(rest) = url.strip_prefix(UNIX) {
        let (file, path) = rest.split_once(':').unwrap_or((rest, "/"));
        let mut stream = Bounded { socket: connect_unix(file)?, deadline };
        introduce(&mut stream, Peer::Unix, senders)?;
        return exchange(&mut stream, &request(path, "localhost"));
    }
    let (rest, port) = match (url.strip_prefix("http://"), url.strip_prefix("https://")) {
        (Some(rest), _) => (rest, ":80"),
        (_, Some(rest)) => (rest, ":443"),
        _ => bail!("the URL must start with http:// or https://"),
    };
    let (host, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
    let path = if path.is_empty() { "/" } else { path };
    let (name, port) = match host.rsplit_once(':') {
        Some((name, port)) if !port.contains(']') => (name, &host[host.len() - port.len() - 1..]),
        _ => (host, port),
    };
    let mut addresses = format!("{name}{port}").to_socket_addrs()?;
    let address = addresses.next().context("the host has no address")?;
    let socket = TcpStream::connect_timeout(&address, TIMEOUT)?;
    let own = Peer::of(socket.local_addr()?.ip());
    let mut stream = Bounded { socket: socket.into(), deadline };
    introduce(&mut stream, own, senders)?;
    let request = request(path, host);
    if url.starts_with("http://") {
        return exchange(&mut stream, &request);
    }
    // The answer of this machine is wanted, whichever names its certificate has. The question tells no secret.
    let config = Arc::new(tls::trusting_client_config()?);
    let name = ServerName::try_from(name.trim_matches(['[', ']']).to_owned())?;
    let mut connection = ClientConnection::new(config, name)?;
    exchange(&mut Stream::new(&mut connection, &mut stream), &request).map_err(|error| {
        if speaks_no_tls(&error) {
            anyhow!("the port speaks no TLS: ask with http://")
        } else {
            error
        }
    })
}

/// Returns whether a handshake failed since the other side answered without TLS.
fn speaks_no_tls(error: &anyhow::Error) -> bool {
    let of_io = error.downcast_ref::<std::io::Error>().and_then(std::io::Error::get_ref);
    let of_tls = of_io.and_then(|cause| cause.downcast_ref::<rustls::Error>());
    let wrong = rustls::InvalidMessage::InvalidContentType;
    of_tls.is_some_and(|error| *error == rustls::Error::InvalidMessage(wrong))
}

fn introduce(stream: &mut Bounded, own: Peer, senders: &[TrustedProxy]) -> std::io::Result<()> {
    if own.is_trusted(senders) { stream.write_all(b"PROXY UNKNOWN\r\n") } else { Ok(()) }
}

fn request(path: &str, host: &str) -> String {
    format!("GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n")
}

/// Connects to a unix socket. A listener whose queue is full would let a connect wait without end.
fn connect_unix(file: &str) -> anyhow::Result<Socket> {
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    socket.connect_timeout(&SockAddr::unix(file)?, TIMEOUT)?;
    Ok(socket)
}

/// Sends a request, and looks at the status of its answer.
fn exchange(stream: &mut (impl Read + Write), request: &str) -> anyhow::Result<()> {
    stream.write_all(request.as_bytes())?;
    let status = http::read_status(stream)?;
    if (200..300).contains(&status) {
        return Ok(());
    }
    match told(stream) {
        Some(message) => bail!("status {status}: {message}"),
        None => bail!("status {status}"),
    }
}

/// Returns the message of a refusal, whose status has been read.
fn told(stream: &mut impl Read) -> Option<String> {
    let mut rest = Vec::new();
    // A connection that breaks, or a deadline, leaves what came before.
    let _ = stream.take(REFUSAL_BYTES_MAX).read_to_end(&mut rest);
    let body = rest.windows(4).position(|end| end == b"\r\n\r\n")?;
    let body: serde_json::Value = serde_json::from_slice(&rest[body + 4..]).ok()?;
    Some(body["error"]["message"].as_str()?.to_owned())
}

/// A socket whose reads and writes end at a deadline.
struct Bounded {
    socket: Socket,
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
        (&self.socket).read(buffer)
    }
}

impl Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.socket.set_write_timeout(self.left())?;
        (&self.socket).write(bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Beginning of the URL of a unix socket, as nginx writes it. The path of the request follows behind a colon.
const UNIX: &str = "http://unix:";

/// Upper bound of what is read of a refusal.
const REFUSAL_BYTES_MAX: u64 = 16 * 1024;

/// Below the usual time limits of container health checks.
const TIMEOUT: Duration = Duration::from_secs(3);

const EXAMPLE: &str = "Example:
  wsproxy health --url http://127.0.0.1:8080/ready && echo ready

The configuration is read for the address only: use the file, variables or flags of serve.";

#[cfg(test)]
mod tests {
    use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, TcpListener};

    use super::*;

    fn answer(text: &'static str) -> String {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let url = format!("http://{}/health", listener.local_addr().unwrap());
        std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut request = Vec::new();
            while !request.ends_with(b"\r\n\r\n") {
                let mut byte = [0];
                stream.read_exact(&mut byte).unwrap();
                request.extend(byte);
            }
            stream.write_all(text.as_bytes()).unwrap();
        });
        url
    }

    #[test]
    fn only_a_status_of_200_is_healthy() {
        assert!(ask(&answer("HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n"), &[]).is_ok());
        let down = ask(&answer("HTTP/1.1 503 Service Unavailable\r\n\r\n"), &[]).unwrap_err();
        assert_eq!(down.to_string(), "status 503");
        let refused = "HTTP/1.1 400 Bad Request\r\n\r\n{\"error\":{\"message\":\"Use https://.\"}}";
        let refused = ask(&answer(refused), &[]).unwrap_err();
        assert_eq!(refused.to_string(), "status 400: Use https://.");
        assert!(ask(&answer("SSH-2.0-OpenSSH_9.9\r\n"), &[]).is_err());
        assert!(ask(&answer(""), &[]).is_err());
        assert!(ask("ftp://localhost/", &[]).is_err());
        assert!(ask("http://unix:/no/such.sock:/health", &[]).is_err());
    }

    #[test]
    fn a_port_without_tls_is_told() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let url = format!("https://{}/health", listener.local_addr().unwrap());
        let instance = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            assert!(stream.read(&mut [0; 1024]).unwrap() > 0);
            stream.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").unwrap();
            stream
        });
        let error = ask(&url, &[]).unwrap_err();
        assert_eq!(error.to_string(), "the port speaks no TLS: ask with http://");
        drop(instance.join());
    }

    #[test]
    fn the_configured_port_is_asked_on_this_machine() {
        let mut config = Config::default();
        assert_eq!(url_of(&config), "http://127.0.0.1:8080/health");
        config.tls.certificate = Some("cert.pem".into());
        assert_eq!(url_of(&config), "https://127.0.0.1:8080/health");
        config.server.unix = Some("/run/wsproxy/a.sock".into());
        assert_eq!(url_of(&config), "http://unix:/run/wsproxy/a.sock:/health");
        config.admin.port = Some(9000);
        assert_eq!(url_of(&config), "http://127.0.0.1:9000/health");
        config.tls.admin = true;
        assert_eq!(url_of(&config), "https://127.0.0.1:9000/health");
        config.tls.admin = false;
        config.admin.bind = Some(IpAddr::V6(Ipv6Addr::UNSPECIFIED));
        assert_eq!(url_of(&config), "http://[::1]:9000/health");
    }
}
