//! Names of headers that the tunnel removes, adds or relies on. Knows no values and no order.

use std::borrow::Cow;

use http::HeaderName;

pub mod answer;
mod connection;
pub mod marks;
pub mod request;
pub mod trailers;
pub mod upgrade;

/// Treatment of a header of a request, by its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// Of one connection only.
    HopByHop,
    /// Of the gateway and its agents, or an identity that a proxy vouches for. No client may write it.
    Reserved,
    /// Written by proxies in front of the gateway.
    Forwarded,
    /// `Authorization`
    Authorization,
    /// `Cookie`
    Cookie,
    /// Added by the gateway, which reads what came.
    Added,
    /// The gateway or the agent relies on it, and it passes.
    Relied,
    /// Of the client and the upstream.
    Other,
}

impl Kind {
    /// Returns the kind of a header. A name with `_` counts as the one with `-`: many servers read both as one.
    fn of(name: &str) -> Self {
        let name = canonical(name);
        let is_below = |prefixes: &[&str]| prefixes.iter().any(|prefix| name.starts_with(prefix));
        match &*name {
            name if HOP_BY_HOP.contains(&name) => Self::HopByHop,
            "authorization" => Self::Authorization,
            "cookie" => Self::Cookie,
            "forwarded" | "x-real-ip" => Self::Forwarded,
            "via" | "traceparent" | "tracestate" | "x-request-id" => Self::Added,
            "host" | "content-length" | "content-type" | "expect" => Self::Relied,
            _ if is_below(&["proxy-"]) => Self::HopByHop,
            _ if is_below(&["x-forwarded-"]) => Self::Forwarded,
            _ if is_below(&["impersonate-", "x-remote-", "x-wsproxy-"]) => Self::Reserved,
            _ => Self::Other,
        }
    }

    /// Returns whether no `Connection` header of a client may name the header.
    const fn is_protected(self) -> bool {
        !matches!(self, Self::HopByHop | Self::Other | Self::Cookie)
    }
}

/// Returns a name of a header in lower case and with `-` for `_`.
fn canonical(name: &str) -> Cow<'_, str> {
    if name.bytes().any(|byte| byte == b'_' || byte.is_ascii_uppercase()) {
        name.to_ascii_lowercase().replace('_', "-").into()
    } else {
        name.into()
    }
}

/// Returns whether a name is another spelling of a header that has a rule.
fn is_disguised(name: &HeaderName) -> bool {
    name.as_str().contains('_')
}

/// Prefix of the gateway's own headers.
const OWN: &str = "x-wsproxy-";

/// Headers of one connection (RFC 9110, 7.6.1), and those that RFC 9113 and older practice count among them.
const HOP_BY_HOP: [&str; 8] = [
    "connection",
    "keep-alive",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
    "http2-settings",
    "proxy-connection",
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_have_their_kind_in_any_spelling() {
        for (name, kind) in [
            ("connection", Kind::HopByHop),
            ("Transfer_Encoding", Kind::HopByHop),
            ("proxy-authorization", Kind::HopByHop),
            ("Proxy_Anything", Kind::HopByHop),
            ("http2-settings", Kind::HopByHop),
            ("x-wsproxy-peer", Kind::Reserved),
            ("X_Wsproxy_Foo", Kind::Reserved),
            ("x-wsproxy_foo", Kind::Reserved),
            ("Impersonate-User", Kind::Reserved),
            ("impersonate-extra-scopes%2f", Kind::Reserved),
            ("impersonate_group", Kind::Reserved),
            ("X-Remote-User", Kind::Reserved),
            ("x_remote_extra_a", Kind::Reserved),
            ("x-forwarded-user", Kind::Forwarded),
            ("x_forwarded_for", Kind::Forwarded),
            ("forwarded", Kind::Forwarded),
            ("X-Real_IP", Kind::Forwarded),
            ("authorization", Kind::Authorization),
            ("cookie", Kind::Cookie),
            ("via", Kind::Added),
            ("x_request_id", Kind::Added),
            ("content_length", Kind::Relied),
            ("host", Kind::Relied),
            ("x-wsproxyfoo", Kind::Other),
            ("impersonate", Kind::Other),
            ("proxy", Kind::Other),
            ("x-forwarded", Kind::Other),
            ("x-amz-date", Kind::Other),
            ("accept", Kind::Other),
        ] {
            assert_eq!(Kind::of(name), kind, "{name}");
        }
    }
}
