//! The header of the PROXY protocol, versions 1 and 2: the address of the client that a proxy speaks for. Knows neither
//! sockets nor which proxies are trusted.
//!
//! The specification is HAProxy's `proxy-protocol.txt`. Names of its sections stand beside the rules.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    str::FromStr,
};

/// The word of a proxy about the connection that it made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProxyHeader {
    /// The proxy speaks for a client with this address.
    Client(SocketAddr),
    /// The proxy speaks for itself (`LOCAL`), as for a check of health, or does not know the client (`UNKNOWN`): the
    /// address of the socket counts.
    Socket,
}

/// The first bytes of a connection, looked at as a header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Look {
    /// The bytes may become a header, to which all of them belong.
    Partial,
    /// A header, with its length in bytes.
    Whole(ProxyHeader, usize),
}

/// Reason why the first bytes of a connection are no header.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ProxyHeaderError {
    /// The bytes begin as no header does.
    #[error("the PROXY header is missing")]
    Missing,
    /// The bytes begin as a header, and break its rules.
    #[error("the PROXY header is malformed: {0}")]
    Malformed(&'static str),
    /// The header is longer than a gateway reads.
    #[error("the PROXY header is too long")]
    TooLong,
    /// The checksum differs from that of the bytes.
    #[error("the checksum of the PROXY header is wrong")]
    Checksum,
}

/// Looks at the first bytes of a connection. More bytes than the header has may be there.
///
/// # Errors
/// [`ProxyHeaderError`]: the bytes are no header, however they go on.
pub fn look(bytes: &[u8]) -> Result<Look, ProxyHeaderError> {
    if begins(bytes, SIGNATURE) {
        return version_2(bytes);
    }
    if begins(bytes, PREFIX) {
        return version_1(bytes);
    }
    Err(ProxyHeaderError::Missing)
}

/// Returns whether a connection that begins with `bytes` has a header, good or bad. `None`: too few bytes came to tell.
#[must_use]
pub fn is_header(bytes: &[u8]) -> Option<bool> {
    let [one, two] = [PREFIX, SIGNATURE].map(|start| begins(bytes, start).then_some(start.len()));
    let wanted = one.or(two);
    wanted.map_or(Some(false), |wanted| (bytes.len() >= wanted).then_some(true))
}

/// Returns whether `bytes` and `start` are the same as far as both go.
fn begins(bytes: &[u8], start: &[u8]) -> bool {
    bytes.iter().zip(start).all(|(one, other)| one == other)
}

/// Section 2.1: a line of text.
fn version_1(bytes: &[u8]) -> Result<Look, ProxyHeaderError> {
    let malformed = |why| Err(ProxyHeaderError::Malformed(why));
    let seen = &bytes[..bytes.len().min(LINE_BYTES_MAX)];
    let Some(end) = seen.iter().position(|byte| *byte == b'\n') else {
        return if seen.len() < LINE_BYTES_MAX {
            Ok(Look::Partial)
        } else {
            Err(ProxyHeaderError::TooLong)
        };
    };
    let Some(line) = seen[..end].strip_suffix(b"\r") else {
        return malformed("the line does not end with CR LF");
    };
    let Some(line) = line.strip_prefix(PREFIX).and_then(|line| str::from_utf8(line).ok()) else {
        return malformed("the line is no text");
    };
    // The rest of the line behind UNKNOWN is to be ignored.
    if line == "UNKNOWN" || line.starts_with("UNKNOWN ") {
        return Ok(Look::Whole(ProxyHeader::Socket, end + 1));
    }
    let mut words = line.split(' ');
    let [family, source, target, source_port, target_port] = [(); 5].map(|()| words.next());
    let addresses = match family {
        Some("TCP4") => [source, target].map(address::<Ipv4Addr>),
        Some("TCP6") => [source, target].map(address::<Ipv6Addr>),
        _ => return malformed("the family is neither TCP4 nor TCP6 nor UNKNOWN"),
    };
    let [Some(source), Some(_)] = addresses else {
        return malformed("an address is not of its family");
    };
    let ([Some(port), Some(_)], None) = ([source_port, target_port].map(port), words.next()) else {
        return malformed("the ports are no numbers");
    };
    let client = SocketAddr::new(source, port);
    Ok(Look::Whole(ProxyHeader::Client(client), end + 1))
}

fn address<A: FromStr + Into<IpAddr>>(text: Option<&str>) -> Option<IpAddr> {
    text?.parse::<A>().ok().map(Into::into)
}

/// A port without a sign and without zeros before it.
fn port(text: Option<&str>) -> Option<u16> {
    let text = text?;
    let is_plain = text == "0" || !text.starts_with(['0', '+']);
    text.parse().ok().filter(|_| is_plain)
}

/// Section 2.2: a binary header.
fn version_2(bytes: &[u8]) -> Result<Look, ProxyHeaderError> {
    let malformed = |why| Err(ProxyHeaderError::Malformed(why));
    let Some([command, family, high, low]) = bytes.get(SIGNATURE.len()..HEAD_BYTES) else {
        return Ok(Look::Partial);
    };
    let family = *family;
    let is_local = match (command >> 4, command & 0x0f, family) {
        (2, 0, _) => true,
        (2, 1, 0x00 | 0x11 | 0x21 | 0x31) => false,
        (2, 1, _) => return malformed("the family is none of a stream"),
        (2, ..) => return malformed("the command is neither LOCAL nor PROXY"),
        _ => return malformed("the version is not 2"),
    };
    let length = HEAD_BYTES + usize::from(u16::from_be_bytes([*high, *low]));
    if length > HEADER_BYTES_MAX {
        return Err(ProxyHeaderError::TooLong);
    }
    let Some(header) = bytes.get(..length) else { return Ok(Look::Partial) };
    let block = &header[HEAD_BYTES..];
    if is_local {
        // The block is to be discarded, whatever family it claims. Without addresses it holds the checksum at most.
        if family == 0 {
            check_fields(header, HEAD_BYTES)?;
        }
        return Ok(Look::Whole(ProxyHeader::Socket, length));
    }
    let client = match (family, block) {
        (0x11, [a, b, c, d, _, _, _, _, high, low, _, _, ..]) => {
            Some((IpAddr::from([*a, *b, *c, *d]), [*high, *low]))
        }
        (0x21, block) if block.len() >= BYTES_OF_TCP6 => {
            let source = <[u8; 16]>::try_from(&block[..16]).ok();
            source.map(|source| (IpAddr::from(source), [block[32], block[33]]))
        }
        // A client of the proxy over a unix socket has no address.
        (0x31, block) if block.len() >= BYTES_OF_UNIX => None,
        (0x00, _) => None,
        _ => return malformed("the addresses are cut short"),
    };
    let addresses = match family {
        0x11 => BYTES_OF_TCP4,
        0x21 => BYTES_OF_TCP6,
        0x31 => BYTES_OF_UNIX,
        _ => 0,
    };
    check_fields(header, HEAD_BYTES + addresses)?;
    let found = client.map_or(ProxyHeader::Socket, |(address, port)| {
        ProxyHeader::Client(SocketAddr::new(address, u16::from_be_bytes(port)))
    });
    Ok(Look::Whole(found, length))
}

/// Section 2.2.3: checks the checksum where one is among the fields behind the addresses. Other fields are skipped.
fn check_fields(header: &[u8], start: usize) -> Result<(), ProxyHeaderError> {
    let (mut at, mut checksum) = (start, None);
    while at < header.len() {
        let Some([kind, high, low]) = header.get(at..at + 3) else {
            return Err(ProxyHeaderError::Malformed("a field is cut short"));
        };
        let (value, length) = (at + 3, usize::from(u16::from_be_bytes([*high, *low])));
        let Some(bytes) = header.get(value..value + length) else {
            return Err(ProxyHeaderError::Malformed("a field is cut short"));
        };
        if *kind == CHECKSUM {
            let told = <[u8; 4]>::try_from(bytes).map(u32::from_be_bytes);
            let (Ok(told), None) = (told, checksum) else {
                return Err(ProxyHeaderError::Malformed("the checksum has a wrong form"));
            };
            checksum = Some((value, told));
        }
        at = value + length;
    }
    let Some((at, told)) = checksum else { return Ok(()) };
    // The sender computed it with zeros in its own place.
    let parts = [&header[..at], &[0; 4], &header[at + 4..]];
    if crc32c(&parts) == told { Ok(()) } else { Err(ProxyHeaderError::Checksum) }
}

/// CRC32c (RFC 3720, appendix B.4) of the parts one after the other. A header is short: no table is worth its size.
fn crc32c(parts: &[&[u8]]) -> u32 {
    let mut crc = u32::MAX;
    for byte in parts.iter().copied().flatten() {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = (crc >> 1) ^ (if crc & 1 == 1 { CASTAGNOLI } else { 0 });
        }
    }
    !crc
}

/// Upper bound of a header that a gateway reads, in bytes: enough for the addresses and for fields such as a name, an id
/// of the cloud's endpoint, or details of TLS.
pub const HEADER_BYTES_MAX: usize = 4096;

/// Beginning of version 1.
const PREFIX: &[u8] = b"PROXY ";

/// Beginning of version 2.
const SIGNATURE: &[u8] = b"\r\n\r\n\0\r\nQUIT\n";

/// Longest line of version 1, with its end.
const LINE_BYTES_MAX: usize = 107;

/// Bytes of version 2 before the addresses.
const HEAD_BYTES: usize = 16;

const BYTES_OF_TCP4: usize = 12;
const BYTES_OF_TCP6: usize = 36;
const BYTES_OF_UNIX: usize = 216;

/// Type of the field with the checksum.
const CHECKSUM: u8 = 3;

/// The reflected polynomial of CRC32c.
const CASTAGNOLI: u32 = 0x82f6_3b78;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn client(text: &str, length: usize) -> Result<Look, ProxyHeaderError> {
        Ok(Look::Whole(ProxyHeader::Client(text.parse().unwrap()), length))
    }

    fn binary(command: u8, family: u8, block: &[u8]) -> Vec<u8> {
        let length = u16::try_from(block.len()).unwrap().to_be_bytes();
        [SIGNATURE, &[command, family], &length, block].concat()
    }

    fn tcp4(fields: &[u8]) -> Vec<u8> {
        let addresses = [192, 0, 2, 1, 10, 0, 0, 1, 0x30, 0x39, 0, 80];
        binary(0x21, 0x11, &[&addresses[..], fields].concat())
    }

    /// Adds the field with the checksum to a header.
    fn with_checksum(mut header: Vec<u8>) -> Vec<u8> {
        header.extend([CHECKSUM, 0, 4, 0, 0, 0, 0]);
        let length = u16::try_from(header.len() - HEAD_BYTES).unwrap().to_be_bytes();
        header[14..16].copy_from_slice(&length);
        let at = header.len() - 4;
        let crc = crc32c(&[&header]).to_be_bytes();
        header[at..].copy_from_slice(&crc);
        header
    }

    #[test]
    fn the_checksum_is_that_of_the_standard() {
        assert_eq!(crc32c(&[b"123456789"]), 0xe306_9283);
        assert_eq!(crc32c(&[&[0; 16], &[0; 16]]), 0x8a91_36aa);
    }

    #[test]
    fn lines_of_version_1_are_read() {
        let tcp4 = b"PROXY TCP4 192.0.2.1 10.0.0.1 12345 80\r\nGET / HTTP/1.1";
        assert_eq!(look(tcp4), client("192.0.2.1:12345", 40));
        let tcp6 = b"PROXY TCP6 2001:db8::1 ::1 0 443\r\n";
        assert_eq!(look(tcp6), client("[2001:db8::1]:0", 34));
        for line in ["PROXY UNKNOWN\r\n", "PROXY UNKNOWN ffff::1 what ever 1\r\n"] {
            let whole = Ok(Look::Whole(ProxyHeader::Socket, line.len()));
            assert_eq!(look(line.as_bytes()), whole);
        }
    }

    #[test]
    fn wrong_lines_of_version_1_are_refused() {
        for bad in [
            "PROXY \r\n",
            "PROXY  TCP4 1.1.1.1 2.2.2.2 1 2\r\n",
            "PROXY TCP4 1.1.1.1 2.2.2.2 1\r\n",
            "PROXY TCP4 1.1.1.1 2.2.2.2 1 2 3\r\n",
            "PROXY TCP4 1.1.1.1 2.2.2.2 1 65536\r\n",
            "PROXY TCP4 1.1.1.1 2.2.2.2 01 2\r\n",
            "PROXY TCP4 1.1.1.1 2.2.2.2 +1 2\r\n",
            "PROXY TCP4 1.1.1.1 2.2.2 1 2\r\n",
            "PROXY TCP4 01.1.1.1 2.2.2.2 1 2\r\n",
            "PROXY TCP4 ::1 ::1 1 2\r\n",
            "PROXY TCP6 1.1.1.1 2.2.2.2 1 2\r\n",
            "PROXY UDP4 1.1.1.1 2.2.2.2 1 2\r\n",
            "PROXY UNKNOWNS\r\n",
            "PROXY TCP4 1.1.1.1 2.2.2.2 1 2\n",
        ] {
            let seen = look(bad.as_bytes());
            assert!(matches!(seen, Err(ProxyHeaderError::Malformed(_))), "{bad:?}: {seen:?}");
        }
        let long = format!("PROXY UNKNOWN {}\r\n", "x".repeat(92));
        assert_eq!(look(long.as_bytes()), Err(ProxyHeaderError::TooLong));
        assert!(look(&long.replace("xx\r", "x\r").into_bytes()).is_ok());
    }

    #[test]
    fn headers_of_version_2_are_read() {
        assert_eq!(look(&tcp4(b"")), client("192.0.2.1:12345", 28));
        let mut block = [0; 36];
        (block[0], block[1], block[15], block[33]) = (0x20, 0x01, 9, 7);
        assert_eq!(look(&binary(0x21, 0x21, &block)), client("[2001::9]:7", 52));
        let socket = |length| Ok(Look::Whole(ProxyHeader::Socket, length));
        assert_eq!(look(&binary(0x21, 0x31, &[1; 216])), socket(232));
        assert_eq!(look(&binary(0x21, 0x00, &[])), socket(16));
        // LOCAL: the block is discarded, even of a family that is unknown.
        assert_eq!(look(&binary(0x20, 0x00, &[])), socket(16));
        assert_eq!(look(&binary(0x20, 0x11, &[1, 2])), socket(18));
        assert_eq!(look(&binary(0x20, 0xff, &[9; 30])), socket(46));
        // Unknown fields are skipped.
        assert_eq!(look(&tcp4(&[0xea, 0, 2, 1, 1, 4, 0, 0])), client("192.0.2.1:12345", 36));
    }

    #[test]
    fn wrong_headers_of_version_2_are_refused() {
        for (bad, why) in [
            (binary(0x11, 0x11, &[0; 12]), "version"),
            (binary(0x22, 0x11, &[0; 12]), "command"),
            (binary(0x21, 0x12, &[0; 12]), "family"),
            (binary(0x21, 0x41, &[0; 12]), "family"),
            (binary(0x21, 0x11, &[0; 11]), "addresses"),
            (binary(0x21, 0x21, &[0; 35]), "addresses"),
            (binary(0x21, 0x31, &[0; 215]), "addresses"),
            (tcp4(&[4]), "field"),
            (tcp4(&[4, 0, 1]), "field"),
            (tcp4(&[4, 0xff, 0xff, 1]), "field"),
            (tcp4(&[3, 0, 3, 1, 1, 1]), "checksum"),
            (binary(0x20, 0x00, &[1]), "field"),
        ] {
            let Err(ProxyHeaderError::Malformed(text)) = look(&bad) else { panic!("{bad:?}") };
            assert!(text.contains(why), "{text}");
        }
        let long = binary(0x21, 0x00, &vec![0; HEADER_BYTES_MAX - 15]);
        assert_eq!(look(&long[..16]), Err(ProxyHeaderError::TooLong));
    }

    #[test]
    fn a_checksum_is_checked_where_present() {
        let good = with_checksum(tcp4(&[0xea, 0, 1, 7]));
        assert_eq!(look(&good), client("192.0.2.1:12345", good.len()));
        // The type of the checksum's field, the last of 7 bytes, makes another field of it.
        for at in (16..good.len()).filter(|at| *at != good.len() - 7) {
            let mut bad = good.clone();
            bad[at] ^= 0x10;
            assert!(look(&bad).is_err(), "byte {at}");
        }
        let local = with_checksum(binary(0x20, 0, &[]));
        assert_eq!(look(&local), Ok(Look::Whole(ProxyHeader::Socket, local.len())));
        let mut bad = local;
        *bad.last_mut().unwrap() ^= 1;
        assert_eq!(look(&bad), Err(ProxyHeaderError::Checksum));
    }

    #[test]
    fn other_beginnings_are_no_header() {
        for other in [&b"GET / HTTP/1.1"[..], b"\x16\x03\x01", b"PROXI", b"\r\n\r\nGET", b"P0"] {
            assert_eq!(look(other), Err(ProxyHeaderError::Missing));
            assert_eq!(is_header(other), Some(false));
        }
        for few in [&b""[..], b"P", b"PROXY", b"\r\n\r\n", b"\r"] {
            assert_eq!((look(few), is_header(few)), (Ok(Look::Partial), None));
        }
        for header in [&b"PROXY "[..], b"PROXY nonsense", SIGNATURE] {
            assert_eq!(is_header(header), Some(true));
        }
    }

    fn headers() -> impl Strategy<Value = Vec<u8>> {
        let word = prop_oneof![Just("TCP4"), Just("TCP6"), Just("UNKNOWN")];
        let address = prop_oneof![Just("192.0.2.1"), Just("::1"), Just("x")];
        let line = (word, address.clone(), address, any::<u16>(), any::<u16>());
        let line = line.prop_map(|(family, source, target, one, two)| {
            format!("PROXY {family} {source} {target} {one} {two}\r\n").into_bytes()
        });
        let block = proptest::collection::vec(any::<u8>(), 0..300);
        let family = prop_oneof![Just(0x11), Just(0x21), Just(0x31), Just(0), any::<u8>()];
        let command = prop_oneof![Just(0x21), Just(0x20), any::<u8>()];
        let two = (command, family, block)
            .prop_map(|(command, family, block)| binary(command, family, &block));
        prop_oneof![line, two, proptest::collection::vec(any::<u8>(), 0..200)]
    }

    proptest! {
        /// However a header is cut, its parts are partial, and what follows it changes nothing.
        #[test]
        fn a_header_is_the_same_however_it_comes(header in headers(), rest in any::<[u8; 8]>()) {
            let whole = look(&header);
            if let Ok(Look::Whole(_, length)) = whole {
                prop_assert!(length <= header.len());
                for end in 0..length {
                    prop_assert_eq!(look(&header[..end]), Ok(Look::Partial));
                }
                let more = [&header[..length], &rest].concat();
                prop_assert_eq!(look(&more), whole);
            }
            if let Err(error) = whole {
                prop_assert_eq!(look(&[&header[..], &rest].concat()), Err(error));
            }
        }

        /// Any address that a proxy tells is read as it was told.
        #[test]
        fn addresses_are_read_as_they_were_written(a in any::<[u8; 4]>(), port in any::<u16>()) {
            let source = SocketAddr::new(a.into(), port);
            let line = format!("PROXY TCP4 {} 10.0.0.1 {port} 80\r\n", source.ip());
            let expected = ProxyHeader::Client(source);
            prop_assert_eq!(look(line.as_bytes()), Ok(Look::Whole(expected, line.len())));
            let [high, low] = port.to_be_bytes();
            let block = [&a[..], &[10, 0, 0, 1, high, low, 0, 80]].concat();
            let header = with_checksum(binary(0x21, 0x11, &block));
            prop_assert_eq!(look(&header), Ok(Look::Whole(expected, header.len())));
        }
    }
}
