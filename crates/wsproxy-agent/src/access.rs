//! Access line of a stream. Has neither query strings nor headers, but for the ids that join it with the gateway's line.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use bytes::Bytes;
use tokio::time::Instant;
use wsproxy_proto::{
    trace_context::TraceContext,
    tunnel::{code::Code, event::Request},
};

use crate::metrics::Counters;

/// Facts of one stream, for its line.
#[derive(Debug)]
pub(crate) struct Record {
    began: Instant,
    method: Bytes,
    trace_id: Option<u128>,
    request_id: Option<Bytes>,
    up: AtomicU64,
    down: AtomicU64,
    head: Option<(u16, Instant)>,
}

impl Record {
    pub(crate) fn new(request: &Request) -> Self {
        let value = |wanted: &[u8]| request.headers.get(wanted);
        let context = value(b"traceparent").and_then(|text| TraceContext::parse(&text));
        Self {
            began: Instant::now(),
            method: request.method.clone(),
            trace_id: context.map(|context| context.trace),
            request_id: value(b"x-request-id").filter(|id| id.len() <= REQUEST_ID_BYTES_MAX),
            up: AtomicU64::new(0),
            down: AtomicU64::new(0),
            head: None,
        }
    }

    /// Notes bytes that went to the upstream.
    pub(crate) fn add_up(&self, bytes: usize) {
        self.up.fetch_add(bytes as u64, Relaxed);
    }

    /// Notes bytes that went to the gateway.
    pub(crate) fn add_down(&self, bytes: usize) {
        self.down.fetch_add(bytes as u64, Relaxed);
    }

    /// Notes the final head.
    pub(crate) fn answered(&mut self, status: u16) {
        self.head = Some((status, Instant::now()));
    }

    /// Returns whether the final head was sent.
    pub(crate) const fn has_head(&self) -> bool {
        self.head.is_some()
    }

    /// Counts the stream.
    pub(crate) fn count(&self, counters: &Counters, code: Option<Code>) {
        counters.ended(self.head.map(|(status, _)| status), code);
        counters.bytes_up.fetch_add(self.up.load(Relaxed), Relaxed);
        counters.bytes_down.fetch_add(self.down.load(Relaxed), Relaxed);
    }

    /// Writes the line. `code` is that of a stream that is not complete.
    pub(crate) fn write(&self, cluster: &str, stream: u32, code: Option<Code>) {
        let ms = |span: std::time::Duration| span.as_secs_f64() * 1000.0;
        let head = self.head.map(|(_, at)| ms(at - self.began));
        tracing::info!(
            target: ACCESS,
            cluster,
            stream,
            method = %String::from_utf8_lossy(&self.method),
            status = self.head.map(|(status, _)| status),
            code = code.map(Code::label),
            source = if self.head.is_some() { "upstream" } else { "agent" },
            bytes_up = self.up.load(Relaxed),
            bytes_down = self.down.load(Relaxed),
            head_ms = head,
            total_ms = ms(self.began.elapsed()),
            trace_id = self.trace_id.map(|id| format!("{id:032x}")),
            request_id = self.request_id.as_ref().map(|id| String::from_utf8_lossy(id).into_owned()),
            "A stream ended."
        );
    }
}

/// Target of access lines, by which a filter of the log can leave them out.
pub(crate) const ACCESS: &str = "wsproxy_agent::access";

/// Upper bound of a request's id in a line.
const REQUEST_ID_BYTES_MAX: usize = 128;
