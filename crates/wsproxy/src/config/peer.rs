//! The other end of a listener's socket, and the ends whose word about clients is taken; knows no headers.

use std::{
    fmt,
    net::{AddrParseError, IpAddr, Ipv4Addr},
    str::FromStr,
};

use ipnet::IpNet;

use super::kind::{Raw, ValueKind, quoted};

/// The other end of a socket that a listener accepted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Peer {
    /// An address, IPv4 in its own form.
    Ip(IpAddr),
    /// A process on this machine, over the unix socket.
    Unix,
}

/// A proxy that names the clients it speaks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TrustedProxy {
    /// Every address of a network.
    Network(IpNet),
    /// Every process that may open the unix socket.
    Unix,
}

impl Peer {
    /// Makes the peer of an address.
    #[must_use]
    pub const fn of(address: IpAddr) -> Self {
        Self::Ip(address.to_canonical())
    }

    /// Returns the address that counts for limits and logs: the loopback for a process on this machine.
    #[must_use]
    pub const fn address(self) -> IpAddr {
        match self {
            Self::Ip(address) => address,
            Self::Unix => IpAddr::V4(Ipv4Addr::LOCALHOST),
        }
    }

    /// Returns whether `proxies` name the peer.
    #[must_use]
    pub fn is_trusted(self, proxies: &[TrustedProxy]) -> bool {
        proxies.iter().any(|proxy| match (proxy, self) {
            (TrustedProxy::Network(network), Self::Ip(address)) => network.contains(&address),
            (TrustedProxy::Unix, Self::Unix) => true,
            _ => false,
        })
    }
}

/// Returns whether an address is one of this machine or of a private network (RFC 1918, RFC 4193).
#[must_use]
pub fn is_private(address: IpAddr) -> bool {
    match address.to_canonical() {
        IpAddr::V4(address) => address.is_loopback() || address.is_private(),
        IpAddr::V6(address) => address.is_loopback() || address.is_unique_local(),
    }
}

impl FromStr for TrustedProxy {
    type Err = AddrParseError;

    /// Reads a network, an address, or `unix:`. A single address is a network of one.
    fn from_str(text: &str) -> Result<Self, AddrParseError> {
        if text == UNIX {
            return Ok(Self::Unix);
        }
        let network = text.parse().ok().map_or_else(|| text.parse().map(IpAddr::into), Ok);
        network.map(Self::Network)
    }
}

impl fmt::Display for TrustedProxy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Network(network) => network.fmt(f),
            Self::Unix => f.write_str(UNIX),
        }
    }
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ip(address) => address.fmt(f),
            Self::Unix => f.write_str(UNIX),
        }
    }
}

/// A trusted proxy.
pub(super) struct Proxy;

impl ValueKind<TrustedProxy> for Proxy {
    fn allowed(&self) -> String {
        "a network or an address, such as \"10.0.0.0/8\" or \"::1\", or \"unix:\"".into()
    }

    fn read(&self, raw: &Raw) -> Option<TrustedProxy> {
        raw.text()?.parse().ok()
    }

    fn write(&self, value: &TrustedProxy) -> String {
        quoted(&value.to_string())
    }
}

/// Name of the peers of a unix socket, as in nginx.
const UNIX: &str = "unix:";

#[cfg(test)]
mod tests {
    use super::*;

    fn proxy(text: &str) -> Option<TrustedProxy> {
        Proxy.read(&Raw::Text(text.into()))
    }

    #[test]
    fn proxies_are_networks_addresses_or_unix_sockets() {
        for (text, written) in [
            ("10.0.0.0/8", "10.0.0.0/8"),
            ("::1", "::1/128"),
            ("127.0.0.1", "127.0.0.1/32"),
            ("unix:", "unix:"),
        ] {
            assert_eq!(Proxy.write(&proxy(text).unwrap()), quoted(written));
        }
        for bad in ["", "unix", "unix:/run/a.sock", "10.0.0.0/33", "localhost", "*"] {
            assert_eq!(proxy(bad), None, "{bad}");
        }
    }

    #[test]
    fn unix_peers_are_trusted_only_by_name() {
        let [network, unix] = ["127.0.0.0/8", "unix:"].map(|text| proxy(text).unwrap());
        let local = Peer::of("::ffff:127.0.0.1".parse().unwrap());
        assert!(local.is_trusted(&[network]) && !local.is_trusted(&[unix]));
        assert!(Peer::Unix.is_trusted(&[unix]) && !Peer::Unix.is_trusted(&[network]));
        assert!(!local.is_trusted(&[]) && !Peer::Unix.is_trusted(&[]));
        assert_eq!((Peer::Unix.address(), Peer::Unix.to_string()), (local.address(), UNIX.into()));
    }
}
