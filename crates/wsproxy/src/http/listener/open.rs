//! Open listeners: on an address, or on a unix socket. Knows no requests.

use std::{
    fmt,
    io::{self, ErrorKind},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::PathBuf,
};

use socket2::{Domain, Protocol, SockAddr, Type};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use wsproxy_conn::Socket;

use crate::{config::peer::Peer, http::listener::socket_file::SocketFile};

/// A place to listen at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// An address and a port.
    Tcp(SocketAddr),
    /// The file of a unix socket, and its permissions.
    Unix(PathBuf, u32),
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => address.fmt(f),
            Self::Unix(path, _) => write!(f, "unix:{}", path.display()),
        }
    }
}

/// An open listener.
#[derive(Debug)]
pub struct Listener(Kind);

#[derive(Debug)]
enum Kind {
    Tcp(TcpListener),
    Unix(UnixListener, SocketFile),
}

impl Listener {
    /// Listens at `place`. With `shares`, the processes that ask for it share a port, and the newest one takes a unix
    /// socket over.
    ///
    /// # Errors
    /// Another process listens there, the address does not belong to this machine, or the file cannot be made. The error
    /// says what to do.
    pub fn open(place: &Place, shares: bool) -> io::Result<Self> {
        let opened = match place {
            Place::Tcp(address) => bind(*address, shares).map(Kind::Tcp),
            Place::Unix(path, mode) => {
                SocketFile::listen(path, *mode, BACKLOG, shares).and_then(|(listener, file)| {
                    Ok(Kind::Unix(UnixListener::from_std(listener)?, file))
                })
            }
        };
        opened.map(Self).map_err(|error| match advice(place, error.kind()) {
            Some(advice) => io::Error::new(error.kind(), format!("{error}. Do: {advice}")),
            None => error,
        })
    }

    /// Returns the address with the port that was free; `None` for a unix socket.
    ///
    /// # Errors
    /// The operating system does not tell.
    pub fn address(&self) -> io::Result<Option<SocketAddr>> {
        match &self.0 {
            Kind::Tcp(listener) => listener.local_addr().map(Some),
            Kind::Unix(..) => Ok(None),
        }
    }

    /// Waits for the next socket.
    ///
    /// # Errors
    /// The client has left already, or the process lacks descriptors or memory.
    pub async fn accept(&self) -> io::Result<(Socket, Peer)> {
        match &self.0 {
            Kind::Tcp(listener) => {
                let (stream, address) = listener.accept().await?;
                Ok((stream.into(), Peer::of(address.ip())))
            }
            Kind::Unix(listener, _) => {
                let (stream, _) = listener.accept().await?;
                Ok((stream.into(), Peer::Unix))
            }
        }
    }

    /// Closes the listener, after `take` has got every socket that waits: the kernel would reset these. The file of a
    /// unix socket is removed before, so that no further client finds it.
    ///
    /// # Errors
    /// The last sockets cannot be accepted.
    pub fn close(self, take: impl FnMut(Socket, Peer)) -> io::Result<()> {
        match self.0 {
            Kind::Tcp(listener) => {
                // The runtime may not know yet of the newest sockets, so the listener is asked without the runtime.
                let listener = listener.into_std()?;
                let next = || {
                    let (stream, address) = listener.accept()?;
                    stream.set_nonblocking(true)?;
                    Ok((TcpStream::from_std(stream)?.into(), Peer::of(address.ip())))
                };
                empty(next, take)
            }
            Kind::Unix(listener, file) => {
                drop(file);
                let listener = listener.into_std()?;
                let next = || {
                    let (stream, _) = listener.accept()?;
                    stream.set_nonblocking(true)?;
                    Ok((UnixStream::from_std(stream)?.into(), Peer::Unix))
                };
                empty(next, take)
            }
        }
    }
}

/// Takes sockets until none waits.
fn empty(
    mut next: impl FnMut() -> io::Result<(Socket, Peer)>,
    mut take: impl FnMut(Socket, Peer),
) -> io::Result<()> {
    // Bounded, since clients may come as fast as they are taken.
    for _ in 0..LAST_MAX {
        match next() {
            Ok((socket, peer)) => take(socket, peer),
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
            Err(error) if is_of_one_connection(&error) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn bind(address: SocketAddr, shares: bool) -> io::Result<TcpListener> {
    let domain = Domain::for_address(address);
    let socket = socket2::Socket::new(domain, Type::STREAM, Some(Protocol::TCP))?;
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(shares)?;
    socket.set_nonblocking(true)?;
    socket.bind(&SockAddr::from(address))?;
    socket.listen(BACKLOG)?;
    TcpListener::from_std(socket.into())
}

/// Returns the thing to do where a listener cannot be opened; `None` where only the error tells it.
#[must_use]
pub fn advice(place: &Place, kind: ErrorKind) -> Option<&'static str> {
    use ErrorKind::{AddrInUse, AddrNotAvailable, AlreadyExists, NotFound, PermissionDenied};
    Some(match (place, kind) {
        (Place::Tcp(_), AddrInUse) => {
            "end the process that listens there, which wsproxy config check --connect names, or choose another port. An \
             instance that was told to end listens until server.drain_delay is over"
        }
        (Place::Tcp(_), AddrNotAvailable) => "choose an address of this machine, or 0.0.0.0 or ::",
        (Place::Tcp(_), PermissionDenied) => {
            "choose a port from 1024 on, or grant CAP_NET_BIND_SERVICE"
        }
        (Place::Unix(..), AlreadyExists) => "remove that file, or choose another path",
        (Place::Unix(..), NotFound) => "make the folder, or set RuntimeDirectory= in the unit",
        (Place::Unix(..), PermissionDenied) => "let the gateway's user write into the folder",
        _ => return None,
    })
}

/// Returns the address at which this machine reaches a listener; the loopback for one on all addresses.
#[must_use]
pub fn reachable(mut address: SocketAddr) -> SocketAddr {
    match address.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => address.set_ip(Ipv4Addr::LOCALHOST.into()),
        IpAddr::V6(ip) if ip.is_unspecified() => address.set_ip(Ipv6Addr::LOCALHOST.into()),
        _ => {}
    }
    address
}

/// Returns whether an error of `accept` concerns a single client and not the listener.
pub(super) fn is_of_one_connection(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        ErrorKind::ConnectionAborted
            | ErrorKind::ConnectionReset
            | ErrorKind::ConnectionRefused
            | ErrorKind::Interrupted
    )
}

/// Upper bound of the connections that wait in the kernel to be accepted.
pub(crate) const BACKLOG: i32 = 4096;

/// Upper bound of the sockets that are taken while a listener closes.
const LAST_MAX: usize = 2 * BACKLOG as usize;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_listener_on_all_addresses_is_reached_on_the_loopback() {
        let of = |text: &str| reachable(text.parse().unwrap()).to_string();
        assert_eq!(of("0.0.0.0:80"), "127.0.0.1:80");
        assert_eq!(of("[::]:80"), "[::1]:80");
        assert_eq!(of("192.0.2.1:80"), "192.0.2.1:80");
    }

    #[tokio::test]
    async fn an_error_of_opening_says_what_to_do() {
        let held = Listener::open(&Place::Tcp("127.0.0.1:0".parse().unwrap()), false).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("file");
        std::fs::write(&file, "").unwrap();
        for (place, kind, advice) in [
            (Place::Tcp(held.address().unwrap().unwrap()), ErrorKind::AddrInUse, "--connect"),
            (Place::Tcp("192.0.2.1:1".parse().unwrap()), ErrorKind::AddrNotAvailable, "0.0.0.0"),
            (Place::Unix(file, 0o660), ErrorKind::AlreadyExists, "remove that file"),
            (
                Place::Unix(folder.path().join("no/a"), 0o660),
                ErrorKind::NotFound,
                "make the folder",
            ),
        ] {
            let error = Listener::open(&place, false).unwrap_err();
            assert_eq!(error.kind(), kind);
            let text = error.to_string();
            assert!(text.contains(". Do: ") && text.contains(advice), "{text}");
        }
    }

    #[tokio::test]
    async fn a_port_is_shared_only_by_those_who_say_so() {
        let open = |address, shares| Listener::open(&Place::Tcp(address), shares);
        let first = open("127.0.0.1:0".parse().unwrap(), true).unwrap();
        let address = first.address().unwrap().unwrap();
        assert_eq!(open(address, false).unwrap_err().kind(), ErrorKind::AddrInUse);
        let second = open(address, true).unwrap();
        drop(first);
        let _client = TcpStream::connect(address).await.unwrap();
        assert!(second.accept().await.is_ok());
    }

    #[tokio::test]
    async fn sockets_that_wait_at_the_end_are_taken() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.sock");
        for place in [Place::Tcp("127.0.0.1:0".parse().unwrap()), Place::Unix(path.clone(), 0o600)]
        {
            let listener = Listener::open(&place, false).unwrap();
            let mut waiting: Vec<Socket> = Vec::new();
            for _ in 0..20 {
                waiting.push(match listener.address().unwrap() {
                    Some(address) => TcpStream::connect(address).await.unwrap().into(),
                    None => UnixStream::connect(&path).await.unwrap().into(),
                });
            }
            let mut taken = Vec::new();
            listener.close(|socket, _| taken.push(socket)).unwrap();
            assert_eq!(taken.len(), 20, "{place}");
        }
        assert!(!path.exists());
    }
}
