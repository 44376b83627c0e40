//! Requests that other instances bring: served by lanes of this instance, and never brought on.

use std::{convert::Infallible, sync::Arc, time::Duration};

use http::{HeaderMap, HeaderValue, Request, Response, header};
use hyper::body::{Body as _, Incoming};
use secrecy::{ExposeSecret as _, SecretString};
use tokio::time::{Instant, sleep};
use tracing::warn;
use wsproxy_conn::clock;
use wsproxy_proto::{names::Id, trace_context::TraceContext, tunnel::headers::HeaderBlock};

use super::{EXPECT, HEAD_MS, PATH, Peers, RETRIES, SECRET, WAIT_MS};
use crate::{
    auth,
    core::Core,
    endpoint::tunnel::{
        Tunnel,
        access::Access,
        deadlines::Deadlines,
        exchange::{self, Ask, Client, retries::Retries, upload::Upload},
        headers::{marks::Marks, request, trailers, upgrade},
        path, patterns, proxy,
        refusal::{self, Code, Refusal, Refused},
        spans,
    },
    http::{Body, listener::Service, rejection::Rejection},
    traces::TRACEPARENT,
};

/// Service of the listener for other instances.
#[derive(Clone)]
pub(super) struct PeerService(Arc<Parts>);

struct Parts {
    peers: Arc<Peers>,
    tunnel: Arc<Tunnel>,
    core: Arc<Core>,
    secret: SecretString,
}

impl PeerService {
    pub(super) fn new(
        peers: &Arc<Peers>,
        tunnel: &Arc<Tunnel>,
        core: &Arc<Core>,
        secret: &str,
    ) -> Self {
        let (peers, tunnel, core) = (Arc::clone(peers), Arc::clone(tunnel), Arc::clone(core));
        Self(Arc::new(Parts { peers, tunnel, core, secret: secret.into() }))
    }
}

impl Service for PeerService {
    fn core(&self) -> &Arc<Core> {
        &self.0.core
    }

    async fn serve(self, request: Request<Incoming>) -> Result<Response<Body>, Infallible> {
        let Parts { tunnel, peers, core, secret } = &*self.0;
        let has_body = !request.body().is_end_stream();
        let mut response = if is_instance(request.headers(), secret) {
            peers.counters.taken.add(1);
            answer(tunnel, core, request).await
        } else {
            peers.counters.refused.add(1);
            if let Some(left_out) = core.lines.pass("peer without the secret") {
                warn!(
                    left_out,
                    "A request to the listener for other instances has a wrong secret, or none."
                );
            }
            Rejection::missing_credentials("The secret of the instances is needed.").response()
        };
        if has_body && response.status().is_client_error() {
            // The body was not read, so that the next request must not come on this connection.
            let close = HeaderValue::from_static("close");
            response.headers_mut().insert(header::CONNECTION, close);
        }
        Ok(response)
    }
}

fn is_instance(headers: &HeaderMap, secret: &SecretString) -> bool {
    let mut values = headers.get_all(SECRET).iter();
    let shown = values.next().filter(|_| values.next().is_none());
    let shown = shown.and_then(|value| value.as_bytes().strip_prefix(b"Bearer "));
    shown.is_some_and(|shown| auth::equal(shown, secret.expose_secret().as_bytes()))
}

async fn answer(
    tunnel: &Arc<Tunnel>,
    core: &Arc<Core>,
    request: Request<Incoming>,
) -> Response<Body> {
    let target = request.uri().path_and_query().map(ToString::to_string).unwrap_or_default();
    let Some((cluster, target)) = split(&target) else {
        return Rejection::not_found("There is no such path.").response();
    };
    let method = request.method().clone();
    let is_upgrade = request.headers().contains_key(header::UPGRADE);
    let span = spans::of_peer(&core.traces, request.headers(), &method);
    let marks = Marks::new(request.headers(), span.trace().context().copied());
    let wants_status = refusal::wants_status(target, request.headers());
    let pattern = patterns::of(path::without_query(target), &tunnel.patterns);
    let access = Access::begin(&tunnel.counters, cluster.as_str(), &pattern, &method, &marks, span);
    wait_for_lane(tunnel, &cluster).await;
    let answered = match ask(tunnel, request, cluster.clone(), target, &access) {
        Ok((ask, upload, client)) => match tunnel.breakers.admit(&cluster, clock::now()) {
            Ok(pass) => exchange::run(tunnel, core, ask, upload, client, pass).await,
            Err(wait) => Err(Refusal::new(Code::CircuitOpen).after(wait)),
        },
        Err(refusal) => Err(refusal),
    };
    let refusal = match answered {
        Ok(response) => return response,
        Err(refusal) => refusal,
    };
    access.refused(refusal.code);
    let trace_id = marks.trace_id();
    let (cluster, path, trace_id) =
        (cluster.as_str(), path::without_query(target), trace_id.as_str());
    let method = &method;
    refusal.response(&Refused { method, is_upgrade, cluster, path, trace_id, wants_status })
}

/// Waits a moment for a lane that is about to be ready: the other instance knows it already.
async fn wait_for_lane(tunnel: &Tunnel, cluster: &Id) {
    let until = Instant::now() + READY_WITHIN;
    while tunnel.lanes.is_opening(cluster) && Instant::now() < until {
        sleep(LOOK_EVERY).await;
    }
}

/// Splits a path into the cluster and the target for the upstream.
fn split(path: &str) -> Option<(Id, &str)> {
    let behind = path.strip_prefix(PATH)?;
    let (cluster, _) = behind.split_once('/')?;
    Some((Id::parse(cluster).ok()?, &behind[cluster.len()..]))
}

/// Reads a request as the other instance wrote it: all checks are done there.
fn ask(
    tunnel: &Tunnel,
    mut request: Request<Incoming>,
    cluster: Id,
    target: &str,
    access: &Arc<Access>,
) -> Result<(Ask, Option<Upload>, Client), Refusal> {
    let on_upgrade = hyper::upgrade::on(&mut request);
    let (parts, body) = request.into_parts();
    let headers = &parts.headers;
    let upgrade = upgrade::asked(parts.version, headers)?;
    let is_long = proxy::is_long(target, headers);
    let head_ms = headers.get(HEAD_MS).and_then(|value| value.to_str().ok()?.parse().ok());
    let wait_ms = headers.get(WAIT_MS).and_then(|value| value.to_str().ok()?.parse().ok());
    let retries = headers.get(RETRIES).and_then(|value| Retries::parse(value.to_str().ok()?));
    let may_last = is_long || upgrade.is_some();
    let has_body = !body.is_end_stream();
    let upload = has_body.then(|| Upload::new(body, headers, 0)).transpose()?;
    let ask = Ask {
        is_long,
        expects: has_body && headers.contains_key(EXPECT),
        accepts_trailers: trailers::are_accepted(headers),
        deadlines: Deadlines::of_peer(&tunnel.config, may_last, head_ms),
        block: block(headers, access.trace().context())?,
        method: parts.method,
        target: target.to_owned(),
        upgrade,
        prefix: request::prefix(&cluster),
        is_of_peer: true,
        retries: retries.unwrap_or_default(),
        wait: wait_ms.map_or(tunnel.config.wait, |ms: u32| Duration::from_millis(ms.into())),
        access: Arc::clone(access),
        keep: None,
        cluster,
    };
    let client = Client {
        answering: parts.extensions.get().cloned(),
        seat: parts.extensions.get().cloned(),
        version: parts.version,
        on_upgrade,
    };
    Ok((ask, upload, client))
}

/// Returns the headers for the upstream: those of the request without the ones of the hop. `span` is the parent of the
/// upstream's span where traces are on.
fn block(headers: &HeaderMap, span: Option<&TraceContext>) -> Result<HeaderBlock, Refusal> {
    let mut block = HeaderBlock::new();
    let mut push = |name: &str, value: &[u8]| {
        let pushed = block.push(name.as_bytes(), value);
        pushed.map_err(|error| Refusal::new(Code::HeadTooLarge).caused_by(error))
    };
    let had_expect = headers.contains_key(EXPECT);
    for (name, value) in headers {
        let is_of_hop = OF_HOP.contains(&name.as_str())
            || (name == header::EXPECT && !had_expect)
            || (name == TRACEPARENT && span.is_some())
            || name.as_str().starts_with("x-wsproxy-");
        if !is_of_hop {
            push(name.as_str(), value.as_bytes())?;
        }
    }
    span.map_or(Ok(()), |span| push(TRACEPARENT, span.to_string().as_bytes()))?;
    Ok(block)
}

/// Time for a lane whose handshake was answered to be ready.
const READY_WITHIN: Duration = Duration::from_secs(1);

const LOOK_EVERY: Duration = Duration::from_millis(5);

/// Headers of the connection between instances.
const OF_HOP: [&str; 3] = ["connection", "keep-alive", "transfer-encoding"];
