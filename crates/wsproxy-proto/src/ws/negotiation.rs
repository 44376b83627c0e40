//! Which compression both ends agree on, RFC 7692 section 7.1, as a server decides it.

use http::{HeaderMap, header};

use crate::ws::deflate::Params;

/// What we are willing to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Policy {
    /// Whether a client may keep its context between messages, which costs memory here.
    pub client_context_takeover: bool,
}

/// The first offer of the client that can be accepted, and the header that answers it.
///
/// The answer always says `server_no_context_takeover`, so that a compressed frame can be shared
/// by all clients.
#[must_use]
pub fn negotiate(headers: &HeaderMap, policy: Policy) -> Option<(Params, String)> {
    let lines = headers.get_all(header::SEC_WEBSOCKET_EXTENSIONS).into_iter();
    let offers = lines.filter_map(|line| line.to_str().ok()).flat_map(|line| line.split(','));
    offers.filter_map(|offer| Offer::parse(offer.trim())).find_map(|offer| offer.accept(policy))
}

#[derive(Debug, Default)]
struct Offer {
    server_no_context_takeover: bool,
    client_no_context_takeover: bool,
    server_max_window_bits: Option<u8>,
    /// `Some(None)`: without a value.
    client_max_window_bits: Option<Option<u8>>,
}

impl Offer {
    /// `None` where it is another extension, or has a parameter that is unknown, double or wrong:
    /// such an offer is declined (section 7).
    fn parse(text: &str) -> Option<Self> {
        let mut parts = text.split(';').map(str::trim);
        if parts.next()? != "permessage-deflate" {
            return None;
        }
        let mut offer = Self::default();
        for part in parts {
            let (name, value) = match part.split_once('=') {
                Some((name, value)) => (name.trim_end(), Some(unquote(value.trim_start()))),
                None => (part, None),
            };
            let is_new = match (name, value) {
                ("server_no_context_takeover", None) => {
                    !std::mem::replace(&mut offer.server_no_context_takeover, true)
                }
                ("client_no_context_takeover", None) => {
                    !std::mem::replace(&mut offer.client_no_context_takeover, true)
                }
                ("server_max_window_bits", Some(value)) => {
                    offer.server_max_window_bits.replace(window_bits(value)?).is_none()
                }
                ("client_max_window_bits", value) => {
                    let value = value.map(window_bits);
                    if value == Some(None) {
                        return None;
                    }
                    offer.client_max_window_bits.replace(value.flatten()).is_none()
                }
                _ => return None,
            };
            if !is_new {
                return None;
            }
        }
        Some(offer)
    }

    fn accept(self, policy: Policy) -> Option<(Params, String)> {
        let params = Params {
            server_no_context_takeover: true,
            client_no_context_takeover: self.client_no_context_takeover
                || !policy.client_context_takeover,
            server_max_window_bits: self.server_max_window_bits.unwrap_or(15),
            client_max_window_bits: self.client_max_window_bits.flatten().unwrap_or(15),
        };
        // zlib cannot compress with a window of 256 bytes.
        if params.server_max_window_bits < 9 {
            return None;
        }
        let mut answer = String::from("permessage-deflate; server_no_context_takeover");
        if params.client_no_context_takeover {
            answer.push_str("; client_no_context_takeover");
        }
        // Both only where the client named them; an answer of 15 to the latter would say nothing.
        if let Some(bits) = self.server_max_window_bits {
            answer.push_str(&format!("; server_max_window_bits={bits}"));
        }
        if let Some(bits) = self.client_max_window_bits.flatten() {
            answer.push_str(&format!("; client_max_window_bits={bits}"));
        }
        Some((params, answer))
    }
}

fn unquote(value: &str) -> &str {
    value.strip_prefix('"').and_then(|value| value.strip_suffix('"')).unwrap_or(value)
}

/// 8 to 15, without leading zeros (section 7.1.2).
fn window_bits(value: &str) -> Option<u8> {
    let bits: u8 = value.parse().ok()?;
    ((8..=15).contains(&bits) && bits.to_string() == value).then_some(bits)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(offer: &str) -> Option<String> {
        let mut headers = HeaderMap::new();
        headers.insert(header::SEC_WEBSOCKET_EXTENSIONS, offer.parse().unwrap());
        negotiate(&headers, Policy { client_context_takeover: false }).map(|(_, answer)| answer)
    }

    #[test]
    fn offers_are_answered_with_what_was_asked_and_no_more() {
        let base = "permessage-deflate; server_no_context_takeover; client_no_context_takeover";
        for (offer, extra) in [
            ("permessage-deflate", ""),
            ("permessage-deflate; client_max_window_bits", ""),
            ("permessage-deflate; client_max_window_bits=10", "; client_max_window_bits=10"),
            ("permessage-deflate; server_max_window_bits=\"9\"", "; server_max_window_bits=9"),
            ("permessage-deflate; server_max_window_bits=8, permessage-deflate", ""),
            ("x-webkit-deflate-frame, permessage-deflate;foo, permessage-deflate", ""),
        ] {
            assert_eq!(answer(offer), Some(format!("{base}{extra}")), "{offer}");
        }
    }

    #[test]
    fn offers_with_wrong_parameters_are_declined() {
        for offer in [
            "permessage-deflate; server_max_window_bits",
            "permessage-deflate; server_max_window_bits=16",
            "permessage-deflate; server_max_window_bits=08",
            "permessage-deflate; client_max_window_bits=7",
            "permessage-deflate; client_no_context_takeover; client_no_context_takeover",
            "permessage-deflate; server_no_context_takeover=1",
            "permessage-deflate; x",
            "permessage-deflater",
            "",
        ] {
            assert_eq!(answer(offer), None, "{offer}");
        }
    }
}
