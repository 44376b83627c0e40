//! One request that another instance gets, and its answer. An instance that has no lane is skipped once.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use http::{HeaderMap, HeaderName, HeaderValue, Request, Response, StatusCode, Uri, header};
use hyper::body::{Body as _, Incoming};
use hyper_util::client::legacy::Error;
use tokio::sync::watch;
use tracing::{debug, warn};
use wsproxy_conn::socket::watch::Leaving;
use wsproxy_proto::names::Id;

use super::{
    EXPECT, HEAD_MS, PATH, Peers, RETRIES, UNKEPT, WAIT_MS,
    body::{Held, HeldBody},
    client::PeerClient,
};
use crate::{
    core::Core,
    endpoint::tunnel::{
        Tunnel,
        breaker::Outcome,
        deadlines::Progress,
        exchange::{
            Ask, Client,
            download::{AnswerBody, Flow},
            retries::Retries,
            switch::{self, Way},
            upload::{Upload, Uploaded},
        },
        headers::answer::Source,
        refusal::{Code, ERROR, Refusal, SOURCE},
        waiting::Turn,
    },
    http::Body,
    registry::tunnel::RemoteLane,
};

/// A request that goes to another instance.
pub(in crate::endpoint::tunnel) struct Sent<'a> {
    /// The request.
    pub(in crate::endpoint::tunnel) ask: &'a Ask,
    /// Its retries.
    pub(in crate::endpoint::tunnel) retries: &'a mut Retries,
    /// Its turn among those that wait.
    pub(in crate::endpoint::tunnel) turn: &'a mut Turn,
    /// It waits for a place there. Otherwise it comes back, since this instance has a lane.
    pub(in crate::endpoint::tunnel) waits: bool,
}

/// Outcome of a request for lanes at other instances.
pub(in crate::endpoint::tunnel) enum Forwarded {
    /// An instance answered, or failed behind the point where another one can be tried. The outcome is what that tells of
    /// the upstream.
    Done(Result<Response<Body>, Refusal>, Outcome),
    /// The instance or its lane was lost before a head. The request is to be sent again, without a body as it was.
    Lost(Client),
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

/// Sends a request to an instance with a lane of its cluster, if there is one. That instance goes on with `retries`, but
/// a request that was lost on the way is sent again from here.
pub(in crate::endpoint::tunnel) async fn forward(
    peers: &Peers,
    (tunnel, core): (&Arc<Tunnel>, &Arc<Core>),
    Sent { ask, retries, turn, waits }: Sent<'_>,
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
    let (mut tried, mut is_full) = (Vec::new(), false);
    while let Some(lane) = peers.choose(&lanes, &tried).cloned()
        && tried.len() < ATTEMPTS_MAX
    {
        let held = upload.take().map(|upload| Held::new(upload, &ask.access));
        let began = Instant::now();
        let has_more = held.is_some() || ask.upgrade.is_some();
        let wait = if waits { turn.left() } else { Duration::ZERO };
        let (retried, held_here) = (*retries, held.as_ref());
        let attempt =
            Attempt { link: &link, ask, retries: retried, wait, client: &client, held: held_here };
        let missed = match attempt.run(&lane).await {
            Ok(answer) if is_lost(&answer) && retries.allow_lost(&ask.method, has_more) => {
                return Forwarded::Lost(client);
            }
            Ok(answer) => {
                let outcome = outcome(&answer, held.as_deref());
                return Forwarded::Done(
                    respond((tunnel, core), ask, answer, client, held),
                    outcome,
                );
            }
            Err(Failed::Lost(_)) if retries.allow_lost(&ask.method, has_more) => {
                return Forwarded::Lost(client);
            }
            Err(Failed::Refused(refusal) | Failed::Lost(refusal)) => {
                return Forwarded::Done(Err(refusal), Outcome::Unclear);
            }
            Err(Failed::Missed(missed)) => missed,
        };
        let waited = began.elapsed();
        ask.access.waited(waited);
        turn.waited(waited);
        peers.counters.missed.add(1);
        tell_missed(core, &ask.cluster, &lane, &missed);
        if let Some(held) = held {
            match held.take_back() {
                whole @ Some(_) => upload = whole,
                None => return Forwarded::Done(Err(missed.without_body()), Outcome::Unclear),
            }
        }
        is_full |= matches!(missed, Missed::Full);
        if let Missed::Absent = missed {
            lanes = peers.registry.read_again(&ask.cluster, &lane).await.unwrap_or(lanes);
        }
        tried.push(lane);
    }
    if waits && is_full {
        // It had no time left to wait for a place there.
        return Forwarded::Done(Err(Refusal::new(Code::Overloaded)), Outcome::Unclear);
    }
    // Readings have changed the table too. A lane that came during an attempt is news.
    let is_news =
        |lane: &RemoteLane| super::is_open(lane) && !lanes.contains(lane) && !tried.contains(lane);
    if known.borrow_and_update().iter().any(is_news) {
        known.mark_changed();
    }
    Forwarded::Nowhere(upload, client, Arrivals(Some(known)))
}

/// One attempt at one instance.
struct Attempt<'a> {
    link: &'a PeerClient,
    ask: &'a Ask,
    retries: Retries,
    /// Time for which the request may wait there.
    wait: Duration,
    client: &'a Client,
    held: Option<&'a Arc<Held>>,
}

enum Failed {
    /// The instance certainly did nothing.
    Missed(Missed),
    /// The connection broke before a byte of an answer.
    Lost(Refusal),
    Refused(Refusal),
}

#[derive(Debug, thiserror::Error)]
enum Missed {
    #[error("it says so")]
    Absent,
    #[error("its lanes are full")]
    Full,
    #[error("its address is public, and reached without TLS")]
    Public,
    #[error("its listener answers {0}")]
    Refused(StatusCode),
    #[error("it cannot be reached: {0}")]
    Unreached(Error),
}

impl Missed {
    /// Returns the refusal of a request whose body has begun to go there, so that no other instance can have it.
    fn without_body(&self) -> Refusal {
        match self {
            // That instance has tried its lanes, and none dispatched the request.
            Self::Absent | Self::Full => Refusal::new(Code::ClusterReconnecting).undispatched(),
            _ => Refusal::new(Code::LaneLost).caused_by(self),
        }
    }
}

/// Logs that an instance did nothing with a request.
fn tell_missed(core: &Core, cluster: &Id, lane: &RemoteLane, missed: &Missed) {
    let server_id = &*lane.record.server_id;
    if let Missed::Refused(status) = missed
        && let Some(left_out) = core.lines.pass("instance that refuses another")
    {
        warn!(
            %status,
            server_id,
            left_out,
            "Another instance refuses requests of this one: compare tunnel.peer_secret and tunnel.peer_url of both."
        );
    }
    debug!(%cluster, server_id, reason = %missed, "Another instance has no lane.");
}

impl From<Refusal> for Failed {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(refusal)
    }
}

impl Attempt<'_> {
    async fn run(&self, lane: &RemoteLane) -> Result<Response<Incoming>, Failed> {
        let request = self.request(lane)?;
        if !self.link.may_reach(request.uri()) {
            return Err(Failed::Missed(Missed::Public));
        }
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
        let answer = tokio::select! {
            biased;
            answer = answer => answer,
            () = left => return Err(Refusal::new(Code::Cancelled).into()),
            () = self.is_late() => return Err(Refusal::new(Code::GatewayTimeout).into()),
        };
        match answer {
            Ok(answer) => match missed(&answer)? {
                Some(missed) => Err(Failed::Missed(missed)),
                None => Ok(answer),
            },
            Err(error) if error.is_connect() => Err(Failed::Missed(Missed::Unreached(error))),
            Err(error) => Err(self.failed(&error)),
        }
    }

    /// Waits until the other instance should have told the reason why there is no head.
    async fn is_late(&self) {
        let mut wait = self.ask.deadlines.wait_for_head(LATER);
        let Some(held) = self.held else { return wait.over(&Progress::default(), false).await };
        loop {
            tokio::select! {
                () = wait.over(&held.progress, held.is_uploading()) => return,
                () = held.turned() => {}
            }
        }
    }

    /// Returns the failure of a connection that broke before the head of an answer.
    fn failed(&self, error: &Error) -> Failed {
        match self.held.and_then(|held| held.failed()) {
            Some(Uploaded::TooLarge) => Refusal::new(Code::BodyTooLarge).into(),
            Some(_) => Refusal::new(Code::Cancelled).into(),
            None => Failed::Lost(Refusal::new(Code::LaneLost).caused_by(format!("{error:?}"))),
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
        let wait_ms = u32::try_from(self.wait.as_millis()).unwrap_or(u32::MAX);
        headers.insert(WAIT_MS, HeaderValue::from(wait_ms));
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

/// Returns the reason why an instance did nothing with a request, and read nothing of its body; `None`: it answered.
///
/// # Errors
/// `head_too_large`; `lane_lost` where a process in between failed, which may have passed the request on.
fn missed(answer: &Response<Incoming>) -> Result<Option<Missed>, Failed> {
    let (status, headers) = (answer.status(), answer.headers());
    if !headers.contains_key(SOURCE) {
        // The listener itself, or a process that is no instance.
        return match status {
            StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE | StatusCode::URI_TOO_LONG => {
                Err(Refusal::new(Code::HeadTooLarge).into())
            }
            _ if status.is_client_error() => Ok(Some(Missed::Refused(status))),
            _ => {
                let cause = format!("the other instance's address answers {status}");
                Err(Failed::Lost(Refusal::new(Code::LaneLost).caused_by(cause)))
            }
        };
    }
    Ok(match code_of(answer) {
        Some(Code::NoLane) => Some(Missed::Absent),
        Some(Code::LanesFull) => Some(Missed::Full),
        _ => None,
    })
}

/// Makes the answer to the client.
fn respond(
    (tunnel, core): (&Arc<Tunnel>, &Arc<Core>),
    ask: &Ask,
    answer: Response<Incoming>,
    client: Client,
    held: Option<Arc<Held>>,
) -> Result<Response<Body>, Refusal> {
    let status = answer.status();
    match code_of(&answer) {
        Some(code) => ask.access.refused(code),
        None => ask.access.answered(status, source_of(&answer)),
    }
    let is_switch = status == StatusCode::SWITCHING_PROTOCOLS;
    let mut headers = HeaderMap::with_capacity(answer.headers().len());
    for (name, value) in answer.headers() {
        let is_of_hop = HOP_BY_HOP.contains(name) && !(is_switch && name == header::CONNECTION);
        if !is_of_hop {
            headers.append(name, value.clone());
        }
    }
    let may_be_kept = headers.remove(UNKEPT).is_none();
    let body = if is_switch {
        if ask.upgrade.is_none() {
            return Err(Refusal::new(Code::UpstreamProtocol));
        }
        let on_upgrade = hyper::upgrade::on(answer);
        core.tasks.spawn(switch::run(client, Way::Peer(on_upgrade), Arc::clone(&ask.access)));
        Body::empty()
    } else if answer.body().is_end_stream() {
        if let Some(held) = held {
            drop(held.take_back());
        }
        ask.access.complete();
        Body::empty()
    } else {
        // A client that still sends keeps an answer alive that stands still.
        let progress = held.as_ref().map(|held| held.progress.clone()).unwrap_or_default();
        let flow = Flow::Peer { body: answer.into_body(), held };
        // The other instance has the same limit, and says more.
        let (head, progress) = ((status, &headers, may_be_kept), (progress, LATER));
        Body::new(AnswerBody::new((tunnel, core), (ask, &client), head, flow, progress))
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

/// Returns the code of an instance's refusal.
fn code_of(answer: &Response<Incoming>) -> Option<Code> {
    let label = answer.headers().get(ERROR)?;
    Code::ALL.iter().copied().find(|code| label == code.label() && answer.status() == code.status())
}

/// Returns whether an instance lost the lane before a head.
fn is_lost(answer: &Response<Incoming>) -> bool {
    code_of(answer) == Some(Code::LaneLost)
}

/// Returns what an answer of another instance tells of the upstream.
fn outcome(answer: &Response<Incoming>, held: Option<&Held>) -> Outcome {
    match code_of(answer) {
        None => Outcome::Answered,
        Some(Code::UpstreamConnect) => Outcome::Failed,
        // A slow client may be the reason while its body is not whole.
        Some(Code::UpstreamTimeout) if !held.is_some_and(Held::is_uploading) => Outcome::Failed,
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
