//! The line, the numbers and the span of each proxied request, written at its end. Holds no query and no header.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use http::{Method, StatusCode};
use parking_lot::Mutex;
use tracing::info;
use wsproxy_proto::hex::Digits;

use crate::{
    endpoint::tunnel::{
        counters::{Ended, TunnelCounters},
        headers::{answer::Source, marks::Marks},
        refusal::Code,
    },
    traces::{RootSpan, Trace, Value},
};

/// A proxied request from its begin to its end. Dropping the last handle writes its line, and ends its span.
pub struct Access {
    counters: Arc<TunnelCounters>,
    cluster: Box<str>,
    pattern: Box<str>,
    method: Method,
    trace_id: Digits<32>,
    request_id: Box<str>,
    /// Span of the request.
    trace: Trace,
    begin: Instant,
    /// Bytes of the bodies, from the client and to the client.
    bytes: [AtomicU64; 2],
    /// Guards the parts that become known later.
    known: Mutex<Known>,
}

#[derive(Default)]
struct Known {
    /// Span of the request, until its end.
    span: RootSpan,
    /// Time that the request waited for a lane.
    wait: Duration,
    status: Option<StatusCode>,
    source: Option<Source>,
    head: Option<Duration>,
    code: Option<Code>,
    is_complete: bool,
}

impl Access {
    /// Begins a request for a path with this pattern. `span` is the request's own.
    #[must_use]
    pub fn begin(
        counters: &Arc<TunnelCounters>,
        cluster: &str,
        pattern: &str,
        method: &Method,
        marks: &Marks,
        span: RootSpan,
    ) -> Arc<Self> {
        let cluster = &cluster[..cluster.floor_char_boundary(CLUSTER_BYTES_MAX)];
        let trace = span.trace().clone();
        trace.add("wsproxy.cluster", || Value::text(cluster));
        trace.add("wsproxy.pattern", || Value::text(pattern));
        Arc::new(Self {
            counters: Arc::clone(counters),
            cluster: cluster.into(),
            pattern: pattern.into(),
            method: method.clone(),
            trace_id: marks.trace_id(),
            request_id: marks.request_id.clone(),
            trace,
            begin: Instant::now(),
            bytes: Default::default(),
            known: Mutex::new(Known { span, ..Known::default() }),
        })
    }

    /// Returns the span of the request.
    #[must_use]
    pub const fn trace(&self) -> &Trace {
        &self.trace
    }

    /// Adds a time that the request waited for a lane.
    pub fn waited(&self, time: Duration) {
        self.known.lock().wait += time;
    }

    /// Notes the head of the answer. An upgrade ends the span, which then is as long as that of another handshake.
    pub fn answered(&self, status: StatusCode, source: Source) {
        let head = self.begin.elapsed();
        self.trace.add("wsproxy.source", || source.label().into());
        let mut known = self.known.lock();
        if status == StatusCode::SWITCHING_PROTOCOLS {
            std::mem::take(&mut known.span).end(status, None);
        } else {
            self.trace.enter("answer");
        }
        (known.status, known.source) = (Some(status), Some(source));
        known.head = (source != Source::Cache).then_some(head);
    }

    /// Notes that the answer is complete.
    pub fn complete(&self) {
        self.known.lock().is_complete = true;
    }

    /// Notes why the request was refused, or its answer broke off. The first reason counts.
    pub fn failed(&self, code: Code) {
        self.known.lock().code.get_or_insert(code);
    }

    /// Notes the refusal with which the gateway answers.
    pub fn refused(&self, code: Code) {
        let mut known = self.known.lock();
        known.code = Some(code);
        (known.status, known.source) = (Some(code.status()), Some(Source::Gateway));
        known.is_complete = true;
    }

    /// Counts bytes of the client's body.
    pub fn received(&self, bytes: usize) {
        self.bytes[0].fetch_add(bytes as u64, Relaxed);
        self.counters.bytes_in.add(bytes as u64);
    }

    /// Counts bytes of the answer.
    pub fn sent(&self, bytes: usize) {
        self.bytes[1].fetch_add(bytes as u64, Relaxed);
        self.counters.bytes_out.add(bytes as u64);
    }

    /// Returns the end of the request, for the numbers.
    fn end<'a>(&'a self, known: &Known, total: Duration) -> Ended<'a> {
        let code = known.code.or_else(|| (!known.is_complete).then_some(Code::Cancelled));
        Ended {
            cluster: &self.cluster,
            pattern: &self.pattern,
            status: known.status.filter(|_| known.source != Some(Source::Gateway)),
            code,
            head: known.head,
            total,
        }
    }
}

/// Ends the span of a request. `code`: reason of a refusal, or for which the answer broke off.
fn end_span(span: RootSpan, known: &Known, code: Option<Code>) {
    // A span without an end is that of a client who left.
    let Some(status) = known.status else { return };
    let is_broken = known.source != Some(Source::Gateway);
    match code.filter(|code| is_broken && *code != Code::Cancelled) {
        Some(code) => span.end_broken(status, code.label()),
        None => span.end(status, code.map(Code::label)),
    }
}

impl Drop for Access {
    fn drop(&mut self) {
        let mut known = std::mem::take(self.known.get_mut());
        let total = self.begin.elapsed();
        let end = self.end(&known, total);
        self.counters.ended(&end);
        end_span(std::mem::take(&mut known.span), &known, end.code);
        // A client without a credential must not fill the log.
        let left_out = match end.has_opened() {
            true => None,
            false => match self.counters.unopened_lines.pass() {
                Some(left_out) => Some(left_out),
                None => return,
            },
        };
        let millis = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        info!(
            cluster = &*self.cluster,
            method = self.method.as_str(),
            pattern = &*self.pattern,
            status = known.status.map(|status| status.as_u16()),
            code = end.code.map(Code::label),
            source = known.source.map(Source::label),
            bytes_in = self.bytes[0].load(Relaxed),
            bytes_out = self.bytes[1].load(Relaxed),
            wait_ms = millis(known.wait),
            head_ms = known.head.map(millis),
            total_ms = millis(total),
            trace_id = self.trace_id.as_str(),
            request_id = &*self.request_id,
            left_out,
            "Proxied request ended."
        );
    }
}

/// Upper bound of the name of a cluster, which may be one that does not exist.
const CLUSTER_BYTES_MAX: usize = 128;

#[cfg(test)]
mod tests {
    use http::HeaderMap;

    use super::*;

    fn access(counters: &Arc<TunnelCounters>) -> Arc<Access> {
        let marks = Marks::new(&HeaderMap::new(), None);
        Access::begin(counters, "c1", "/api", &Method::GET, &marks, RootSpan::default())
    }

    fn end(of: &Access) -> (Option<u16>, Option<Code>) {
        let known = of.known.lock();
        let end = of.end(&known, Duration::ZERO);
        (end.status.map(|status| status.as_u16()), end.code)
    }

    #[test]
    fn a_request_that_ends_without_a_word_was_cancelled() {
        let counters = Arc::new(TunnelCounters::default());
        let request = access(&counters);
        assert_eq!(end(&request), (None, Some(Code::Cancelled)));
        request.answered(StatusCode::OK, Source::Upstream);
        assert_eq!(end(&request), (Some(200), Some(Code::Cancelled)));
        request.failed(Code::LaneLost);
        request.failed(Code::Protocol);
        assert_eq!(end(&request), (Some(200), Some(Code::LaneLost)));
        request.received(3);
        request.sent(5);
        drop(request);
        assert_eq!([counters.bytes_in.value(), counters.bytes_out.value()], [3, 5]);
    }

    #[test]
    fn complete_answers_and_refusals_are_told_apart() {
        let counters = Arc::new(TunnelCounters::default());
        let request = access(&counters);
        request.answered(StatusCode::NOT_FOUND, Source::Upstream);
        request.complete();
        assert_eq!(end(&request), (Some(404), None));
        let request = access(&counters);
        request.refused(Code::Overloaded);
        assert_eq!(end(&request), (None, Some(Code::Overloaded)));
    }
}
