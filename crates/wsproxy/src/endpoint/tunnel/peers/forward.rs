//! One request that another instance gets, and its answer. An instance that has no lane is skipped once.

use std::{sync::Arc, time::Duration};

use http::{HeaderMap, HeaderName, HeaderValue, Request, Response, StatusCode, Uri, header};
use hyper::body::{Body as _, Incoming};
use hyper_util::client::legacy::Error;
use tokio::{sync::watch, time::sleep};
use tracing::debug;
use wsproxy_conn::socket::watch::Leaving;

use super::{
    EXPECT, HEAD_MS, PATH, Peers, RETRIES,
    answer::PeerAnswer,
    body::{Held, HeldBody},
    client::PeerClient,
    switch,
};
use crate::{
    core::Core,
    endpoint::tunnel::{
        breaker::Outcome,
        exchange::{
            Ask, Client,
            retries::Retries,
            upload::{Upload, Uploaded},
        },
        headers::answer::Source,
        refusal::{Code, ERROR, Refusal, SOURCE},
    },
    http::Body,
    registry::tunnel::RemoteLane,
};

/// Outcome of a request for lanes at other instances.
pub(in crate::endpoint::tunnel) enum Forwarded {
    /// An instance answered, or failed behind the point where another one can be tried.
    Done(Result<Response<Body>, Refusal>),
    /// No instance has a lane that takes it. Nothing of the request was used up.
    Nowhere(Option<Upload>, Client, Arrivals),
}

/// Lanes of a cluster at other instances that come from now on.
#[derive(Default)]
pub(in crate::endpoint::tunnel) struct Arrivals(Option<watch::Receiver<Arc<[RemoteLane]>>>);

impl Arrivals {
    /// Waits for a change of the lanes that take requests; for ever where there are no other instances.
    pub(in crate::endpoint::tunnel) async fn next(&mut self) {
        let is_open = |lanes: &Arc<[RemoteLane]>| lanes.iter().any(super::is_open);
        let Some(lanes) = &mut self.0 else { return std::future::pending().await };
        while lanes.changed().await.is_ok() {
            if is_open(&lanes.borrow_and_update()) {
                return;
            }
        }
        std::future::pending().await
    }
}

/// Sends a request to an instance with a lane of its cluster, if there is one. That instance goes on with `retries`.
pub(in crate::endpoint::tunnel) async fn forward(
    peers: &Peers,
    core: &Arc<Core>,
    (ask, retries): (&Ask, Retries),
    mut upload: Option<Upload>,
    client: Client,
) -> Forwarded {
    let link = peers.client.lock().clone();
    let Some(link) = link else { return Forwarded::Nowhere(upload, client, Arrivals(None)) };
    let mut known = match peers.registry.elsewhere(&ask.cluster).await {
        Ok(known) => known,
        Err(error) => {
            debug!(%error, cluster = %ask.cluster, "The lanes of a cluster are not known.");
            return Forwarded::Nowhere(upload, client, Arrivals(None));
        }
    };
    let mut lanes = known.borrow_and_update().clone();
    let mut tried = Vec::new();
    while let Some(lane) = peers.choose(&lanes, &tried).cloned()
        && tried.len() < ATTEMPTS_MAX
    {
        let held = upload.take().map(|upload| Held::new(upload, &ask.access));
        let attempt = Attempt { link: &link, ask, retries, client: &client, held: held.as_ref() };
        let missed = match attempt.run(&lane).await {
            Ok(answer) => return Forwarded::Done(respond(core, ask, answer, client, held)),
            Err(Failed::Refused(refusal)) => return Forwarded::Done(Err(refusal)),
            Err(Failed::Missed(missed)) => missed,
        };
        peers.counters.missed.add(1);
        debug!(cluster = %ask.cluster, server_id = &*lane.record.server_id, reason = %missed, "Another instance has no lane.");
        if let Some(held) = held {
            match held.take_back() {
                whole @ Some(_) => upload = whole,
                // That instance has tried its lanes, and none dispatched the request.
                None => {
                    let refusal = Refusal::new(Code::ClusterReconnecting).undispatched();
                    return Forwarded::Done(Err(refusal));
                }
            }
        }
        if let Missed::Absent = missed {
            lanes = peers.registry.read_again(&ask.cluster, &lane).await.unwrap_or(lanes);
        }
        tried.push(lane);
    }
    // Readings have changed the table, and told nothing new.
    known.mark_unchanged();
    Forwarded::Nowhere(upload, client, Arrivals(Some(known)))
}

/// One attempt at one instance.
struct Attempt<'a> {
    link: &'a PeerClient,
    ask: &'a Ask,
    retries: Retries,
    client: &'a Client,
    held: Option<&'a Arc<Held>>,
}

enum Failed {
    /// The instance certainly did nothing.
    Missed(Missed),
    Refused(Refusal),
}

#[derive(Debug, thiserror::Error)]
enum Missed {
    #[error("it says so")]
    Absent,
    #[error("it cannot be reached: {0}")]
    Unreached(Error),
}

impl From<Refusal> for Failed {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(refusal)
    }
}

impl Attempt<'_> {
    async fn run(&self, lane: &RemoteLane) -> Result<Response<Incoming>, Failed> {
        let request = self.request(lane)?;
        let answer = self.link.send(request);
        // Of a client without a body the library for HTTP reads the end of the connection.
        let is_needed = self.held.is_some() || self.ask.upgrade.is_some();
        let answering = self.client.answering.as_ref().filter(|_| is_needed);
        let watch = answering.and_then(|answering| answering.socket().watch_peer());
        let left = async {
            match &watch {
                Some(watch) => watch.left(Leaving::Ends).await,
                None => std::future::pending().await,
            }
        };
        let is_late = async {
            self.ask.deadlines.head_is_late().await;
            sleep(LATER).await;
        };
        let answer = tokio::select! {
            biased;
            answer = answer => answer,
            () = left => return Err(Refusal::new(Code::Cancelled).into()),
            () = is_late => return Err(Refusal::new(Code::GatewayTimeout).into()),
        };
        match answer {
            Ok(answer) if is_absent(&answer) => Err(Failed::Missed(Missed::Absent)),
            Ok(answer) => Ok(answer),
            Err(error) if error.is_connect() => Err(Failed::Missed(Missed::Unreached(error))),
            Err(error) => Err(self.failed(&error).into()),
        }
    }

    /// Returns the refusal for a connection that broke before the head of an answer.
    fn failed(&self, error: &Error) -> Refusal {
        match self.held.and_then(|held| held.failed()) {
            Some(Uploaded::TooLarge) => Refusal::new(Code::BodyTooLarge),
            Some(_) => Refusal::new(Code::Cancelled),
            None => Refusal::new(Code::LaneLost).caused_by(format!("{error:?}")),
        }
    }

    fn request(&self, lane: &RemoteLane) -> Result<Request<HeldBody>, Refusal> {
        let ask = self.ask;
        let malformed =
            |error: &dyn ToString| Refusal::new(Code::BadHeader).caused_by(error.to_string());
        let peer = lane.record.peer.as_deref().unwrap_or_default();
        let uri = format!("{peer}{PATH}{}{}", ask.cluster, ask.target);
        let mut request = Request::new(HeldBody::of(self.held));
        *request.method_mut() = ask.method.clone();
        *request.uri_mut() = uri.parse::<Uri>().map_err(|error| malformed(&error))?;
        let headers = request.headers_mut();
        for (name, value) in ask.block.headers().iter() {
            let name = HeaderName::from_bytes(name).map_err(|error| malformed(&error))?;
            let value = HeaderValue::from_bytes(value).map_err(|error| malformed(&error))?;
            headers.try_append(name, value).map_err(|error| malformed(&error))?;
        }
        if ask.upgrade.is_some() {
            headers.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
        }
        if ask.expects {
            headers.insert(EXPECT, HeaderValue::from_static("1"));
        }
        headers.insert(HEAD_MS, HeaderValue::from(ask.deadlines.head_ms()));
        if self.retries != Retries::default() {
            let told = HeaderValue::try_from(self.retries.to_string());
            headers.insert(RETRIES, told.map_err(|error| malformed(&error))?);
        }
        if let Some(held) = self.held.cloned() {
            headers.insert(header::EXPECT, HeaderValue::from_static("100-continue"));
            if !headers.contains_key(header::CONTENT_LENGTH) {
                let chunked = HeaderValue::from_static("chunked");
                headers.insert(header::TRANSFER_ENCODING, chunked);
            }
            hyper::ext::on_informational(&mut request, move |answer| {
                if answer.status() == StatusCode::CONTINUE {
                    held.let_go();
                }
            });
        }
        Ok(request)
    }
}

/// Returns whether an instance has no lane. Nothing was read of the body of the request.
fn is_absent(answer: &Response<Incoming>) -> bool {
    let code = answer.headers().get(ERROR).map(HeaderValue::as_bytes);
    answer.status() == StatusCode::MISDIRECTED_REQUEST && code == Some(b"no_lane")
}

/// Makes the answer to the client.
fn respond(
    core: &Arc<Core>,
    ask: &Ask,
    answer: Response<Incoming>,
    client: Client,
    held: Option<Arc<Held>>,
) -> Result<Response<Body>, Refusal> {
    let status = answer.status();
    ask.access.answered(status, source_of(&answer));
    let is_switch = status == StatusCode::SWITCHING_PROTOCOLS;
    let mut headers = HeaderMap::with_capacity(answer.headers().len());
    for (name, value) in answer.headers() {
        let is_of_hop = HOP_BY_HOP.contains(name) && !(is_switch && name == header::CONNECTION);
        if !is_of_hop {
            headers.append(name, value.clone());
        }
    }
    let body = if is_switch {
        if ask.upgrade.is_none() {
            return Err(Refusal::new(Code::UpstreamProtocol));
        }
        let on_upgrade = hyper::upgrade::on(answer);
        core.tasks.spawn(switch::run(client, on_upgrade, Arc::clone(&ask.access)));
        Body::empty()
    } else if answer.body().is_end_stream() {
        if let Some(held) = held {
            drop(held.take_back());
        }
        ask.access.complete();
        Body::empty()
    } else {
        Body::new(PeerAnswer::new(answer.into_body(), ask, &client, held))
    };
    let mut response = Response::new(body);
    *response.status_mut() = status;
    *response.headers_mut() = headers;
    Ok(response)
}

/// Returns the party that answered at the other instance.
fn source_of(answer: &Response<Incoming>) -> Source {
    match answer.headers().get(SOURCE).map(HeaderValue::as_bytes) {
        Some(b"upstream") => Source::Upstream,
        Some(b"agent") => Source::Agent,
        _ => Source::Gateway,
    }
}

/// Returns what an answer of another instance tells of the upstream.
pub(in crate::endpoint::tunnel) fn outcome(answer: &Result<Response<Body>, Refusal>) -> Outcome {
    let Ok(answer) = answer else { return Outcome::Unclear };
    match answer.headers().get(ERROR).map(HeaderValue::as_bytes) {
        None => Outcome::Answered,
        Some(b"upstream_connect" | b"upstream_timeout") => Outcome::Failed,
        Some(_) => Outcome::Unclear,
    }
}

/// Time that an instance waits longer than the one that it asks.
pub(super) const LATER: Duration = Duration::from_secs(5);

/// Most instances that are asked for one request.
const ATTEMPTS_MAX: usize = 2;

/// Headers of the connection between instances.
const HOP_BY_HOP: [HeaderName; 3] =
    [header::CONNECTION, HeaderName::from_static("keep-alive"), header::TRANSFER_ENCODING];
