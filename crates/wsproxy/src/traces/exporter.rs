//! The one task that sends spans to the collector, in batches, one request after the other. No request waits for it.

use std::{
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Request, StatusCode, Uri, header};
use http_body_util::Full;
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::{debug, info, warn};
use wsproxy_proto::backoff::Backoff;

use crate::{
    config::traces::TracesConfig,
    outbound::{self, Outbound, OutboundError, USER_AGENT},
    telemetry::throttle::Throttle,
    traces::{
        Recorder,
        otlp::{self, PartialSuccess},
        span::SpanData,
    },
};

/// Sender of spans.
pub(super) struct Exporter {
    recorder: Arc<Recorder>,
    outbound: Outbound,
    url: Uri,
    headers: HeaderMap,
    /// Attributes of all spans.
    resource: Vec<(String, String)>,
    /// Time of one request.
    timeout: Duration,
    /// Time of one batch.
    batch_timeout: Duration,
    schedule_delay: Duration,
    /// Spans of the batch that is being sent.
    in_flight: AtomicUsize,
    refusals: Throttle,
}

/// The reason why a collector did not take a batch.
#[derive(Debug, thiserror::Error)]
enum ExportError {
    #[error(transparent)]
    Outbound(#[from] OutboundError),
    #[error("the answer is a web page, not that of a collector: see the URL")]
    Page,
    #[error("status {status}")]
    Status { status: StatusCode, retry_after: Option<Duration> },
}

impl ExportError {
    /// Returns whether the same batch may be taken later (OTLP, "Retryable Response Codes").
    const fn is_passing(&self) -> bool {
        match self {
            // An answer that is too large belongs to no collector.
            Self::Outbound(error) => !matches!(error, OutboundError::TooLarge(_)),
            Self::Page => false,
            Self::Status { status, .. } => matches!(status.as_u16(), 429 | 502 | 503 | 504),
        }
    }

    const fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Outbound(_) | Self::Page => None,
            Self::Status { retry_after, .. } => *retry_after,
        }
    }
}

impl Exporter {
    /// Creates the exporter, without a connection.
    ///
    /// # Errors
    /// A sentence for the operator.
    pub(super) fn new(
        config: &TracesConfig,
        target: &str,
        server_id: &str,
        recorder: Arc<Recorder>,
        tasks: &TaskTracker,
    ) -> Result<Self, String> {
        let url: Uri =
            target.parse().map_err(|error| format!("traces.endpoint is no URL: {error}"))?;
        let mut headers = HeaderMap::new();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/x-protobuf"));
        headers.insert(header::USER_AGENT, HeaderValue::from_static(USER_AGENT));
        headers.extend(config.headers());
        if config.headers.is_some() && outbound::is_exposed(&url) {
            warn!(
                "The URL of traces is not https: a third party on the network path can read traces.headers."
            );
        }
        info!(host = url.host(), sampler = ?config.sampler, ratio = config.sampler_arg, "Traces are on.");
        Ok(Self {
            recorder,
            outbound: Outbound::new(config.ca_file.as_deref(), Some(IDLE_MAX), tasks)?,
            url,
            headers,
            resource: resource(config, server_id),
            timeout: config.timeout,
            batch_timeout: config.export_timeout,
            schedule_delay: config.schedule_delay,
            in_flight: AtomicUsize::new(0),
            refusals: Throttle::new(),
        })
    }

    /// Sends spans until `end`, and then those that wait, for [`LAST_EXPORT_MAX`] at most.
    pub(super) async fn run(self, end: CancellationToken) {
        let is_done = {
            let mut work = pin!(self.work());
            tokio::select! {
                () = &mut work => return,
                () = end.cancelled() => self.recorder.queue.close(),
            }
            timeout(LAST_EXPORT_MAX, work).await.is_ok()
        };
        if !is_done {
            let spans = self.in_flight.load(Relaxed) + self.recorder.queue.len();
            self.recorder.counters.dropped_shutdown.add(spans as u64);
            warn!(spans, "Spans were dropped: the collector did not take them before the end.");
        }
    }

    /// Sends batches until the queue is closed and empty.
    async fn work(&self) {
        let mut outage = false;
        while self.wait_for_spans().await {
            let spans = self.recorder.queue.take();
            self.in_flight.store(spans.len(), Relaxed);
            self.send(&spans, &mut outage).await;
            self.in_flight.store(0, Relaxed);
        }
    }

    /// Waits until a batch is whole, or for a while after its first span. Returns `false` at the end.
    async fn wait_for_spans(&self) -> bool {
        let queue = &self.recorder.queue;
        while queue.len() == 0 {
            if queue.is_closed() {
                return false;
            }
            queue.changed().await;
        }
        let until = Instant::now() + self.schedule_delay;
        while !queue.has_batch() && !queue.is_closed() {
            tokio::select! {
                () = queue.changed() => {}
                () = sleep_until(until) => break,
            }
        }
        true
    }

    /// Sends a batch. A failure that may pass is tried again, within the time of a batch.
    async fn send(&self, spans: &[SpanData], outage: &mut bool) {
        let counters = &self.recorder.counters;
        let body = Bytes::from(otlp::request(&self.resource, spans));
        let until = Instant::now() + self.batch_timeout;
        for attempt in 0.. {
            let left = until.saturating_duration_since(Instant::now()).min(self.timeout);
            let error = match outbound::within(left, self.request(body.clone())).await {
                Ok(partial) => {
                    if std::mem::take(outage) {
                        info!("The collector takes spans again.");
                    }
                    return self.count(spans.len(), &partial);
                }
                Err(error) => error,
            };
            counters.failures.add(1);
            debug!(%error, attempt, "The collector did not take a batch of spans.");
            if !std::mem::replace(outage, true) {
                warn!(%error, "The collector does not take spans. They wait, and are dropped beyond traces.queue_max.");
            }
            if !error.is_passing() {
                return counters.dropped_refused.add(spans.len() as u64);
            }
            let wait = BACKOFF.delay(attempt, rand::random());
            // A collector may name any number of seconds.
            let told = error.retry_after().map(|told| told.min(self.batch_timeout));
            let wait = told.map_or(wait, |told| told.max(wait));
            if Instant::now() + wait >= until {
                counters.dropped_unsent.add(spans.len() as u64);
                self.in_flight.store(0, Relaxed);
                // The next batch would meet the same collector at once.
                return sleep_until(until).await;
            }
            sleep(wait).await;
        }
    }

    async fn request(&self, body: Bytes) -> Result<PartialSuccess, ExportError> {
        let mut request = Request::new(Full::new(body));
        *request.method_mut() = http::Method::POST;
        *request.uri_mut() = self.url.clone();
        *request.headers_mut() = self.headers.clone();
        let answer = self.outbound.send(request).await?;
        let status = answer.status();
        if !status.is_success() {
            let retry_after = retry_after(answer.headers());
            return Err(ExportError::Status { status, retry_after });
        }
        // A server of pages, or the login in front of a collector, answers 200 as well.
        let kind = answer.headers().get(header::CONTENT_TYPE);
        if kind.is_some_and(|kind| kind.as_bytes().starts_with(b"text/html")) {
            return Err(ExportError::Page);
        }
        Ok(otlp::read_answer(&outbound::read(answer, ANSWER_BYTES_MAX).await?))
    }

    fn count(&self, spans: usize, partial: &PartialSuccess) {
        let PartialSuccess { rejected_spans, message } = partial;
        let (spans, rejected) = (spans as u64, (*rejected_spans).min(spans as u64));
        self.recorder.counters.sent.add(spans - rejected);
        self.recorder.counters.dropped_refused.add(rejected);
        if (rejected > 0 || !message.is_empty())
            && let Some(left_out) = self.refusals.pass()
        {
            let told = &message[..message.floor_char_boundary(MESSAGE_BYTES_MAX)];
            warn!(rejected, told, left_out, "The collector refused spans.");
        }
    }
}

/// Returns the attributes of all spans: those of the operator, then those that he did not give.
fn resource(config: &TracesConfig, server_id: &str) -> Vec<(String, String)> {
    let mut resource = config.attributes();
    for (name, value) in [
        ("service.instance.id", server_id),
        ("service.version", env!("CARGO_PKG_VERSION")),
        ("telemetry.sdk.name", "wsproxy"),
        ("telemetry.sdk.language", "rust"),
        ("telemetry.sdk.version", env!("CARGO_PKG_VERSION")),
    ] {
        if !resource.iter().any(|(given, _)| given == name) {
            resource.push((name.into(), value.into()));
        }
    }
    resource
}

/// Reads `Retry-After`: seconds, or a date.
fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let text = headers.get(header::RETRY_AFTER)?.to_str().ok()?.trim();
    if let Ok(seconds) = text.parse() {
        return Some(Duration::from_secs(seconds));
    }
    let date = httpdate::parse_http_date(text).ok()?;
    Some(date.duration_since(std::time::SystemTime::now()).unwrap_or_default())
}

/// Waits between attempts at one batch.
const BACKOFF: Backoff = Backoff { first: Duration::from_secs(1), max: Duration::from_secs(10) };

/// Time for the last spans at the end of the instance.
const LAST_EXPORT_MAX: Duration = Duration::from_secs(3);

/// Time for which a connection to the collector is kept open.
const IDLE_MAX: Duration = Duration::from_secs(30);

/// Upper bound of a collector's answer.
const ANSWER_BYTES_MAX: usize = 64 * 1024;

/// Upper bound of a collector's words in the log.
const MESSAGE_BYTES_MAX: usize = 256;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn retry_after_is_seconds_or_a_date() {
        let read = |value: &'static str| {
            let headers = [(header::RETRY_AFTER, HeaderValue::from_static(value))];
            retry_after(&HeaderMap::from_iter(headers))
        };
        assert_eq!(read("7"), Some(Duration::from_secs(7)));
        assert_eq!(read("Sun, 06 Nov 1994 08:49:37 GMT"), Some(Duration::ZERO));
        assert_eq!((read("soon"), retry_after(&HeaderMap::new())), (None, None));
    }
}
