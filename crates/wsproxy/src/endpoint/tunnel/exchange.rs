//! One request on a lane and its answer: opened, perhaps again on another lane, until there is a head. Knows no rules for
//! headers and paths.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use http::{HeaderValue, Method, Response, StatusCode, Version, header};
use hyper::upgrade::OnUpgrade;
use tokio::time::sleep;
use tokio_util::task::AbortOnDropHandle;
use wsproxy_conn::{
    clock,
    lane::{OpenedStream, StreamReader, StreamWriter},
    socket::watch::{Leaving, PeerWatch},
};
use wsproxy_proto::{
    names::Id,
    tunnel::{
        code::Code as ResetCode,
        event::{Answer, End},
        frame::{Open, Reset, Source as FrameSource},
        headers::HeaderBlock,
        lane::OpenError,
    },
};

use crate::{
    core::{Core, admission::Seat},
    endpoint::tunnel::{
        Tunnel,
        access::Access,
        breaker::{Outcome, Pass},
        cache,
        deadlines::{Deadlines, Progress},
        exchange::{
            download::{AnswerBody, Flow},
            retries::{Retries, Retry},
            switch::Way,
            upload::{Upload, Uploaded},
        },
        headers::{
            answer::{self, Source},
            request,
        },
        lanes::{Lane, Place},
        peers::{
            self, Peers,
            forward::{self, Arrivals, Forwarded, Sent},
        },
        refusal::{Code, Refusal},
        search,
    },
    http::{Body, listener::Answering},
};

pub(super) mod download;
mod ends;
pub mod retries;
pub(super) mod switch;
pub mod upload;

/// A request that has passed its checks.
pub struct Ask {
    /// Cluster.
    pub cluster: Id,
    /// Method.
    pub method: Method,
    /// Path with its query.
    pub target: String,
    /// Headers for the upstream.
    pub block: HeaderBlock,
    /// Protocols of an upgrade.
    pub upgrade: Option<HeaderValue>,
    /// The answer may last.
    pub is_long: bool,
    /// The client waits for `100`.
    pub expects: bool,
    /// The client takes trailers.
    pub accepts_trailers: bool,
    /// Deadlines.
    pub deadlines: Deadlines,
    /// Path below which the upstream is found.
    pub prefix: String,
    /// Another instance brought the request, which goes to no further one.
    pub is_of_peer: bool,
    /// Retries of the instance that brought the request.
    pub retries: Retries,
    /// Time that the request may wait for a lane.
    pub wait: Duration,
    /// Line and numbers of the request.
    pub access: Arc<Access>,
    /// Key under which the answer is kept, and for how long.
    pub keep: Option<(cache::Key, Duration)>,
}

/// Connection of the client.
pub struct Client {
    /// The request at the listener, with its socket.
    pub answering: Option<Answering>,
    /// Seat of the socket, which an upgraded connection keeps.
    pub seat: Option<Arc<Seat>>,
    /// Version of HTTP.
    pub version: Version,
    /// Socket after an upgrade.
    pub on_upgrade: OnUpgrade,
}

/// Task that uploads the body of a request.
type Uploading = AbortOnDropHandle<(Upload, Uploaded)>;

/// A stream with its head.
struct Answered {
    head: Answer,
    answer: StreamReader,
    /// Body of the request, while it is not uploaded whole; of an upgrade, the way to the upstream.
    uploading: Option<Uploading>,
    request: Option<StreamWriter>,
    progress: Progress,
    place: Arc<Place>,
}

/// An attempt without a head.
struct Failed {
    refusal: Refusal,
    end: Option<End>,
    lane: Arc<Lane>,
    /// Body that may be uploaded again; `None`: there is none, or a part of it is gone.
    upload: Option<Upload>,
    /// The client still sent the body, or the upstream took no more of it.
    was_uploading: bool,
}

impl Failed {
    /// Returns what the failure tells of the upstream.
    fn outcome(&self) -> Outcome {
        let is_of_upstream = match self.refusal.code {
            Code::UpstreamConnect => true,
            // A slow client may be the reason while its body is not whole.
            Code::UpstreamTimeout => !self.was_uploading,
            _ => false,
        };
        match is_of_upstream || !self.lane.is_healthy() {
            true => Outcome::Failed,
            false => Outcome::Unclear,
        }
    }
}

/// Sends a request, and returns the answer once its head is there.
///
/// # Errors
/// [`Refusal`]
pub async fn run(
    tunnel: &Arc<Tunnel>,
    core: &Arc<Core>,
    ask: Ask,
    mut upload: Option<Upload>,
    mut client: Client,
    pass: Pass,
) -> Result<Response<Body>, Refusal> {
    prepare(&client, &ask);
    let (mut tried, mut retries) = (Vec::new(), ask.retries);
    let mut turn = tunnel.room.turn(ask.wait);
    loop {
        // Healthy lanes here come first, since they cost no second hop, and others of this instance last.
        let mut arrivals = Arrivals::default();
        if let Some((peers, waits)) = elsewhere(tunnel, core, &ask, &tried) {
            ask.access.trace().enter("forward");
            let sent = Sent { ask: &ask, retries: &mut retries, turn: &mut turn, waits };
            match forward::forward(peers, (tunnel, core), sent, upload, client).await {
                Forwarded::Done(answer, outcome) => {
                    tunnel.counters.name(&ask.cluster);
                    peers.counters.forwarded.add(u64::from(answer.is_ok()));
                    pass.report(outcome, clock::now(), rand::random());
                    return answer;
                }
                Forwarded::Lost(same) => {
                    tunnel.counters.retries_lost.add(1);
                    (upload, client) = (None, same);
                    continue;
                }
                Forwarded::Nowhere(whole, same, next) => {
                    (upload, client, arrivals) = (whole, same, next);
                }
            }
        }
        let watch = Watch::of(&client, upload.is_some() || ask.upgrade.is_some());
        let began = Instant::now();
        ask.access.trace().enter("find lane");
        let place = tokio::select! {
            place = search::find(tunnel, core, (&ask, &turn), &tried) => Some(place),
            () = arrivals.next() => None,
            () = watch.left() => return Err(Refusal::new(Code::Cancelled)),
        };
        let waited = began.elapsed();
        ask.access.waited(waited);
        turn.waited(waited);
        let Some(place) = place else { continue };
        let place = place?;
        let had_body = upload.is_some();
        let attempt = Attempt { tunnel, core, ask: &ask, retried: retries.are_marked() };
        ask.access.trace().enter("head");
        match attempt.run(place, upload.take(), watch).await {
            Ok(answered) => {
                pass.report(Outcome::Answered, clock::now(), rand::random());
                return respond((tunnel, core), ask, answered, client);
            }
            Err(failed) => {
                let is_whole = !had_body || failed.upload.is_some();
                let end = failed.end.as_ref().filter(|_| is_whole);
                if let Some(End::Reset(reset)) = &failed.end {
                    tunnel.counters.reset(reset.code);
                }
                // The instance that brought the request repeats one whose lane is lost. It cannot know of other repetitions
                // where the connection between the two breaks.
                let end = end.filter(|end| !ask.is_of_peer || end.is_not_dispatched());
                let has_more = had_body || ask.upgrade.is_some();
                let retry = end.and_then(|end| retries.allow(end, &ask.method, has_more));
                match retry {
                    Some(Retry::Undispatched) => tunnel.counters.retries_undispatched.add(1),
                    Some(Retry::LaneLost) => tunnel.counters.retries_lost.add(1),
                    None => {
                        pass.report(failed.outcome(), clock::now(), rand::random());
                        return Err(failed.refusal);
                    }
                }
                upload = failed.upload;
                tried.push(failed.lane);
            }
        }
    }
}

/// Bounds the bytes and the time that a client's socket may take.
fn prepare(client: &Client, ask: &Ask) {
    if let Some(answering) = &client.answering {
        // A client that reads nothing may do so for as long as a body may stand still.
        let still_max = ask.deadlines.idle.unwrap_or(STILL_MAX);
        answering.socket().prepare_stream(still_max);
    }
}

/// Returns the way to other instances, where one of them may have a better lane than this one, and whether the request is
/// to wait there for a place.
fn elsewhere<'t>(
    tunnel: &'t Tunnel,
    core: &Core,
    ask: &Ask,
    tried: &[Arc<Lane>],
) -> Option<(&'t Peers, bool)> {
    let peers = tunnel.peers.as_deref().filter(|_| !ask.is_of_peer)?;
    let may_last = ask.is_long || ask.upgrade.is_some();
    match tunnel.lanes.serves_well(&ask.cluster, may_last, tried) {
        Some(true) => None,
        // While Redis is away, a full or unhealthy lane is better than a long wait for the names of others.
        Some(false) => {
            let is_known = peers.registry.known_elsewhere(&ask.cluster).is_some();
            (is_known || core.bus.status().connected).then_some((peers, false))
        }
        None => Some((peers, true)),
    }
}

/// Watch of a client whose connection is not read now.
struct Watch(Option<PeerWatch>);

impl Watch {
    /// Watches a client whose request has a body, or may have bytes behind it. Of others, the library for HTTP reads the
    /// end of the connection.
    fn of(client: &Client, is_needed: bool) -> Self {
        let answering = client.answering.as_ref().filter(|_| is_needed);
        Self(answering.and_then(|answering| answering.socket().watch_peer()))
    }

    async fn left(&self) {
        match &self.0 {
            Some(watch) => watch.left(Leaving::Ends).await,
            None => std::future::pending().await,
        }
    }
}

/// One attempt on one lane.
struct Attempt<'a> {
    tunnel: &'a Arc<Tunnel>,
    core: &'a Arc<Core>,
    ask: &'a Ask,
    /// An earlier attempt may have reached the upstream.
    retried: bool,
}

impl Attempt<'_> {
    async fn run(
        &self,
        place: Place,
        upload: Option<Upload>,
        watch: Watch,
    ) -> Result<Answered, Failed> {
        let lane = Arc::clone(&place.lane);
        let failed = |refusal, end, upload| {
            let lane = Arc::clone(&lane);
            Failed { refusal, end, lane, upload, was_uploading: false }
        };
        let OpenedStream { request, mut answer } = match self.open(&place, upload.is_some()) {
            Ok(stream) => stream,
            Err((refusal, end)) => return Err(failed(refusal, end, upload)),
        };
        let mut sides = Sides {
            core: self.core,
            upload,
            request: Some(request),
            uploading: None,
            uploaded: None,
            watch: Some(watch),
            progress: Progress::default(),
            access: Arc::clone(&self.ask.access),
            place: Arc::new(place),
        };
        match self.head(&mut answer, &mut sides).await {
            Ok(head) => Ok(Answered {
                head,
                answer,
                uploading: sides.uploading,
                request: sides.request,
                progress: sides.progress,
                place: sides.place,
            }),
            Err(Fault::Ended(end)) => {
                let refusal = ends::refusal(&end, self.core.is_closing());
                let was_uploading = sides.is_uploading();
                let upload = sides.take_back().await;
                Err(Failed { was_uploading, ..failed(refusal, Some(end), upload) })
            }
            // Dropping the reader resets the stream, as does that of a body that is not whole.
            Err(Fault::Refused(refusal)) => Err(failed(refusal, None, None)),
        }
    }

    /// Opens the stream. Where the process is full, a reader that stood still for long has to leave.
    fn open(&self, place: &Place, has_body: bool) -> Result<OpenedStream, (Refusal, Option<End>)> {
        let ask = self.ask;
        let open = Open {
            end: !has_body && ask.upgrade.is_none(),
            upgrade: ask.upgrade.is_some(),
            long: ask.is_long,
            expect: ask.expects,
            retried: self.retried,
            head_ms: ask.deadlines.head_ms(),
            method: ask.method.as_str().as_bytes(),
            path: ask.target.as_bytes(),
            headers: ask.block.headers(),
        };
        let gone = || Some(End::LaneLost { not_dispatched: true });
        let Some(handle) = place.lane.handle() else {
            return Err((Refusal::new(Code::LaneLost).undispatched(), gone()));
        };
        let mut opened = handle.open(&open);
        if matches!(opened, Err(OpenError::Overloaded)) && self.tunnel.lanes.end_slowest() {
            opened = handle.open(&open);
        }
        opened.map_err(|error| match error {
            OpenError::Overloaded => (Refusal::new(Code::Overloaded), None),
            OpenError::Full => (Refusal::new(Code::Overloaded), gone()),
            OpenError::NotReady | OpenError::Draining => (Refusal::new(Code::Restarting), gone()),
            OpenError::HeadTooLarge => (Refusal::new(Code::HeadTooLarge), None),
            OpenError::Invalid => (Refusal::new(Code::BadHeader), None),
        })
    }

    /// Waits for the final head, and uploads the body meanwhile.
    async fn head(
        &self,
        answer: &mut StreamReader,
        sides: &mut Sides<'_>,
    ) -> Result<Answer, Fault> {
        // A client that waits for `100` gets it when its body is read for the first time.
        if !self.ask.expects {
            sides.begin_upload();
        }
        let mut begin_anyway = std::pin::pin!(sleep(CONTINUE_AFTER));
        let mut wait = self.ask.deadlines.wait_for_head(Duration::ZERO);
        loop {
            let is_uploading = sides.uploading.is_some();
            tokio::select! {
                biased;
                head = answer.head() => match head {
                    Ok(head) if head.status == 100 => sides.begin_upload(),
                    Ok(head) => return Ok(head),
                    Err(end) => {
                        // An upload that has reset the stream tells why.
                        if matches!(end, End::ResetHere(_)) && sides.uploading.is_some() {
                            let uploaded = upload_end(&mut sides.uploading).await;
                            sides.on_uploaded(uploaded)?;
                        }
                        return Err(Fault::Ended(end));
                    }
                },
                uploaded = upload_end(&mut sides.uploading) => sides.on_uploaded(uploaded)?,
                () = left(sides.watch.as_ref()) => return Err(Refusal::new(Code::Cancelled).into()),
                () = &mut begin_anyway, if sides.may_begin() => sides.begin_upload(),
                () = wait.over(&sides.progress, is_uploading) => {
                    return Err(Refusal::new(Code::GatewayTimeout).into());
                }
            }
        }
    }
}

/// Reason why there is no head.
enum Fault {
    Ended(End),
    Refused(Refusal),
}

impl From<Refusal> for Fault {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(refusal)
    }
}

/// State of the client's direction while the head is awaited.
struct Sides<'a> {
    core: &'a Arc<Core>,
    /// Body whose upload has not begun, or has ended early.
    upload: Option<Upload>,
    request: Option<StreamWriter>,
    uploading: Option<Uploading>,
    uploaded: Option<Uploaded>,
    watch: Option<Watch>,
    progress: Progress,
    access: Arc<Access>,
    place: Arc<Place>,
}

impl Sides<'_> {
    const fn may_begin(&self) -> bool {
        self.upload.is_some() && self.uploading.is_none() && self.uploaded.is_none()
    }

    /// Returns whether the upload has begun, and the body was not put into the stream whole.
    fn is_uploading(&self) -> bool {
        self.uploading.is_some() || self.uploaded.is_some_and(|ended| ended != Uploaded::Whole)
    }

    /// Begins to upload the body, if there is one and its upload has not begun.
    fn begin_upload(&mut self) {
        if !self.may_begin() {
            return;
        }
        if let Some((upload, request)) = self.upload.take().zip(self.request.take()) {
            let watch = self.watch.take().unwrap_or(Watch(None));
            let (progress, place) = (self.progress.clone(), Arc::clone(&self.place));
            let access = Arc::clone(&self.access);
            progress.note();
            let task = self.core.tasks.spawn(async move {
                // The stream counts until both of its directions have ended.
                let _place = place;
                upload.run(request, (&progress, &access), async move { watch.left().await }).await
            });
            self.uploading = Some(AbortOnDropHandle::new(task));
        }
    }

    fn on_uploaded(&mut self, ended: Option<(Upload, Uploaded)>) -> Result<(), Fault> {
        self.uploading = None;
        self.progress.note();
        let Some((upload, uploaded)) = ended else {
            return Err(Refusal::new(Code::Cancelled).into());
        };
        (self.upload, self.uploaded) = (Some(upload), Some(uploaded));
        match uploaded {
            Uploaded::Whole | Uploaded::Stopped | Uploaded::StreamEnded => Ok(()),
            Uploaded::TooLarge => Err(Refusal::new(Code::BodyTooLarge).into()),
            Uploaded::ClientLeft => Err(Refusal::new(Code::Cancelled).into()),
        }
    }

    /// Returns the body of a stream that has ended, if it can be uploaded again from its beginning.
    async fn take_back(mut self) -> Option<Upload> {
        if let Some(uploading) = self.uploading.take()
            && let Ok((upload, _)) = uploading.await
        {
            self.upload = Some(upload);
        }
        self.upload.filter(Upload::is_whole)
    }
}

/// Waits for the end of an upload; for ever where none runs.
async fn upload_end(uploading: &mut Option<Uploading>) -> Option<(Upload, Uploaded)> {
    match uploading {
        Some(uploading) => uploading.await.ok(),
        None => std::future::pending().await,
    }
}

/// Waits until a client leaves that is not read now.
async fn left(watch: Option<&Watch>) {
    match watch {
        Some(watch) => watch.left().await,
        None => std::future::pending().await,
    }
}

/// Makes the answer to the client.
fn respond(
    (tunnel, core): (&Arc<Tunnel>, &Arc<Core>),
    ask: Ask,
    mut answered: Answered,
    client: Client,
) -> Result<Response<Body>, Refusal> {
    let head = &answered.head;
    let malformed = || Refusal::new(Code::UpstreamProtocol);
    let status = StatusCode::from_u16(head.status).map_err(|_| malformed())?;
    let source = match head.source {
        FrameSource::Upstream => Source::Upstream,
        FrameSource::Agent => Source::Agent,
    };
    let hosts = request::hosts(ask.block.headers());
    let asked = answer::Asked {
        prefix: &ask.prefix,
        hosts: &hosts,
        upgrade: ask.upgrade.as_ref(),
        accepts_trailers: ask.accepts_trailers,
    };
    let mut headers = answer::map(status, &head.headers, source, &asked)?;
    let is_bodyless = ask.method == Method::HEAD
        || matches!(status, StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED);
    ask.access.answered(status, source);
    let length = headers.get(header::CONTENT_LENGTH).map(HeaderValue::as_bytes);
    if head.end && !is_bodyless && length.is_some_and(|length| length != b"0") {
        return Err(malformed());
    }
    let body = if status == StatusCode::SWITCHING_PROTOCOLS {
        let request = answered.request.take().ok_or_else(malformed)?;
        let Answered { answer, place, .. } = answered;
        core.tasks.spawn(switch::run(client, Way::Lane(request, answer, place), ask.access));
        Body::empty()
    } else if head.end {
        // The upstream may still read the body of the request.
        drop(answered.uploading.map(AbortOnDropHandle::detach));
        ask.access.complete();
        Body::empty()
    } else {
        if let Some(mut request) = answered.request.take_if(|_| ask.upgrade.is_some()) {
            let _ = request.finish();
        }
        // A cookie that does not reach the client counts too.
        let sets_cookie = head.headers.get(b"set-cookie").is_some();
        if sets_cookie && ask.is_of_peer {
            headers.insert(peers::UNKEPT, HeaderValue::from_static("1"));
        }
        let Answered { answer, uploading, progress, place, .. } = answered;
        let accepts_trailers = ask.accepts_trailers;
        let flow = Flow::Lane { answer, uploading, accepts_trailers, place };
        let (head, progress) = ((status, &headers, !sets_cookie), (progress, Duration::ZERO));
        Body::new(AnswerBody::new((tunnel, core), (&ask, &client), head, flow, progress))
    };
    let mut response = Response::new(body);
    *response.status_mut() = status;
    *response.headers_mut() = headers;
    Ok(response)
}

/// Resets a stream, since its client cannot be served any more.
fn cancel(answer: StreamReader) {
    answer.reset(&Reset::new(ResetCode::Cancelled));
}

/// Time after which a body is read though the upstream has not said `100`.
const CONTINUE_AFTER: Duration = Duration::from_secs(1);

/// Longest time for which the client of an answer that may last reads nothing: until the kernel gives its connection up.
const STILL_MAX: Duration = Duration::from_secs(7 * 24 * 3600);
