//! The client's opening handshake as bytes; knows neither sockets nor targets.

use std::fmt::Write as _;

/// The server's answer so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    /// The head is not complete.
    Incomplete,
    /// `101`, with the number of bytes of the head; frames follow.
    Accepted(usize),
    /// Another status.
    Refused(u16),
    /// Not HTTP, or `101` without the right `Sec-WebSocket-Accept`.
    Malformed,
}

/// Returns the request for an upgrade.
#[must_use]
pub fn request(host: &str, path: &str, token: Option<&str>) -> Vec<u8> {
    let mut head = String::with_capacity(256);
    let _ = write!(
        head,
        "GET {path} HTTP/1.1\r\nHost: {host}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
         Sec-WebSocket-Key: {KEY}\r\nSec-WebSocket-Version: 13\r\n"
    );
    if let Some(token) = token {
        let _ = write!(head, "Authorization: Bearer {token}\r\n");
    }
    head.push_str("\r\n");
    head.into_bytes()
}

/// Judges the server's answer.
#[must_use]
pub fn answer(bytes: &[u8]) -> Answer {
    let Some(end) = bytes.windows(4).position(|window| window == b"\r\n\r\n") else {
        return if bytes.len() > HEAD_BYTES_MAX { Answer::Malformed } else { Answer::Incomplete };
    };
    let Ok(head) = std::str::from_utf8(&bytes[..end]) else { return Answer::Malformed };
    let mut lines = head.split("\r\n");
    let status = lines.next().and_then(|line| line.split(' ').nth(1)).and_then(|s| s.parse().ok());
    let proved = lines.any(|line| {
        line.split_once(':').is_some_and(|(name, value)| {
            name.eq_ignore_ascii_case("sec-websocket-accept") && value.trim() == ACCEPT
        })
    });
    match status {
        Some(101) if proved => Answer::Accepted(end + 4),
        None | Some(101) => Answer::Malformed,
        Some(status) => Answer::Refused(status),
    }
}

/// The key and the answer it must get are the example of the RFC: the server has to compute either way.
const KEY: &str = "dGhlIHNhbXBsZSBub25jZQ==";
/// The answer that [`KEY`] must get.
pub const ACCEPT: &str = "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=";

const HEAD_BYTES_MAX: usize = 16 * 1024;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_proved_upgrade_is_accepted() {
        let good =
            format!("HTTP/1.1 101 Switching Protocols\r\nsec-websocket-accept: {ACCEPT}\r\n\r\nxy");
        assert_eq!(answer(good.as_bytes()), Answer::Accepted(good.len() - 2));
        assert_eq!(answer(&good.as_bytes()[..40]), Answer::Incomplete);
        assert_eq!(answer(b"HTTP/1.1 101 X\r\n\r\n"), Answer::Malformed);
        assert_eq!(answer(b"HTTP/1.1 503 X\r\nRetry-After: 1\r\n\r\n"), Answer::Refused(503));
    }
}
