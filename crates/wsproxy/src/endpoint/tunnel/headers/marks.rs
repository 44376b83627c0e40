//! Ids of a proxied request: those by which its parts are found in traces and logs. Knows no exporter.

use http::{HeaderMap, HeaderName, HeaderValue};
use uuid::Uuid;
use wsproxy_proto::{
    hex::Digits,
    trace_context::{self, TraceContext},
};

/// Ids of a proxied request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Marks {
    /// Span that the upstream's span is a child of.
    pub trace: TraceContext,
    /// `tracestate` of the client.
    pub state: Option<String>,
    /// `X-Request-Id`
    pub request_id: Box<str>,
}

impl Marks {
    /// Reads the ids of a client, and makes those that are missing or unusable. `span` is the gateway's own span of the
    /// request where traces are on; it belongs to the client's trace already.
    #[must_use]
    pub fn new(headers: &HeaderMap, span: Option<TraceContext>) -> Self {
        let parent = one(headers, &TRACEPARENT);
        let parent = parent.and_then(|value| TraceContext::parse(value.as_bytes()));
        let new_span = || rand::random::<u64>().max(1);
        let trace = span.unwrap_or_else(|| match parent {
            Some(parent) => TraceContext { span: new_span(), ..parent },
            None => TraceContext {
                trace: rand::random::<u128>().max(1),
                span: new_span(),
                is_sampled: false,
            },
        });
        let states = headers.get_all(&TRACESTATE).iter().map(HeaderValue::as_bytes);
        let is_of_client = parent.is_some_and(|parent| parent.trace == trace.trace);
        let state = if is_of_client { trace_context::read_state(states) } else { None };
        let request_id = one(headers, &X_REQUEST_ID).and_then(|value| value.to_str().ok());
        let request_id = match request_id.filter(|id| is_request_id(id)) {
            Some(id) => id.into(),
            None => (&*Uuid::new_v4().hyphenated().encode_lower(&mut Uuid::encode_buffer())).into(),
        };
        Self { trace, state, request_id }
    }

    /// Returns the id of the trace, for bodies and log lines.
    #[must_use]
    pub fn trace_id(&self) -> Digits<32> {
        Digits::of(self.trace.trace)
    }
}

/// Returns the value of a header that stands once: two contradict each other.
fn one<'h>(headers: &'h HeaderMap, name: &HeaderName) -> Option<&'h HeaderValue> {
    let mut values = headers.get_all(name).iter();
    values.next().filter(|_| values.next().is_none())
}

/// Returns whether an id of a client can stand in a log line.
fn is_request_id(id: &str) -> bool {
    let is_good = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.:/+=@~|".contains(&byte);
    (1..=REQUEST_ID_BYTES_MAX).contains(&id.len()) && id.bytes().all(is_good)
}

const REQUEST_ID_BYTES_MAX: usize = 128;

const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");
const TRACESTATE: HeaderName = HeaderName::from_static("tracestate");
const X_REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

#[cfg(test)]
mod tests {
    use super::*;

    const PARENT: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

    fn marks(lines: &[(&'static str, &str)], span: Option<TraceContext>) -> Marks {
        let mut headers = HeaderMap::new();
        for (name, value) in lines {
            headers.append(*name, HeaderValue::from_bytes(value.as_bytes()).unwrap());
        }
        Marks::new(&headers, span)
    }

    #[test]
    fn a_request_continues_the_trace_of_its_client() {
        let parent = TraceContext::parse(PARENT.as_bytes()).unwrap();
        let made = marks(&[("traceparent", PARENT), ("tracestate", "a=1")], None);
        assert_eq!((made.trace.trace, made.trace.is_sampled), (parent.trace, true));
        assert_ne!(made.trace.span, parent.span);
        assert_eq!(made.state.as_deref(), Some("a=1"));
        assert_eq!(made.trace_id().as_str(), "0af7651916cd43dd8448eb211c80319c");
        let own = TraceContext { span: 7, ..parent };
        let made = marks(&[("traceparent", PARENT), ("tracestate", "a=1")], Some(own));
        assert_eq!((made.trace, made.state.as_deref()), (own, Some("a=1")));
    }

    #[test]
    fn an_unusable_parent_is_replaced_and_its_state_dropped() {
        let state = ("tracestate", "a=1");
        for lines in [
            &[state][..],
            &[("traceparent", "00-0-0-0"), state],
            &[("traceparent", ""), state],
            &[("traceparent", PARENT), ("traceparent", PARENT), state],
            &[("traceparent", "00-0AF7651916CD43DD8448EB211C80319C-b7ad6b7169203331-01"), state],
        ] {
            let [one, other] = [marks(lines, None), marks(lines, None)];
            assert_ne!(one.trace.trace, other.trace.trace);
            assert!(one.trace.trace > 0 && one.trace.span > 0 && !one.trace.is_sampled);
            assert_eq!(one.state, None);
            assert!(TraceContext::parse(one.trace.to_string().as_bytes()).is_some());
        }
        assert_eq!(marks(&[("traceparent", PARENT), ("tracestate", "\u{e4}")], None).state, None);
    }

    #[test]
    fn a_request_id_that_no_log_line_can_hold_is_replaced() {
        let id = |lines: &[(&'static str, &str)]| marks(lines, None).request_id;
        let good = "Root=1-67891233:abc/_~.+@|";
        assert_eq!(&*id(&[("x-request-id", good)]), good);
        let long = "a".repeat(129);
        for bad in ["", "a b", "a\tb", "a,b", "a;b", "\"a\"", "\u{e4}", "<a>", &long] {
            let made = id(&[("x-request-id", bad)]);
            assert_eq!(made.len(), 36, "{bad:?}");
        }
        assert_eq!(id(&[("x-request-id", "a"), ("x-request-id", "a")]).len(), 36);
        assert_eq!(id(&[]).len(), 36);
    }
}
