//! Traces: which requests are recorded, their spans, and the way of these to a collector. Knows no endpoint family.
//!
//! While traces are off, every value here is empty and every call returns at once. Spans are made of requests and
//! calls, never of messages that are delivered.

use std::{
    borrow::Cow,
    sync::Arc,
    time::{Duration, Instant},
};

use http::HeaderMap;
use parking_lot::Mutex;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use wsproxy_conn::clock;
use wsproxy_proto::trace_context::{self, TraceContext};

pub use crate::traces::{
    sampler::Asker,
    span::{Kind, Value},
};
use crate::{
    config::traces::TracesConfig,
    telemetry::time,
    traces::{
        exporter::Exporter,
        metrics::TraceCounters,
        queue::SpanQueue,
        sampler::Choice,
        span::{Attributes, Parent, SpanData},
    },
};

mod exporter;
mod metrics;
mod otlp;
mod queue;
mod sampler;
mod span;

/// Traces of an instance. The default value: traces are off.
#[derive(Clone, Default)]
pub struct Tracer(Option<Arc<Recorder>>);

/// State of traces that are on.
struct Recorder {
    choice: Choice,
    queue: SpanQueue,
    counters: TraceCounters,
}

impl Tracer {
    /// Starts the exporter on `tasks`, until `end`, where a collector is configured.
    ///
    /// # Errors
    /// A sentence for the operator: the configuration cannot be used.
    pub fn start(
        config: &TracesConfig,
        server_id: &str,
        tasks: &TaskTracker,
        end: &CancellationToken,
    ) -> Result<Self, String> {
        let Some(target) = config.target() else { return Ok(Self::default()) };
        let recorder = Arc::new(Recorder {
            choice: Choice::new(config),
            queue: SpanQueue::new(config.queue_max, config.batch_max),
            counters: TraceCounters::default(),
        });
        let exporter = Exporter::new(config, &target, server_id, Arc::clone(&recorder), tasks)?;
        tasks.spawn(exporter.run(end.clone()));
        Ok(Self(Some(recorder)))
    }

    /// Returns whether traces are on.
    #[must_use]
    pub const fn is_on(&self) -> bool {
        self.0.is_some()
    }

    /// Begins the span of a request. Its headers may name a span of the caller as the parent.
    #[must_use]
    pub fn begin(&self, headers: &HeaderMap, asker: Asker) -> RootSpan {
        let Some(recorder) = &self.0 else { return RootSpan::default() };
        let mut parents = headers.get_all(TRACEPARENT).iter();
        // Two parents contradict each other.
        let parent = parents.next().filter(|_| parents.next().is_none());
        let parent = parent.and_then(|value| TraceContext::parse(value.as_bytes()));
        let states = headers.get_all(TRACESTATE).iter().map(|value| value.as_bytes());
        let state = parent.and_then(|_| trace_context::read_state(states)).map(Into::into);
        let (context, is_recorded) = recorder.context(parent.as_ref(), asker);
        let recording = is_recorded.then(|| Recording {
            recorder: Arc::clone(recorder),
            parent: parent.map(|parent| Parent { span: parent.span, is_remote: true }),
            clock: SpanClock::new(),
            is_wished: parent.is_some() && asker == Asker::Worker,
            root: Mutex::default(),
        });
        RootSpan { trace: Trace(Some(Arc::new(Traced { context, state, recording }))), end: None }
    }

    /// Begins a span that no request in this process contains. `parent` is the `traceparent` of the party that wants
    /// the work done.
    #[must_use]
    pub fn begin_alone(&self, parent: Option<&str>, name: &'static str, kind: Kind) -> Span {
        let Some(recorder) = &self.0 else { return Span::default() };
        let parent = parent.and_then(|text| TraceContext::parse(text.as_bytes()));
        let (context, is_recorded) = recorder.context(parent.as_ref(), Asker::Worker);
        let recording = is_recorded.then(|| {
            let clock = SpanClock::new();
            let data = SpanData {
                context,
                parent: parent.map(|parent| Parent { span: parent.span, is_remote: true }),
                state: None,
                name: name.into(),
                kind,
                start: clock.now(),
                end: 0,
                attributes: Attributes::default(),
                has_failed: false,
            };
            Box::new(ActiveSpan { recorder: Arc::clone(recorder), clock, data })
        });
        Span { context: Some(context), recording }
    }
}

impl Recorder {
    /// Makes the context of a new span, and decides whether it is recorded.
    fn context(&self, parent: Option<&TraceContext>, asker: Asker) -> (TraceContext, bool) {
        let trace = parent.map_or_else(|| rand::random::<u128>().max(1), |parent| parent.trace);
        let now = clock::now().0.saturating_mul(1000);
        let is_sampled = self.choice.records(trace, parent, asker, now);
        (TraceContext { trace, span: span_id(), is_sampled }, is_sampled)
    }

    fn push(&self, spans: impl ExactSizeIterator<Item = SpanData>) {
        let dropped = self.queue.push(spans);
        if dropped > 0 {
            self.counters.dropped_queue_full.add(dropped as u64);
        }
    }
}

/// Handle to the span of a request, for the parts of the gateway that serve it. Empty while traces are off.
#[derive(Clone, Default)]
pub struct Trace(Option<Arc<Traced>>);

struct Traced {
    context: TraceContext,
    state: Option<Arc<str>>,
    /// `None`: the trace has ids, but is not recorded.
    recording: Option<Recording>,
}

struct Recording {
    recorder: Arc<Recorder>,
    parent: Option<Parent>,
    clock: SpanClock,
    /// The trace is recorded since its caller, who may turn out to be unknown, asked for that.
    is_wished: bool,
    /// Guards the growing parts of the span; held for a few steps.
    root: Mutex<Root>,
}

#[derive(Default)]
struct Root {
    name: Cow<'static, str>,
    attributes: Attributes,
    phases: Vec<SpanData>,
    is_phase_open: bool,
    is_trusted: bool,
}

impl Trace {
    /// Returns the context of the span, for others.
    #[must_use]
    pub fn context(&self) -> Option<&TraceContext> {
        self.0.as_ref().map(|traced| &traced.context)
    }

    /// Returns the id of the trace, for log lines.
    #[must_use]
    pub fn id(&self) -> Option<String> {
        self.context().map(|context| format!("{:032x}", context.trace))
    }

    /// Returns the members that pass the trace on in announcements.
    #[must_use]
    pub fn handover(&self) -> Option<Box<Handover>> {
        let traced = self.0.as_ref()?;
        let state = traced.state.clone();
        Some(Box::new(Handover { traceparent: traced.context.to_string().into(), state }))
    }

    /// Returns whether attributes and phases are kept.
    #[must_use]
    pub fn is_recorded(&self) -> bool {
        self.recording().is_some()
    }

    /// Ends the current phase of the request, and begins the next one.
    pub fn enter(&self, phase: &'static str) {
        let Some((traced, recording)) = self.recording() else { return };
        let now = recording.clock.now();
        let mut root = recording.root.lock();
        root.end_phase(now);
        if root.phases.len() >= PHASES_MAX {
            return;
        }
        root.is_phase_open = true;
        root.phases.push(traced.child(phase.into(), Kind::Internal, now));
    }

    /// Names the span, and adds attributes.
    pub fn describe<const N: usize>(
        &self,
        name: impl Into<Cow<'static, str>>,
        attributes: [(&'static str, Option<Value>); N],
    ) {
        let Some((_, recording)) = self.recording() else { return };
        let mut root = recording.root.lock();
        root.name = name.into();
        for (name, value) in attributes {
            value.into_iter().for_each(|value| root.attributes.add(name, value));
        }
    }

    /// Adds an attribute.
    pub fn add(&self, name: &'static str, value: impl FnOnce() -> Value) {
        if let Some((_, recording)) = self.recording() {
            recording.root.lock().attributes.add(name, value());
        }
    }

    /// Notes that the caller has shown a credential, so that its wish to be recorded counts.
    pub fn trust(&self) {
        if let Some((_, recording)) = self.recording() {
            recording.root.lock().is_trusted = true;
        }
    }

    /// Begins a span for a part of the request.
    #[must_use]
    pub fn child(&self, name: &'static str, kind: Kind) -> Span {
        let Some((traced, Recording { recorder, clock, .. })) = self.recording() else {
            return Span::default();
        };
        let data = traced.child(name.into(), kind, clock.now());
        let (recorder, clock, context) = (Arc::clone(recorder), *clock, data.context);
        Span {
            context: Some(context),
            recording: Some(Box::new(ActiveSpan { recorder, clock, data })),
        }
    }

    fn recording(&self) -> Option<(&Traced, &Recording)> {
        let traced = self.0.as_deref()?;
        Some((traced, traced.recording.as_ref()?))
    }
}

impl Traced {
    fn child(&self, name: Cow<'static, str>, kind: Kind, start: u64) -> SpanData {
        SpanData {
            context: TraceContext { span: span_id(), ..self.context },
            parent: Some(Parent { span: self.context.span, is_remote: false }),
            state: self.state.clone(),
            name,
            kind,
            start,
            end: start,
            attributes: Attributes::default(),
            has_failed: false,
        }
    }
}

impl Root {
    fn end_phase(&mut self, now: u64) {
        if std::mem::take(&mut self.is_phase_open)
            && let Some(phase) = self.phases.last_mut()
        {
            phase.end = now;
        }
    }
}

/// A trace as it is passed on in announcements.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Handover {
    /// `traceparent`
    pub traceparent: Box<str>,
    /// `tracestate`
    pub state: Option<Arc<str>>,
}

impl Handover {
    /// Adds the members to an announcement.
    pub fn add_to(&self, announcement: &mut serde_json::Value) {
        announcement[TRACEPARENT] = (&*self.traceparent).into();
        if let Some(state) = &self.state {
            announcement[TRACESTATE] = (&**state).into();
        }
    }
}

/// The span of a request with its phases. Dropping it ends it; without [`RootSpan::end`], the caller has gone away.
#[derive(Default)]
pub struct RootSpan {
    trace: Trace,
    end: Option<Ending>,
}

struct Ending {
    status: u16,
    /// Code of a refusal.
    code: Option<Cow<'static, str>>,
    /// The answer broke off behind its head.
    is_broken: bool,
}

impl RootSpan {
    /// Returns the handle for parts of the gateway.
    #[must_use]
    pub const fn trace(&self) -> &Trace {
        &self.trace
    }

    /// Ends the span with the status of the answer and the code of a refusal.
    pub fn end(mut self, status: http::StatusCode, code: Option<&'static str>) {
        let status = status.as_u16();
        if self.trace.is_recorded() {
            let code = code.map(Cow::Borrowed);
            let code = code.or_else(|| (status >= 400).then(|| status.to_string().into()));
            self.end = Some(Ending { status, code, is_broken: false });
        }
    }

    /// Ends the span of an answer with this status that broke off, for the reason `code`.
    pub fn end_broken(mut self, status: http::StatusCode, code: &'static str) {
        let code = Some(code.into());
        self.end = Some(Ending { status: status.as_u16(), code, is_broken: true });
    }
}

impl Drop for RootSpan {
    fn drop(&mut self) {
        let Some((traced, recording)) = self.trace.recording() else { return };
        let Recording { recorder, parent, clock, is_wished, root } = recording;
        let now = clock.now();
        let mut root = std::mem::take(&mut *root.lock());
        let was_in_phase = root.is_phase_open;
        root.end_phase(now);
        let status = self.end.as_ref().map_or(0, |end| end.status);
        let is_broken = self.end.as_ref().is_some_and(|end| end.is_broken);
        let code = self.end.take().map_or(Some(Cow::Borrowed("cancelled")), |end| end.code);
        let mut attributes = root.attributes;
        if status > 0 {
            attributes.add("http.response.status_code", u64::from(status));
        }
        // As for HTTP in general: a refusal that is the caller's fault is no error of the server.
        let has_failed = status >= 500 || is_broken;
        if let Some(code) = code {
            attributes.add("error.type", Value::text(&code));
            if let Some(phase) = root.phases.last_mut().filter(|_| was_in_phase) {
                phase.attributes.add("error.type", Value::text(&code));
                phase.has_failed = has_failed;
            }
        }
        if *is_wished && !root.is_trusted {
            return;
        }
        let span = SpanData {
            context: traced.context,
            parent: *parent,
            state: traced.state.clone(),
            name: root.name,
            kind: Kind::Server,
            start: clock.start,
            end: now,
            attributes,
            has_failed,
        };
        root.phases.push(span);
        recorder.push(root.phases.into_iter());
    }
}

/// A span of its own. Dropping it ends it. Empty while traces are off.
#[derive(Default)]
pub struct Span {
    context: Option<TraceContext>,
    /// `None`: the span is not recorded.
    recording: Option<Box<ActiveSpan>>,
}

struct ActiveSpan {
    recorder: Arc<Recorder>,
    clock: SpanClock,
    data: SpanData,
}

impl Span {
    /// Returns the context of the span, for others.
    #[must_use]
    pub const fn context(&self) -> Option<&TraceContext> {
        self.context.as_ref()
    }

    /// Adds an attribute.
    pub fn add(&mut self, name: &'static str, value: impl FnOnce() -> Value) {
        if let Some(active) = &mut self.recording {
            active.data.attributes.add(name, value());
        }
    }

    /// Marks the work as failed, by a code; `has_failed`: through a fault of the gateway or of a server behind it.
    pub fn fail(&mut self, code: &'static str, has_failed: bool) {
        if let Some(active) = &mut self.recording {
            active.data.attributes.add("error.type", code);
            active.data.has_failed = has_failed;
        }
    }
}

impl Drop for Span {
    fn drop(&mut self) {
        if let Some(active) = self.recording.take() {
            let ActiveSpan { recorder, clock, mut data } = *active;
            data.end = clock.now();
            recorder.push(std::iter::once(data));
        }
    }
}

/// Wall clock of a span, which does not step while the span lasts.
#[derive(Debug, Clone, Copy)]
struct SpanClock {
    start: u64,
    at: Instant,
}

impl SpanClock {
    fn new() -> Self {
        Self { start: nanoseconds(time::since_epoch()), at: Instant::now() }
    }

    fn now(&self) -> u64 {
        self.start.saturating_add(nanoseconds(self.at.elapsed()))
    }
}

fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

fn span_id() -> u64 {
    rand::random::<u64>().max(1)
}

/// Header and member that name a span of the caller.
pub const TRACEPARENT: &str = "traceparent";

/// Header and member with what other tracing systems add.
pub const TRACESTATE: &str = "tracestate";

/// Upper bound of the phases of a request.
const PHASES_MAX: usize = 16;
