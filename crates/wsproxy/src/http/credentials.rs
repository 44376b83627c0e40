//! Where a credential is found in a request.

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use http::{HeaderMap, header};
use secrecy::SecretString;
use wsproxy_proto::ws::handshake::subprotocols;

use crate::http::rejection::Rejection;

/// The subprotocol that a server selects when a credential came as one.
pub const PROTOCOL: &str = "wsproxy.v1";

/// The subprotocol in which every message down begins with a line that holds its event id; it is selected
/// rather than [`PROTOCOL`].
pub const ENVELOPE_PROTOCOL: &str = "wsproxy.id.v1";

/// Longest credential, in bytes: tokens that list what a user may do are long.
const BYTES_MAX: usize = 8192;

/// The credential of a handshake: contract section 2.3.
///
/// `Authorization` wins over the subprotocol, which wins over the query parameter `parameter`.
/// One kind given twice is refused: which one would count?
///
/// # Errors
/// There is none, or what stands in its place is none.
pub fn find(
    headers: &HeaderMap,
    query: Option<&str>,
    parameter: &str,
) -> Result<SecretString, Rejection> {
    let found = match from_authorization(headers)? {
        Some(found) => Some(found),
        None => match from_subprotocols(headers)? {
            Some(found) => Some(found),
            None => from_query(query.unwrap_or_default(), parameter)?,
        },
    };
    match found {
        None => Err(Rejection::missing_credentials("A bearer token is needed.")),
        Some(token) if token.is_empty() || token.len() > BYTES_MAX => Err(malformed()),
        Some(token) => Ok(token.into()),
    }
}

/// Which of our subprotocols is selected, if the client offered one.
#[must_use]
pub fn select_protocol(headers: &HeaderMap) -> Option<&'static str> {
    let offered = |protocol: &&str| subprotocols(headers).any(|offered| offered == *protocol);
    [ENVELOPE_PROTOCOL, PROTOCOL].into_iter().find(offered)
}

/// The token of an `Authorization: Bearer` header; `None` where there is no such header. One of another scheme belongs to
/// somebody else: behind a proxy with a password, a browser sends `Basic` with every handshake.
///
/// # Errors
/// There are several, or there is nothing behind `Bearer`.
pub fn from_authorization(headers: &HeaderMap) -> Result<Option<String>, Rejection> {
    let mut values = headers.get_all(header::AUTHORIZATION).iter();
    let Some(value) = values.next() else { return Ok(None) };
    if values.next().is_some() {
        return Err(malformed());
    }
    let text = value.to_str().map_err(|_| malformed())?;
    let text = text.trim();
    let (scheme, token) = text.split_once(' ').unwrap_or((text, ""));
    if !scheme.eq_ignore_ascii_case("bearer") {
        return Ok(None);
    }
    if token.trim().is_empty() {
        return Err(malformed());
    }
    Ok(Some(token.trim().to_owned()))
}

fn from_subprotocols(headers: &HeaderMap) -> Result<Option<String>, Rejection> {
    let mut found = None;
    for offered in subprotocols(headers) {
        let token = if let Some(plain) = offered.strip_prefix("bearer.") {
            plain.to_owned()
        } else if let Some(encoded) = offered.strip_prefix("bearer64.") {
            let bytes = URL_SAFE_NO_PAD.decode(encoded).map_err(|_| malformed())?;
            String::from_utf8(bytes).map_err(|_| malformed())?
        } else {
            continue;
        };
        if found.replace(token).is_some() {
            return Err(malformed());
        }
    }
    if found.is_some() && select_protocol(headers).is_none() {
        // Without it the answer could select nothing, and a browser would fail the connection.
        return Err(Rejection::malformed_credentials(
            "A token in a subprotocol needs wsproxy.v1 offered beside it.",
        ));
    }
    Ok(found)
}

fn from_query(query: &str, parameter: &str) -> Result<Option<String>, Rejection> {
    let mut found = None;
    for pair in query.split('&') {
        let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
        if name != parameter {
            continue;
        }
        let value = percent_encoding::percent_decode_str(value).decode_utf8();
        let value = value.map_err(|_| malformed())?.into_owned();
        if found.replace(value).is_some() {
            return Err(malformed());
        }
    }
    Ok(found)
}

fn malformed() -> Rejection {
    Rejection::malformed_credentials("The credential is malformed or given twice.")
}

#[cfg(test)]
mod tests {
    use secrecy::ExposeSecret;

    use super::*;

    fn headers(list: &[(&'static str, &str)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in list {
            headers.append(*name, value.parse().unwrap());
        }
        headers
    }

    fn found(list: &[(&'static str, &str)], query: &str) -> Result<String, &'static str> {
        find(&headers(list), Some(query), "token")
            .map(|secret| secret.expose_secret().to_owned())
            .map_err(|rejection| rejection.code)
    }

    #[test]
    fn each_place_is_read_in_the_order_of_the_contract() {
        let header = ("authorization", "Bearer A");
        let protocol = ("sec-websocket-protocol", "wsproxy.v1, bearer.B");
        assert_eq!(found(&[header, protocol], "token=C"), Ok("A".into()));
        assert_eq!(found(&[protocol], "token=C"), Ok("B".into()));
        assert_eq!(found(&[], "x=1&token=C%2B"), Ok("C+".into()));
        let encoded = [("sec-websocket-protocol", "bearer64.YSBi, wsproxy.v1")];
        assert_eq!(found(&encoded, ""), Ok("a b".into()));
    }

    #[test]
    fn other_schemes_of_authorization_are_passed_over() {
        let basic = ("authorization", "Basic eDp5");
        assert_eq!(found(&[basic], "token=C"), Ok("C".into()));
        let both = [basic, ("sec-websocket-protocol", "wsproxy.v1, bearer.B")];
        assert_eq!(found(&both, "token=C"), Ok("B".into()));
        for other in ["Basic eDp5", "Basic", "Negotiate abc", "token"] {
            assert_eq!(found(&[("authorization", other)], ""), Err("missing_credentials"));
        }
        let twice = [basic, ("authorization", "Bearer A")];
        assert_eq!(found(&twice, ""), Err("malformed_credentials"));
    }

    #[test]
    fn none_malformed_and_double_credentials_are_refused() {
        assert_eq!(found(&[], ""), Err("missing_credentials"));
        for bad in [
            (&[("authorization", "Bearer")][..], ""),
            (&[("authorization", "Bearer a"), ("authorization", "Bearer b")], ""),
            (&[("sec-websocket-protocol", "wsproxy.v1, bearer.a, bearer.b")], ""),
            (&[("sec-websocket-protocol", "wsproxy.v1, bearer64.!")], ""),
            (&[("sec-websocket-protocol", "bearer.a")], ""),
            (&[], "token=a&token=b"),
            (&[], "token="),
            (&[], "token=%ff"),
        ] {
            assert_eq!(found(bad.0, bad.1), Err("malformed_credentials"), "{bad:?}");
        }
    }
}
