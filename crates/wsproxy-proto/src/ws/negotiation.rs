//! Negotiation of permessage-deflate between client and server (RFC 7692, section 7.1).

use std::fmt::Write as _;

use http::HeaderMap;
use http::header::SEC_WEBSOCKET_EXTENSIONS;

use super::extension::{self, Extension};

/// Parameters that both ends agreed on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Params {
    /// The server starts each message with an empty window.
    pub server_no_context_takeover: bool,
    /// The client starts each message with an empty window.
    pub client_no_context_takeover: bool,
    /// Base-2 logarithm of the server's window.
    pub server_max_window_bits: u8,
    /// Base-2 logarithm of the client's window.
    pub client_max_window_bits: u8,
}

/// Parameters that we, as server, allow and ask for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Policy {
    /// Whether clients may keep their window between messages, which costs us an inflater of up to 48 KiB per
    /// connection. Otherwise we answer `client_no_context_takeover`.
    pub client_context_takeover: bool,
    /// Upper bound of the window that we compress with, 9 to 15.
    pub server_window_bits: u8,
    /// Upper bound of the clients' window, where they let us choose it, 9 to 15.
    pub client_window_bits: u8,
}

impl Default for Policy {
    fn default() -> Self {
        Self { client_context_takeover: false, server_window_bits: 15, client_window_bits: 15 }
    }
}

/// Takes the first acceptable offer. Returns it with the value of `Sec-WebSocket-Extensions` to answer.
///
/// We always answer `server_no_context_takeover`, so that all clients can share one compressed message.
#[must_use]
pub fn negotiate(headers: &HeaderMap, policy: &Policy) -> Option<(Params, String)> {
    headers
        .get_all(SEC_WEBSOCKET_EXTENSIONS)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| extension::parse(value).map_while(Result::ok))
        .filter(|offer| offer.name == NAME)
        .find_map(|offer| accept(&OfferedParams::read(&offer)?, policy))
}

/// Parameters of one offer or answer, each at most once and with a valid value.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(crate) struct OfferedParams {
    pub(crate) server_no_context_takeover: bool,
    pub(crate) client_no_context_takeover: bool,
    pub(crate) server_max_window_bits: Option<u8>,
    /// The value may be absent in an offer.
    pub(crate) client_max_window_bits: Option<Option<u8>>,
}

impl OfferedParams {
    /// Reads the parameters; `None` where one is unknown, repeated, or has a value that it cannot have.
    pub(crate) fn read(extension: &Extension<'_>) -> Option<Self> {
        let mut asked = Self::default();
        for &(name, value) in &extension.params {
            match name {
                "server_no_context_takeover" => once(&mut asked.server_no_context_takeover, value)?,
                "client_no_context_takeover" => once(&mut asked.client_no_context_takeover, value)?,
                "server_max_window_bits" if asked.server_max_window_bits.is_none() => {
                    asked.server_max_window_bits = Some(bits(value?)?);
                }
                "client_max_window_bits" if asked.client_max_window_bits.is_none() => {
                    asked.client_max_window_bits = Some(match value {
                        Some(value) => Some(bits(value)?),
                        None => None,
                    });
                }
                _ => return None,
            }
        }
        Some(asked)
    }
}

fn once(flag: &mut bool, value: Option<&str>) -> Option<()> {
    let first = !std::mem::replace(flag, true);
    (first && value.is_none()).then_some(())
}

/// Reads a number from 8 to 15, without leading zeros.
fn bits(value: &str) -> Option<u8> {
    match value.as_bytes() {
        [digit @ b'8'..=b'9'] => Some(digit - b'0'),
        [b'1', digit @ b'0'..=b'5'] => Some(10 + digit - b'0'),
        _ => None,
    }
}

fn accept(asked: &OfferedParams, policy: &Policy) -> Option<(Params, String)> {
    // zlib has no compressor for windows of 256 bytes.
    if asked.server_max_window_bits == Some(8) {
        return None;
    }
    let server_bits = asked.server_max_window_bits.unwrap_or(15).min(policy.server_window_bits);
    // A client that did not offer the parameter chooses its window itself.
    let client_bits = asked
        .client_max_window_bits
        .map_or(15, |offered| offered.unwrap_or(15).min(policy.client_window_bits));
    let params = Params {
        server_no_context_takeover: true,
        client_no_context_takeover: asked.client_no_context_takeover
            || !policy.client_context_takeover,
        server_max_window_bits: server_bits,
        client_max_window_bits: client_bits,
    };
    let mut answer = format!("{NAME}; server_no_context_takeover");
    if params.client_no_context_takeover {
        answer.push_str("; client_no_context_takeover");
    }
    if asked.server_max_window_bits.is_some() {
        let _ = write!(answer, "; server_max_window_bits={server_bits}");
    }
    // A client may use the largest window without our answer.
    if client_bits < 15 {
        let _ = write!(answer, "; client_max_window_bits={client_bits}");
    }
    Some((params, answer))
}

/// Returns the offer of a client. Windows of 15 bits are no demand. The offer always has `client_max_window_bits`,
/// since we understand it.
pub(crate) fn offer(params: &Params) -> String {
    let mut offer = String::from(NAME);
    if params.server_no_context_takeover {
        offer.push_str("; server_no_context_takeover");
    }
    if params.client_no_context_takeover {
        offer.push_str("; client_no_context_takeover");
    }
    if params.server_max_window_bits < 15 {
        let _ = write!(offer, "; server_max_window_bits={}", params.server_max_window_bits);
    }
    offer.push_str("; client_max_window_bits");
    if params.client_max_window_bits < 15 {
        let _ = write!(offer, "={}", params.client_max_window_bits);
    }
    offer
}

/// Returns the parameters that a client agreed on with the server's `answer` to its offer; `None` where the answer
/// does not fit the offer.
pub(crate) fn confirm(answer: &Extension<'_>, offer: &Params) -> Option<Params> {
    let answer = OfferedParams::read(answer)?;
    let server_bits = match answer.server_max_window_bits {
        Some(bits) => bits,
        None if offer.server_max_window_bits < 15 => return None,
        None => 15,
    };
    // In an answer the value is required; and zlib has no compressor for windows of 256 bytes.
    let client_bits = match answer.client_max_window_bits {
        Some(bits) => bits.filter(|bits| *bits > 8)?,
        None => offer.client_max_window_bits,
    };
    let too_large =
        server_bits > offer.server_max_window_bits || client_bits > offer.client_max_window_bits;
    if too_large || offer.server_no_context_takeover && !answer.server_no_context_takeover {
        return None;
    }
    Some(Params {
        server_no_context_takeover: answer.server_no_context_takeover,
        client_no_context_takeover: answer.client_no_context_takeover
            || offer.client_no_context_takeover,
        server_max_window_bits: server_bits,
        client_max_window_bits: client_bits,
    })
}

/// Name of the extension.
pub(crate) const NAME: &str = "permessage-deflate";

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    fn negotiated(policy: &Policy, values: &[&str]) -> Option<(Params, String)> {
        let mut headers = HeaderMap::new();
        for value in values {
            headers.append(SEC_WEBSOCKET_EXTENSIONS, HeaderValue::from_str(value).unwrap());
        }
        negotiate(&headers, policy)
    }

    fn answer(values: &[&str]) -> Option<String> {
        negotiated(&Policy::default(), values).map(|(_, answer)| answer)
    }

    const PLAIN: &str =
        "permessage-deflate; server_no_context_takeover; client_no_context_takeover";

    #[test]
    fn answers_only_offered_parameters_and_no_takeover() {
        for offer in [
            "permessage-deflate",
            "permessage-deflate; client_max_window_bits",
            "permessage-deflate; client_max_window_bits=15",
            "permessage-deflate; server_no_context_takeover",
            "permessage-deflate;client_no_context_takeover",
            "x-other; a=\"1\", permessage-deflate",
        ] {
            assert_eq!(answer(&[offer]).as_deref(), Some(PLAIN), "{offer}");
        }
        assert_eq!(
            answer(&["permessage-deflate; server_max_window_bits=10"]),
            Some(format!("{PLAIN}; server_max_window_bits=10"))
        );
        assert_eq!(
            answer(&["permessage-deflate; client_max_window_bits=\"9\""]),
            Some(format!("{PLAIN}; client_max_window_bits=9"))
        );
    }

    #[test]
    fn offers_that_cannot_be_met_are_passed_over() {
        for bad in [
            "permessage-deflate; unknown",
            "permessage-deflate; server_max_window_bits",
            "permessage-deflate; server_max_window_bits=8",
            "permessage-deflate; server_max_window_bits=7",
            "permessage-deflate; server_max_window_bits=16",
            "permessage-deflate; server_max_window_bits=010",
            "permessage-deflate; server_max_window_bits=+9",
            "permessage-deflate; server_max_window_bits=9; server_max_window_bits=9",
            "permessage-deflate; client_max_window_bits; client_max_window_bits",
            "permessage-deflate; client_max_window_bits=\"\"",
            "permessage-deflate; server_no_context_takeover=1",
            "permessage-deflate; client_no_context_takeover; client_no_context_takeover",
            "permessage-bzip2",
            "permessage-deflate; a=\"unclosed",
            "",
        ] {
            assert_eq!(answer(&[bad]), None, "{bad}");
            assert!(answer(&[bad, "permessage-deflate"]).is_some(), "{bad}");
        }
        let list = "permessage-deflate; server_max_window_bits=8, \
                    permessage-deflate; server_max_window_bits=9, permessage-deflate";
        assert_eq!(answer(&[list]), Some(format!("{PLAIN}; server_max_window_bits=9")));
    }

    #[test]
    fn policy_limits_windows_where_the_client_offers() {
        let policy = Policy {
            client_context_takeover: true,
            server_window_bits: 11,
            client_window_bits: 10,
        };
        let (params, answer) = negotiated(&policy, &["permessage-deflate"]).unwrap();
        assert_eq!((params.server_max_window_bits, params.client_max_window_bits), (11, 15));
        assert!(!params.client_no_context_takeover);
        assert_eq!(answer, "permessage-deflate; server_no_context_takeover");
        let offer = "permessage-deflate; client_max_window_bits; server_max_window_bits=13";
        let (params, answer) = negotiated(&policy, &[offer]).unwrap();
        assert_eq!((params.server_max_window_bits, params.client_max_window_bits), (11, 10));
        assert!(answer.ends_with("; server_max_window_bits=11; client_max_window_bits=10"));
    }

    fn confirmed(offer: &Params, answer: &str) -> Option<Params> {
        confirm(&extension::parse(answer).next()?.ok()?, offer)
    }

    #[test]
    fn an_answer_stays_within_the_offer() {
        let any = Params {
            server_no_context_takeover: false,
            client_no_context_takeover: false,
            server_max_window_bits: 15,
            client_max_window_bits: 15,
        };
        let small = Params { server_max_window_bits: 11, client_max_window_bits: 10, ..any };
        let none = Params { server_no_context_takeover: true, ..any };
        assert_eq!(confirmed(&any, NAME), Some(any));
        assert_eq!(confirmed(&none, NAME), None);
        assert_eq!(confirmed(&small, NAME), None);
        for (server, client) in [(11, 10), (9, 9), (8, 9)] {
            let answer =
                format!("{NAME}; server_max_window_bits={server}; client_max_window_bits={client}");
            let params = confirmed(&small, &answer).unwrap();
            assert_eq!(
                (params.server_max_window_bits, params.client_max_window_bits),
                (server, client)
            );
        }
        for (server, client) in [(12, 10), (11, 11), (11, 8)] {
            let answer =
                format!("{NAME}; server_max_window_bits={server}; client_max_window_bits={client}");
            assert_eq!(confirmed(&small, &answer), None, "{answer}");
        }
        let answer = format!("{NAME}; server_max_window_bits=11");
        assert_eq!(
            confirmed(&small, &answer).map(|params| params.client_max_window_bits),
            Some(10)
        );
    }

    #[test]
    fn our_own_offers_and_answers_fit_together() {
        for bits in 9..=15 {
            for flags in 0..4 {
                let wanted = Params {
                    server_no_context_takeover: flags & 1 == 1,
                    client_no_context_takeover: flags & 2 == 2,
                    server_max_window_bits: bits,
                    client_max_window_bits: 24 - bits,
                };
                let (params, answer) = negotiated(&Policy::default(), &[&offer(&wanted)]).unwrap();
                assert_eq!(confirmed(&wanted, &answer), Some(params));
            }
        }
    }
}
