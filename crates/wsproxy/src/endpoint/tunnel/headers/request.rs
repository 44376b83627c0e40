//! Headers of a request on their way to the upstream: checked, filtered, and added to, in this order. Knows no
//! credential; the agent writes that of the upstream last.

use std::net::IpAddr;

use aws_lc_rs::digest;
use http::{HeaderMap, HeaderName, HeaderValue, Version, header, request::Parts};
use wsproxy_proto::{
    hex::Digits,
    names::Id,
    tunnel::headers::{HeaderBlock, HeaderError, Headers},
};

use crate::{
    config::ForwardedHeader,
    endpoint::tunnel::{
        headers::{
            Kind,
            connection::{BadOption, Options},
            is_disguised,
            marks::Marks,
            trailers,
        },
        refusal::{Code, Refusal},
    },
};

/// Rules for the requests to a cluster.
#[derive(Debug, Clone, Copy)]
pub struct Rules<'a> {
    /// Cluster.
    pub cluster: &'a Id,
    /// Name of the deployment and the cluster in `Via`: [`via_name`].
    pub via: &'a str,
    /// `Authorization` is not the credential of the gateway, and passes.
    pub passes_authorization: bool,
    /// `Cookie` passes.
    pub passes_cookies: bool,
}

/// Party that sent a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sender {
    /// Other end of the socket.
    pub peer: IpAddr,
    /// Client behind any number of trusted proxies.
    pub client: IpAddr,
    /// The other end of the socket is a trusted proxy.
    pub is_trusted: bool,
    /// Header that trusted proxies write.
    pub written: ForwardedHeader,
    /// The listener speaks TLS.
    pub is_tls: bool,
}

/// Returns the headers for the upstream. `upgrade` is that of the request, if it asks for one.
///
/// # Errors
/// `bad_header`, `loop`, `head_too_large`
pub fn block(
    request: &Parts,
    upgrade: Option<&HeaderValue>,
    rules: &Rules<'_>,
    sender: &Sender,
    marks: &Marks,
) -> Result<HeaderBlock, Refusal> {
    let headers = &request.headers;
    let options = check(request)?;
    if headers.get_all(header::VIA).iter().any(|value| names(value.as_bytes(), rules.via)) {
        return Err(Refusal::new(Code::Loop));
    }
    let mut block = HeaderBlock::of_head();
    let forwarded = Forwarded::of(headers, sender);
    for (name, value) in headers {
        let kind = Kind::of(name.as_str());
        let passes = match kind {
            Kind::HopByHop | Kind::Reserved => false,
            Kind::Authorization => rules.passes_authorization,
            Kind::Cookie => rules.passes_cookies,
            Kind::Forwarded => forwarded.passes(name.as_str()),
            Kind::Added => name == header::VIA,
            Kind::Relied => name != header::HOST,
            Kind::Other => true,
        };
        let has_rule = kind != Kind::Other;
        let is_dropped = (has_rule && is_disguised(name)) || options.contains(name.as_str());
        if passes && !is_dropped {
            push(&mut block, name.as_str(), value.as_bytes())?;
        }
    }
    let host = host(request);
    if let Some(host) = host {
        push(&mut block, "host", host)?;
    }
    if trailers::are_accepted(headers) {
        push(&mut block, "te", b"trailers")?;
        trailers::announced(headers).map_or(Ok(()), |names| push(&mut block, "trailer", &names))?;
    }
    upgrade.map_or(Ok(()), |upgrade| push(&mut block, "upgrade", upgrade.as_bytes()))?;
    forwarded.add(headers, host, sender, &mut block)?;
    add_own(&mut block, request.version, rules, marks)?;
    Ok(block)
}

/// Returns the name of a deployment and a cluster in `Via`. `prefix` is that of the deployment's channels.
#[must_use]
pub fn via_name(prefix: &str, cluster: &Id) -> String {
    let mut hash = digest::Context::new(&digest::SHA256);
    [prefix, "\n", cluster.as_str()].iter().for_each(|part| hash.update(part.as_bytes()));
    let hash = hash.finish();
    let number = hash.as_ref()[..8].iter().fold(0, |number, byte| number << 8 | u128::from(*byte));
    ["wsproxy-", Digits::<16>::of(number).as_str()].concat()
}

/// Checks that every server reads the request alike. Returns the options of its connection.
fn check(request: &Parts) -> Result<Options, Refusal> {
    let headers = &request.headers;
    let refused = |message| Refusal::because(Code::BadHeader, message);
    let is_control = |byte: &u8| matches!(byte, 0..b' ' | 0x7f);
    if headers.values().any(|value| value.as_bytes().iter().any(is_control)) {
        return Err(refused("A header has a control byte."));
    }
    let mut lengths = headers.get_all(header::CONTENT_LENGTH).iter();
    if let Some(length) = lengths.next() {
        let is_number =
            !length.is_empty() && length.as_bytes().iter().all(|byte| byte.is_ascii_digit());
        if !is_number || lengths.next().is_some() {
            return Err(refused("There must be one Content-Length, and it must be a number."));
        }
        if headers.contains_key(header::TRANSFER_ENCODING) {
            return Err(refused("There is a Content-Length and a Transfer-Encoding."));
        }
    }
    let mut codings = headers.get_all(header::TRANSFER_ENCODING).iter();
    let is_chunked = |value: &HeaderValue| value.as_bytes().eq_ignore_ascii_case(b"chunked");
    // The upstream would not learn of another coding, since the header ends here.
    if codings.next().is_some_and(|one| !is_chunked(one)) || codings.next().is_some() {
        return Err(refused("The only Transfer-Encoding that is allowed is chunked."));
    }
    let mut hosts = headers.get_all(header::HOST).iter();
    let is_missing = hosts.next().is_none() && request.version >= Version::HTTP_11;
    if is_missing || hosts.next().is_some() {
        return Err(refused("There must be one Host."));
    }
    Options::of_request(headers).map_err(|bad| match bad {
        BadOption::Malformed => refused("The Connection header is malformed."),
        BadOption::Protected => refused("Connection names a header that may not be removed."),
    })
}

/// Returns whether a `Via` names this deployment and cluster, in whatever place: no other party has a reason to.
fn names(via: &[u8], name: &str) -> bool {
    via.windows(name.len()).any(|part| part.eq_ignore_ascii_case(name.as_bytes()))
}

/// Returns the host that the client named. The host of an absolute target counts before the header (RFC 9112, 3.2.2).
fn host(request: &Parts) -> Option<&[u8]> {
    let of_target = request.uri.authority().map(|authority| authority.as_str().as_bytes());
    of_target.or_else(|| Some(request.headers.get(header::HOST)?.as_bytes()))
}

/// Treatment of the headers in which proxies name clients.
#[derive(Debug, Clone, Copy)]
struct Forwarded {
    is_trusted: bool,
    /// `X-Forwarded-For` is a trusted proxy's.
    keeps_chain: bool,
    /// `Forwarded` is a trusted proxy's.
    keeps_forwarded: bool,
}

impl Forwarded {
    fn of(headers: &HeaderMap, sender: &Sender) -> Self {
        let is_trusted = sender.is_trusted;
        let has_chain = headers.contains_key(&FORWARDED_FOR);
        let has_forwarded = headers.contains_key(header::FORWARDED);
        // With both, and no client that both name, a client has written one of them.
        let is_doubtful = sender.written == ForwardedHeader::Auto
            && has_chain
            && has_forwarded
            && sender.client == sender.peer;
        let is_sound = is_trusted && !is_doubtful;
        Self {
            is_trusted,
            keeps_chain: is_sound && has_chain && sender.written != ForwardedHeader::Forwarded,
            keeps_forwarded: is_sound && sender.written != ForwardedHeader::XForwardedFor,
        }
    }

    /// Returns whether a header passes as it is.
    fn passes(self, name: &str) -> bool {
        match name {
            "forwarded" => self.keeps_forwarded,
            X_FORWARDED_FOR | X_FORWARDED_PREFIX => false,
            _ => self.is_trusted,
        }
    }

    /// Adds the headers that name the client, the scheme, the host and the place of the upstream.
    fn add(
        self,
        headers: &HeaderMap,
        host: Option<&[u8]>,
        sender: &Sender,
        block: &mut HeaderBlock,
    ) -> Result<(), Refusal> {
        let mut chain = Vec::new();
        if self.keeps_chain {
            let values = headers.get_all(&FORWARDED_FOR).iter().map(HeaderValue::as_bytes);
            values.for_each(|value| extend(&mut chain, value));
        } else if self.is_trusted && sender.client != sender.peer {
            extend(&mut chain, sender.client.to_string().as_bytes());
        }
        extend(&mut chain, sender.peer.to_string().as_bytes());
        push(block, X_FORWARDED_FOR, &chain)?;
        let is_kept = |name: &str| self.is_trusted && headers.contains_key(name);
        if !is_kept("x-forwarded-proto") {
            let scheme: &[u8] = if sender.is_tls { b"https" } else { b"http" };
            push(block, "x-forwarded-proto", scheme)?;
        }
        if let Some(host) = host.filter(|_| !is_kept("x-forwarded-host")) {
            push(block, "x-forwarded-host", host)?;
        }
        Ok(())
    }
}

/// Adds the headers of the gateway itself.
fn add_own(
    block: &mut HeaderBlock,
    version: Version,
    rules: &Rules<'_>,
    marks: &Marks,
) -> Result<(), Refusal> {
    push(block, X_FORWARDED_PREFIX, prefix(rules.cluster).as_bytes())?;
    let version = if version == Version::HTTP_10 { "1.0" } else { "1.1" };
    push(block, "via", [version, " ", rules.via].concat().as_bytes())?;
    push(block, "traceparent", marks.trace.to_string().as_bytes())?;
    if let Some(state) = &marks.state {
        push(block, "tracestate", state.as_bytes())?;
    }
    push(block, "x-request-id", marks.request_id.as_bytes())
}

/// Returns the path below which a cluster's upstream is found.
#[must_use]
pub fn prefix(cluster: &Id) -> String {
    ["/clusters/", cluster.as_str(), "/proxy"].concat()
}

/// Returns the hosts by which the client may know the upstream, as the headers for the upstream name them: the one that it
/// asked, and those that trusted proxies tell.
#[must_use]
pub fn hosts(headers: Headers<'_>) -> Vec<&[u8]> {
    let mut hosts = Vec::new();
    for (name, value) in headers.iter() {
        match name {
            b"host" => hosts.push(value),
            b"x-forwarded-host" => {
                hosts.extend(value.split(|byte| *byte == b',').map(<[u8]>::trim_ascii));
            }
            b"forwarded" => {
                hosts.extend(value.split(|byte| b",;".contains(byte)).filter_map(host_of))
            }
            _ => {}
        }
    }
    hosts
}

/// Returns the host of a parameter of `Forwarded`, if it is one.
fn host_of(parameter: &[u8]) -> Option<&[u8]> {
    let (name, host) = parameter.trim_ascii().split_at_checked("host=".len())?;
    let host = host.strip_prefix(b"\"").and_then(|host| host.strip_suffix(b"\"")).unwrap_or(host);
    name.eq_ignore_ascii_case(b"host=").then_some(host)
}

fn extend(list: &mut Vec<u8>, element: &[u8]) {
    if !list.is_empty() && !element.is_empty() {
        list.extend_from_slice(b", ");
    }
    list.extend_from_slice(element);
}

fn push(block: &mut HeaderBlock, name: &str, value: &[u8]) -> Result<(), Refusal> {
    block.push(name.as_bytes(), value).map_err(|error| match error {
        HeaderError::TooLarge => Refusal::new(Code::HeadTooLarge),
        HeaderError::Invalid => Refusal::new(Code::BadHeader),
    })
}

/// The same as a name that is not read anew for each request.
const FORWARDED_FOR: HeaderName = HeaderName::from_static(X_FORWARDED_FOR);

const X_FORWARDED_FOR: &str = "x-forwarded-for";

const X_FORWARDED_PREFIX: &str = "x-forwarded-prefix";

#[cfg(test)]
mod tests;
