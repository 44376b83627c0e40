//! One proxied request, in the order of its checks: credential, form, path, headers, limits, a lane, the exchange.

use std::{
    net::{IpAddr, Ipv4Addr},
    sync::Arc,
};

use http::{
    HeaderMap, HeaderValue, Method, Request, Response, StatusCode, Uri, header, request::Parts,
    uri::PathAndQuery,
};
use hyper::{
    body::{Body as _, Incoming},
    upgrade::OnUpgrade,
};
use tracing::{debug, info};
use wsproxy_conn::clock;
use wsproxy_proto::names::Id;

use crate::{
    config::{peer::Peer, tunnel::ClientAuth},
    core::{Core, caller::Caller},
    endpoint::tunnel::{
        Tunnel,
        access::Access,
        cache,
        clients::Credential,
        deadlines::Deadlines,
        exchange::{self, Ask, Client, retries::Retries, upload::Upload},
        headers::{
            answer::Source,
            marks::Marks,
            request::{self, Rules, Sender},
            trailers, upgrade,
        },
        pages, path, patterns,
        refusal::{self, Code, Refusal, Refused},
        spans,
    },
    http::{
        Body,
        handshake::{self, address::RemotePeer},
    },
    traces::RootSpan,
};

/// Returns whether a request is for the service behind a cluster's agent.
#[must_use]
pub fn is_proxied(core: &Core, uri: &Uri) -> bool {
    let target = uri.path_and_query();
    core.config.endpoints.tunnel
        && target.is_some_and(|target| path::split(target.as_str()).is_some())
}

/// Answers a proxied request.
pub async fn serve(
    tunnel: &Arc<Tunnel>,
    core: &Arc<Core>,
    caller: &Caller,
    mut request: Request<Incoming>,
) -> Response<Body> {
    let on_upgrade = hyper::upgrade::on(&mut request);
    let (parts, body) = request.into_parts();
    let target = parts.uri.path_and_query().map_or("", PathAndQuery::as_str).to_owned();
    let (cluster, behind) = path::split(&target).unwrap_or_default();
    let span = spans::of_client(&core.traces, &parts.headers, &parts.method, caller);
    let marks = Marks::new(&parts.headers, span.trace().context().copied());
    let has_body = !body.is_end_stream();
    let method = parts.method.clone();
    let is_upgrade = parts.headers.contains_key(header::UPGRADE);
    // The library for HTTP hides a length beside the chunks. A proxy in front that reads the length would send the next
    // request in another place.
    let is_chunked = parts.headers.contains_key(header::TRANSFER_ENCODING);
    let wants_status = refusal::wants_status(behind, &parts.headers);
    let asked = Asked { cluster, behind, marks: &marks, on_upgrade };
    let refusal = match answer(tunnel, core, (parts, body), asked, span).await {
        Ok(mut response) => {
            if is_chunked {
                close(&mut response);
            }
            return response;
        }
        Err(refusal) => refusal,
    };
    let (path, trace_id) = (path::without_query(behind), marks.trace_id());
    let (method, trace_id) = (&method, trace_id.as_str());
    log_refusal(core, &refusal, cluster, caller.address, trace_id);
    let refused = Refused { method, is_upgrade, cluster, path, trace_id, wants_status };
    let mut response = refusal.response(&refused);
    if has_body {
        // The body may not have been read, so that the client must not send its next request on this connection.
        close(&mut response);
    }
    response
}

/// Makes an answer the last one on its connection.
fn close(response: &mut Response<Body>) {
    response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
}

/// Parts of a request that were read before its checks.
struct Asked<'a> {
    /// Id of the cluster, as the path has it.
    cluster: &'a str,
    /// Path behind `/proxy`.
    behind: &'a str,
    marks: &'a Marks,
    on_upgrade: OnUpgrade,
}

/// A request whose credential opens its cluster.
struct Opened {
    cluster: Id,
    credential: Credential,
    access: Arc<Access>,
}

async fn answer(
    tunnel: &Arc<Tunnel>,
    core: &Arc<Core>,
    (parts, body): (Parts, Incoming),
    asked: Asked<'_>,
    span: RootSpan,
) -> Result<Response<Body>, Refusal> {
    let pattern = patterns::of(path::without_query(asked.behind), &tunnel.patterns);
    let (counters, method) = (&tunnel.counters, &parts.method);
    let access = Access::begin(counters, asked.cluster, &pattern, method, asked.marks, span);
    access.trace().enter("authenticate");
    let answered = match open(tunnel, core, &parts, asked.cluster).await {
        Ok((cluster, credential)) => {
            access.trace().enter("check");
            let opened = Opened { cluster, credential, access: Arc::clone(&access) };
            answer_opened(tunnel, core, (parts, body), asked, opened).await
        }
        Err(refusal) => Err(refusal),
    };
    if let Err(refusal) = &answered {
        access.refused(refusal.code);
    }
    answered
}

/// Checks the credential of a request, and where none is needed the page that sent it. Returns the cluster.
async fn open(
    tunnel: &Tunnel,
    core: &Core,
    parts: &Parts,
    cluster: &str,
) -> Result<(Id, Credential), Refusal> {
    let cluster = crate::http::path::parse_id("cluster_id", cluster).ok();
    let credential = tunnel.credentials.check_client(&parts.headers, cluster.as_ref()).await?;
    let Some(cluster) = cluster else { return Err(Refusal::new(Code::ClusterUnknown)) };
    if tunnel.config.client_auth == ClientAuth::None {
        pages::check(parts, &core.allowed_origins.rules(), core.config.server.bind)?;
    }
    Ok((cluster, credential))
}

async fn answer_opened(
    tunnel: &Arc<Tunnel>,
    core: &Arc<Core>,
    (parts, body): (Parts, Incoming),
    asked: Asked<'_>,
    opened: Opened,
) -> Result<Response<Body>, Refusal> {
    if core.is_closing() {
        return Err(Refusal::new(Code::Restarting));
    }
    if matches!(parts.method, Method::CONNECT | Method::TRACE) {
        return Err(Refusal::new(Code::MethodNotAllowed));
    }
    let upgrade = upgrade::asked(parts.version, &parts.headers)?;
    let target = path::target(asked.behind);
    let target = target.map_err(|bad| Refusal::because(Code::BadPath, bad.to_string()))?;
    let Opened { cluster, credential, access } = opened;
    let via = request::via_name(&core.config.redis.channel_prefix, &cluster);
    let rules = Rules {
        cluster: &cluster,
        via: &via,
        passes_authorization: tunnel.config.pass_authorization && !credential.in_authorization,
        passes_cookies: tunnel.config.pass_cookies,
    };
    let block =
        request::block(&parts, upgrade.as_ref(), &rules, &sender(core, &parts), asked.marks)?;
    let has_body = !body.is_end_stream();
    let upload = has_body.then(|| Upload::new(body, &parts.headers, tunnel.config.body_max));
    let upload = upload.transpose()?;
    let now = clock::now();
    let rated = tunnel.rates.take(credential.rated, &cluster, now);
    rated.map_err(|wait| Refusal::new(Code::RateLimited).after(wait))?;
    let pass = tunnel.breakers.admit(&cluster, now);
    let pass = pass.map_err(|wait| Refusal::new(Code::CircuitOpen).after(wait))?;
    let keep = tunnel.cache.key(&cache::Asked {
        cluster: &cluster,
        credential: credential.hash,
        method: &parts.method,
        target: &target,
        headers: block.headers(),
        is_more: has_body || upgrade.is_some(),
    });
    if let Some(response) = keep.as_ref().and_then(|(key, _)| cached(tunnel, key, &access)) {
        return Ok(response);
    }
    let is_long = is_long(&target, &parts.headers);
    let ask = Ask {
        is_long,
        expects: has_body && expects(&parts.headers),
        accepts_trailers: trailers::are_accepted(&parts.headers),
        deadlines: Deadlines::new(&tunnel.config, is_long || upgrade.is_some()),
        method: parts.method,
        target: target.into_owned(),
        block,
        upgrade,
        prefix: request::prefix(&cluster),
        is_of_peer: false,
        retries: Retries::default(),
        wait: tunnel.config.wait,
        cluster,
        access,
        keep,
    };
    let client = Client {
        answering: parts.extensions.get().cloned(),
        seat: parts.extensions.get().cloned(),
        version: parts.version,
        on_upgrade: asked.on_upgrade,
    };
    drop(parts.headers);
    exchange::run(tunnel, core, ask, upload, client, pass).await
}

/// Returns the answer that is kept for a key.
fn cached(tunnel: &Tunnel, key: &cache::Key, access: &Access) -> Option<Response<Body>> {
    let now = clock::now();
    let Some(found) = tunnel.cache.find(key, now) else {
        tunnel.counters.cache_misses.add(1);
        return None;
    };
    tunnel.counters.cache_hits.add(1);
    let mut response = Response::new(Body::from(found.body.clone()));
    let headers = response.headers_mut();
    headers.clone_from(&found.headers);
    headers.insert(header::AGE, found.age(now).into());
    headers.insert(refusal::SOURCE, HeaderValue::from_static(Source::Cache.label()));
    access.answered(StatusCode::OK, Source::Cache);
    access.sent(found.body.len());
    access.complete();
    Some(response)
}

fn sender(core: &Core, parts: &Parts) -> Sender {
    let server = &core.config.server;
    let peer = parts.extensions.get::<RemotePeer>().map(|peer| peer.0);
    let address = peer.map_or(UNKNOWN, Peer::address);
    let client = handshake::address_of(core, &parts.headers, &parts.extensions);
    Sender {
        peer: address,
        client: client.unwrap_or(address),
        is_trusted: peer.is_some_and(|peer| peer.is_trusted(&server.trusted_proxies)),
        written: server.forwarded_header,
        is_tls: core.config.tls.files().is_some(),
    }
}

/// Returns whether a request is one whose answer may last: a watch, a log that is followed, an event stream.
pub(super) fn is_long(target: &str, headers: &HeaderMap) -> bool {
    let (_, query) = target.split_once('?').unwrap_or_default();
    let lasts = |pair: &str| {
        let value = pair.strip_prefix("watch=").or_else(|| pair.strip_prefix("follow="));
        value.is_some_and(|value| TRUE.contains(&value))
    };
    let takes_events = |value: &HeaderValue| {
        let text = String::from_utf8_lossy(value.as_bytes()).to_ascii_lowercase();
        text.contains("text/event-stream")
    };
    query.split('&').any(lasts) || headers.get_all(header::ACCEPT).iter().any(takes_events)
}

fn expects(headers: &HeaderMap) -> bool {
    let expect = headers.get(header::EXPECT);
    expect.is_some_and(|value| value.as_bytes().eq_ignore_ascii_case(b"100-continue"))
}

fn log_refusal(
    core: &Core,
    refusal: &Refusal,
    cluster: &str,
    address: Option<IpAddr>,
    trace_id: &str,
) {
    let code = refusal.code.label();
    let address = address.map(tracing::field::display);
    let cluster = &cluster[..cluster.floor_char_boundary(LOGGED_BYTES_MAX)];
    let cause = refusal.cause.as_deref();
    // A code is logged once a second, and otherwise at debug.
    match core.lines.pass(code) {
        Some(left_out) => {
            info!(
                cluster,
                code,
                address,
                trace_id,
                error = cause,
                left_out,
                "Proxied request refused."
            );
        }
        None => debug!(cluster, code, address, trace_id, error = cause, "Proxied request refused."),
    }
}

/// Spellings of true in a query: those that Go's `ParseBool` reads.
const TRUE: [&str; 6] = ["1", "t", "T", "TRUE", "true", "True"];

/// Address of a client whose listener knows none.
const UNKNOWN: IpAddr = IpAddr::V4(Ipv4Addr::UNSPECIFIED);

/// Upper bound of a cluster's name in a log line.
const LOGGED_BYTES_MAX: usize = 128;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn watches_and_event_streams_are_long() {
        let accept = |value: &'static str| {
            HeaderMap::from_iter([(header::ACCEPT, HeaderValue::from_static(value))])
        };
        let none = HeaderMap::new();
        for target in ["/a?watch=true", "/a?x=1&watch=1", "/log?follow=true&tail=3"] {
            assert!(is_long(target, &none), "{target}");
        }
        for value in ["1", "t", "T", "true", "True", "TRUE"] {
            for name in ["watch", "follow"] {
                assert!(is_long(&format!("/a?x=1&{name}={value}&y=1"), &none), "{name}={value}");
            }
        }
        for target in
            ["/a", "/watch=true", "/a?watch=false", "/a?xwatch=true", "/a?watch", "/a?watch=0"]
        {
            assert!(!is_long(target, &none), "{target}");
        }
        assert!(is_long("/", &accept("Text/Event-Stream")) && !is_long("/", &accept("*/*")));
    }
}
