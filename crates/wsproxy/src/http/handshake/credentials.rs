//! The credential of a request: header, subprotocol or query parameter. Does not check it.

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use http::{HeaderMap, header};
use secrecy::SecretString;
use wsproxy_proto::ws::handshake::subprotocols;

use crate::http::rejection::Rejection;

/// Finds the credential of a handshake.
///
/// `Authorization` wins over the subprotocol, which wins over the query parameters that `parameters` names.
/// Two credentials of one kind are refused, since it is not clear which one counts.
///
/// # Errors
/// 401: no credential, a malformed one, or two of a kind.
pub fn find(
    headers: &HeaderMap,
    query: Option<&str>,
    parameters: &[&str],
    protocols: Protocols,
) -> Result<SecretString, Rejection> {
    let found = find_any(headers, query, parameters, protocols)?;
    found.ok_or_else(|| Rejection::missing_credentials("A bearer token is needed."))
}

/// As [`find`], where a request may have no credential.
///
/// # Errors
/// 401: a malformed credential, or two of a kind.
pub fn find_any(
    headers: &HeaderMap,
    query: Option<&str>,
    parameters: &[&str],
    protocols: Protocols,
) -> Result<Option<SecretString>, Rejection> {
    let found = match from_authorization(headers)? {
        Some(found) => Some(found),
        None => match from_subprotocols(headers, protocols)? {
            Some(found) => Some(found),
            None => from_query(query.unwrap_or_default(), parameters)?,
        },
    };
    match found {
        Some(token) if token.is_empty() || token.len() > BYTES_MAX => Err(malformed()),
        found => Ok(found.map(Into::into)),
    }
}

/// The subprotocols that a family speaks, the preferred one first.
#[derive(Debug, Clone, Copy)]
pub struct Protocols(&'static [&'static str]);

impl Protocols {
    /// Those of families whose messages have ids.
    pub const COMMON: Self = Self(&[ENVELOPE_PROTOCOL, PROTOCOL]);
    /// Those of users' agents.
    pub const AGENTS: Self = Self(&[AGENT_PROTOCOL, PROTOCOL]);
    /// Those of families whose messages have no ids.
    pub const PLAIN: Self = Self(&[PROTOCOL]);

    /// Selects one of them; `None` if the client offered none.
    #[must_use]
    pub fn select(self, headers: &HeaderMap) -> Option<&'static str> {
        let offered = |protocol: &&str| subprotocols(headers).any(|offered| offered == *protocol);
        self.0.iter().copied().find(offered)
    }
}

/// Returns the token of an `Authorization: Bearer` header; `None` if there is none. Other schemes are ignored: behind a
/// proxy with a password, a browser sends `Basic` with every handshake.
///
/// # Errors
/// 401: several `Authorization` headers, or no token after `Bearer`.
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

fn from_subprotocols(
    headers: &HeaderMap,
    protocols: Protocols,
) -> Result<Option<String>, Rejection> {
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
    if found.is_some() && protocols.select(headers).is_none() {
        // A browser fails a connection whose answer selects none of the subprotocols that it offered.
        return Err(Rejection::malformed_credentials(
            "A token in a subprotocol needs wsproxy.v1 offered beside it.",
        ));
    }
    Ok(found)
}

/// Returns the value of the named parameters. Two of them may have the same value, but none may be there twice.
fn from_query(query: &str, parameters: &[&str]) -> Result<Option<String>, Rejection> {
    let mut found: Option<String> = None;
    let mut seen = Vec::new();
    for pair in query.split('&') {
        let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
        if !parameters.contains(&name) {
            continue;
        }
        let value = percent_encoding::percent_decode_str(value).decode_utf8();
        let value = value.map_err(|_| malformed())?.into_owned();
        if seen.contains(&name) || found.as_ref().is_some_and(|found| *found != value) {
            return Err(malformed());
        }
        seen.push(name);
        found = Some(value);
    }
    Ok(found)
}

fn malformed() -> Rejection {
    Rejection::malformed_credentials("The credential is malformed or given twice.")
}

/// Subprotocol that is selected for a credential in another subprotocol.
pub const PROTOCOL: &str = "wsproxy.v1";

/// Subprotocol in which every message to the client begins with a line for its event id. Preferred to [`PROTOCOL`].
pub const ENVELOPE_PROTOCOL: &str = "wsproxy.id.v1";

/// Subprotocol of users' agents that know more messages than the first version has. Preferred to [`PROTOCOL`].
pub const AGENT_PROTOCOL: &str = "wsproxy.agent.v2";

/// Upper bound of a credential in bytes: tokens that list a user's rights are long.
const BYTES_MAX: usize = 8192;

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
        find(&headers(list), Some(query), &["token", "auth_token"], Protocols::COMMON)
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
    fn a_parameter_may_have_two_names() {
        for query in ["token=A", "auth_token=A", "auth_token=A&token=A"] {
            assert_eq!(found(&[], query), Ok("A".into()), "{query}");
        }
    }

    #[test]
    fn a_request_may_have_no_credential() {
        let found = find_any(&headers(&[]), Some("x=1"), &["token"], Protocols::PLAIN);
        assert!(found.unwrap().is_none());
        let empty = find_any(&headers(&[]), Some("token="), &["token"], Protocols::PLAIN);
        assert_eq!(empty.unwrap_err().code, "malformed_credentials");
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
            (&[], "token=a&token=a"),
            (&[], "token=a&auth_token=b"),
            (&[], "token="),
            (&[], "token=%ff"),
        ] {
            assert_eq!(found(bad.0, bad.1), Err("malformed_credentials"), "{bad:?}");
        }
    }
}
