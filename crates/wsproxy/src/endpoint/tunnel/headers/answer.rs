//! Headers of an answer on their way to the client: filtered, led back through the gateway, and added to. Trusts neither
//! the upstream nor the agent to have done so.

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use wsproxy_proto::tunnel::headers::SharedHeaders;

use crate::endpoint::tunnel::{
    headers::{OWN, canonical, connection::Options, trailers, upgrade},
    refusal::{Code, Refusal, SOURCE},
};

/// Party that answers a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// The upstream.
    Upstream,
    /// The cluster agent.
    Agent,
    /// The gateway.
    Gateway,
    /// The gateway, with an earlier answer of the upstream.
    Cache,
}

impl Source {
    /// Returns the value of `X-Wsproxy-Source`.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::Upstream => "upstream",
            Self::Agent => "agent",
            Self::Gateway => "gateway",
            Self::Cache => "cache",
        }
    }
}

/// Request that is answered.
#[derive(Debug, Clone, Copy)]
pub struct Asked<'a> {
    /// Path below which the upstream is found: [`super::request::prefix`].
    pub prefix: &'a str,
    /// Hosts under which the client may know the upstream: [`super::request::hosts`].
    pub hosts: &'a [&'a [u8]],
    /// Protocols that the client wants to upgrade to.
    pub upgrade: Option<&'a HeaderValue>,
    /// The client takes trailers.
    pub accepts_trailers: bool,
}

/// Returns the headers for the client.
///
/// # Errors
/// `upstream_protocol`: the headers contradict each other, or grant an upgrade that the client did not ask for.
/// `head_too_large`: there are more than a head can hold.
pub fn map(
    status: StatusCode,
    headers: &SharedHeaders,
    source: Source,
    asked: &Asked<'_>,
) -> Result<HeaderMap, Refusal> {
    let named = headers.headers().iter().filter(|(name, _)| *name == b"connection");
    // Filtered by the upstream's word before anything is added, so that it can remove nothing of the gateway's.
    let options = Options::of_answer(named.map(|(_, value)| value));
    // Room for what the gateway adds.
    let count = headers.headers().iter().count() + ADDED_MAX;
    let mut map = HeaderMap::with_capacity(count.min(PREPARED_MAX));
    let mut announced = HeaderMap::new();
    for (name, value) in headers.iter() {
        let (name, value) = header(name, value)?;
        let is_framing = name == header::CONTENT_LENGTH;
        if name == header::TRAILER {
            announced.try_append(name, value).map_err(|_| too_large())?;
        } else if is_framing || (passes(&name, &value) && !options.contains(name.as_str())) {
            let value = led_back(&name, value, asked);
            map.try_append(name, value).map_err(|_| too_large())?;
        }
    }
    check_length(&mut map)?;
    if status == StatusCode::SWITCHING_PROTOCOLS {
        switch(&mut map, headers, asked)?;
    } else if asked.accepts_trailers
        && let Some(names) = trailers::announced(&announced)
        && let Ok(names) = HeaderValue::from_maybe_shared(Bytes::from(names))
    {
        map.insert(header::TRAILER, names);
    }
    map.insert(SOURCE, HeaderValue::from_static(source.label()));
    Ok(map)
}

/// Reads a header as the library does, which refuses what would begin another line.
fn header(name: &[u8], value: Bytes) -> Result<(HeaderName, HeaderValue), Refusal> {
    let name = HeaderName::from_bytes(name).map_err(malformed)?;
    let value = HeaderValue::from_maybe_shared(value).map_err(malformed)?;
    Ok((name, value))
}

/// Returns whether a header may reach the client.
fn passes(name: &HeaderName, value: &HeaderValue) -> bool {
    if name == header::SET_COOKIE && is_of_whole_host(value.as_bytes()) {
        return false;
    }
    let canonical = canonical(name.as_str());
    !canonical.starts_with(OWN)
        && !canonical.starts_with("proxy-")
        && !REMOVED.contains(&&*canonical)
}

/// Returns whether a cookie claims the path `/` of its host by its name. All clusters share the gateway's host: with that
/// path the cookie would reach other upstreams, and with another one browsers refuse it.
fn is_of_whole_host(cookie: &[u8]) -> bool {
    let start = cookie.trim_ascii_start().get(..WHOLE_HOST.len());
    start.is_some_and(|start| start.eq_ignore_ascii_case(WHOLE_HOST))
}

/// Keeps one length. It stays even where `Connection` names it: the client counts the body by it.
fn check_length(map: &mut HeaderMap) -> Result<(), Refusal> {
    let mut lengths = map.get_all(header::CONTENT_LENGTH).iter();
    let Some(one) = lengths.next().cloned() else { return Ok(()) };
    let is_number = !one.is_empty() && one.as_bytes().iter().all(u8::is_ascii_digit);
    if !is_number || lengths.any(|other| *other != one) {
        return Err(malformed("the lengths of the answer contradict each other"));
    }
    map.insert(header::CONTENT_LENGTH, one);
    Ok(())
}

/// Adds the headers of an upgrade that the client asked for.
fn switch(map: &mut HeaderMap, headers: &SharedHeaders, asked: &Asked<'_>) -> Result<(), Refusal> {
    let mut granted = headers.iter().filter(|(name, _)| *name == b"upgrade");
    let granted = granted.next().map(|(_, value)| value).filter(|_| granted.next().is_none());
    let granted = granted.zip(asked.upgrade);
    let granted = granted.filter(|(granted, asked)| upgrade::is_granted(granted, asked));
    let (granted, _) = granted.ok_or_else(|| malformed("the upgrade was not asked for"))?;
    let granted = HeaderValue::from_maybe_shared(granted).map_err(malformed)?;
    map.remove(header::CONTENT_LENGTH);
    map.insert(header::UPGRADE, granted);
    map.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
    Ok(())
}

/// Changes headers that lead the client somewhere, so that they lead through the gateway again.
fn led_back(name: &HeaderName, value: HeaderValue, asked: &Asked<'_>) -> HeaderValue {
    let changed = if name == header::LOCATION {
        location(value.as_bytes(), asked)
    } else if name == header::SET_COOKIE {
        Some(cookie(value.as_bytes(), asked.prefix))
    } else {
        None
    };
    // The parts of a valid value, and a prefix of plain characters, are a valid value.
    let changed = changed.and_then(|bytes| HeaderValue::from_maybe_shared(Bytes::from(bytes)).ok());
    changed.unwrap_or(value)
}

/// Returns a `Location` with the prefix, if it is an absolute path or names a host of the client's. The agent has
/// made a path of one that names the upstream's own address, which the gateway does not know.
fn location(value: &[u8], asked: &Asked<'_>) -> Option<Vec<u8>> {
    let has_slashes = |text: &[u8]| text.starts_with(b"//");
    let path = match value {
        [b'/', ..] if !has_slashes(value) => value,
        _ => {
            let scheme = [&b"http:"[..], b"https:", b""].into_iter().find(|scheme| {
                let start = value.get(..scheme.len());
                start.is_some_and(|start| start.eq_ignore_ascii_case(scheme))
                    && has_slashes(&value[scheme.len()..])
            })?;
            let rest = &value[scheme.len() + 2..];
            let end = rest.iter().position(|byte| b"/?#\\".contains(byte)).unwrap_or(rest.len());
            let (authority, path) = rest.split_at(end);
            let is_own = |host: &&[u8]| !host.is_empty() && authority.eq_ignore_ascii_case(host);
            asked.hosts.iter().any(is_own).then_some(path)?
        }
    };
    (!is_below(path, asked.prefix)).then(|| [asked.prefix.as_bytes(), path].concat())
}

/// Returns a cookie without its domain, and with the prefix before its path: it is the upstream's alone.
fn cookie(value: &[u8], prefix: &str) -> Vec<u8> {
    let mut parts = value.split(|byte| *byte == b';');
    let mut cookie = parts.next().unwrap_or_default().to_vec();
    for part in parts {
        let (name, path) = match part.iter().position(|byte| *byte == b'=') {
            Some(equals) => (&part[..equals], &part[equals + 1..]),
            None => (part, &b""[..]),
        };
        let name = name.trim_ascii();
        if name.eq_ignore_ascii_case(b"domain") {
            continue;
        }
        cookie.push(b';');
        let path = path.trim_ascii();
        // Any other text stands for the folder of the request, which is below the prefix already.
        let has_path = name.eq_ignore_ascii_case(b"path") && path.starts_with(b"/");
        if has_path && !is_below(path, prefix) {
            cookie.extend_from_slice(b" Path=");
            cookie.extend_from_slice(prefix.as_bytes());
            // `/prefix/` would leave out the prefix itself.
            cookie.extend_from_slice(if path == b"/" { b"" } else { path });
        } else {
            cookie.extend_from_slice(part);
        }
    }
    cookie
}

/// Returns whether a path has the prefix already: the upstream may know it from `X-Forwarded-Prefix`.
fn is_below(path: &[u8], prefix: &str) -> bool {
    let behind = path.strip_prefix(prefix.as_bytes());
    behind.is_some_and(|behind| matches!(behind.first(), None | Some(b'/' | b'?' | b'#')))
}

fn malformed(cause: impl ToString) -> Refusal {
    Refusal::new(Code::UpstreamProtocol).caused_by(cause)
}

fn too_large() -> Refusal {
    Refusal::new(Code::AnswerHeadTooLarge)
}

/// Upper bound of the headers that the gateway adds to most answers.
const ADDED_MAX: usize = 4;

/// Upper bound of the headers for which there is room from the beginning.
const PREPARED_MAX: usize = 64;

/// Start of the names of cookies for a whole host: RFC 6265bis, 4.1.3.2.
const WHOLE_HOST: &[u8] = b"__Host-";

/// Headers of one connection, and those that would speak for the gateway's whole host.
const REMOVED: [&str; 12] = [
    "connection",
    "keep-alive",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
    "http2-settings",
    "alt-svc",
    "clear-site-data",
    "public-key-pins",
    "service-worker-allowed",
    "strict-transport-security",
];

#[cfg(test)]
mod tests;
