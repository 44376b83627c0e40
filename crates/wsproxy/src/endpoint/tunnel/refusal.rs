//! The table of refusals of proxied requests: status, code, and advice about a retry, which depends on the request.
//! Handshakes of lanes are refused as all others are, by `http/rejection.rs`.

use std::{borrow::Cow, time::Duration};

use http::{HeaderMap, HeaderValue, Method, Response, StatusCode, header};
use serde_json::{Value, json};
use wsproxy_proto::tunnel::{code::Code as Reset, frame};

use crate::http::{
    Body,
    rejection::{RefusalCode, retry_seconds},
};

/// A refusal of a proxied request, or the reason why its answer breaks off.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{}: {message}", code.label())]
pub struct Refusal {
    /// Row of the table.
    pub code: Code,
    /// `error.message`. Tells nothing of the upstream's place or of a cause.
    pub message: Cow<'static, str>,
    /// `Retry-After`
    pub retry_after: Option<Duration>,
    /// The request may have reached the upstream.
    pub may_be_dispatched: bool,
    /// Error inside the gateway, or text of an agent, for the log.
    pub cause: Option<String>,
}

/// Request that is refused.
#[derive(Debug, Clone, Copy)]
pub struct Refused<'a> {
    /// Method.
    pub method: &'a Method,
    /// It asks for an upgrade, which may run a command.
    pub is_upgrade: bool,
    /// Cluster that the path names.
    pub cluster: &'a str,
    /// Path for the upstream, without its query.
    pub path: &'a str,
    /// Id of the trace.
    pub trace_id: &'a str,
    /// The body is a `Status` of Kubernetes.
    pub wants_status: bool,
}

macro_rules! table {
    ($($(#[$doc:meta])* $name:ident = $label:literal $status:ident $wait:literal $retry:ident $message:literal)*) => {
        /// Code of a refusal.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum Code {
            $($(#[$doc])* $name,)*
        }

        impl Code {
            /// All codes.
            pub const ALL: &[Self] = &[$(Self::$name),*];

            const fn row(self) -> Row {
                match self {
                    $(Self::$name => Row {
                        label: $label,
                        status: StatusCode::$status,
                        wait: $wait,
                        retry: Retry::$retry,
                        message: $message,
                    },)*
                }
            }
        }
    };
}

// Code, status, seconds of `Retry-After` (0: none of its own), whether it may be sent again, message.
table! {
    /// The path is not one that every server reads alike, or the agent does not serve it.
    BadPath = "bad_path" BAD_REQUEST 0 Never "The path is not allowed."
    /// A header contradicts another one, or would change the meaning of one that the gateway writes.
    BadHeader = "bad_header" BAD_REQUEST 0 Never "A header is not allowed."
    /// The upgrade is one that no tunnel carries.
    BadUpgrade = "bad_upgrade" BAD_REQUEST 0 Never "The upgrade is not allowed."
    /// No credential, or a wrong one.
    Unauthorized = "unauthorized" UNAUTHORIZED 0 Never "A valid credential for clusters is needed."
    /// The credential does not open the cluster, or the page's origin is not allowed.
    Forbidden = "forbidden" FORBIDDEN 0 Never "The credential does not open this cluster."
    /// No such cluster.
    ClusterUnknown = "cluster_unknown" NOT_FOUND 0 Never "There is no such cluster."
    /// CONNECT or TRACE.
    MethodNotAllowed = "method_not_allowed" METHOD_NOT_ALLOWED 0 Never "The method is not allowed."
    /// The request passed this deployment on its way to the same cluster already.
    Loop = "loop" LOOP_DETECTED 0 Never "The request came here through the same cluster already."
    /// The body is larger than `tunnel.body_max`.
    BodyTooLarge = "body_too_large" PAYLOAD_TOO_LARGE 0 Never "The body is too large."
    /// The head of the request is too large.
    HeadTooLarge = "head_too_large" REQUEST_HEADER_FIELDS_TOO_LARGE 0 Never "The head of the request is too large."
    /// The head of the answer is too large.
    AnswerHeadTooLarge = "head_too_large" BAD_GATEWAY 0 Never "The head of the upstream's answer is too large."
    /// The credential sends more requests to the cluster than its rate.
    RateLimited = "rate_limited" TOO_MANY_REQUESTS 1 Always "Too many requests."
    /// The cluster's agent was connected a moment ago, and probably comes back.
    ClusterReconnecting = "cluster_reconnecting" SERVICE_UNAVAILABLE 1 Always "The cluster's agent is about to connect again."
    /// The cluster, its agents or this instance have no place for a further request.
    Overloaded = "overloaded" SERVICE_UNAVAILABLE 1 Undispatched "There are too many requests for this cluster."
    /// The instance or the agent restarts.
    Restarting = "restarting" SERVICE_UNAVAILABLE 1 Undispatched "The gateway or the cluster's agent restarts."
    /// No agent of the cluster is connected.
    ClusterOffline = "cluster_offline" SERVICE_UNAVAILABLE 0 Always "No agent of the cluster is connected."
    /// Another instance brought a request for a cluster that has no lane here.
    NoLane = "no_lane" MISDIRECTED_REQUEST 0 Always "This instance has no lane of the cluster."
    /// Another instance brought a request that should not wait here, and the cluster's lanes have no place for it.
    LanesFull = "lanes_full" MISDIRECTED_REQUEST 0 Always "The cluster's lanes at this instance are full."
    /// Too many requests failed at the upstream, so no further one is sent for a while.
    CircuitOpen = "circuit_open" SERVICE_UNAVAILABLE 1 Always "The cluster's upstream did not answer lately."
    /// The agent cannot connect to the upstream.
    UpstreamConnect = "upstream_connect" BAD_GATEWAY 0 Always "The cluster's agent cannot connect to the upstream."
    /// The agent and the upstream do not agree on TLS.
    UpstreamTls = "upstream_tls" BAD_GATEWAY 0 Always "TLS between the cluster's agent and the upstream failed."
    /// The upstream closed the connection.
    UpstreamReset = "upstream_reset" BAD_GATEWAY 0 Undispatched "The upstream closed the connection."
    /// The upstream's answer, or the agent's form of it, is no HTTP.
    UpstreamProtocol = "upstream_protocol" BAD_GATEWAY 0 Undispatched "The upstream's answer is malformed."
    /// The lane was lost.
    LaneLost = "lane_lost" BAD_GATEWAY 0 Undispatched "The connection to the cluster's agent was lost."
    /// The upstream sent no head in time.
    UpstreamTimeout = "upstream_timeout" GATEWAY_TIMEOUT 0 Undispatched "The upstream did not answer in time."
    /// Neither did the agent.
    GatewayTimeout = "gateway_timeout" GATEWAY_TIMEOUT 0 Undispatched "The cluster's agent did not answer in time."
    /// The client read too slowly while its place was needed.
    SlowReader = "slow_reader" BAD_GATEWAY 0 Undispatched "The answer was read too slowly."
    /// The client left.
    Cancelled = "cancelled" BAD_GATEWAY 0 Undispatched "The request was cancelled."
    /// A side of the lane sent more than it may.
    FlowControl = "flow_control" BAD_GATEWAY 0 Undispatched "The tunnel's protocol was broken."
    /// A side of the lane broke another rule.
    Protocol = "protocol" BAD_GATEWAY 0 Undispatched "The tunnel's protocol was broken."
}

struct Row {
    label: &'static str,
    status: StatusCode,
    wait: u64,
    retry: Retry,
    message: &'static str,
}

/// Requests that may be sent again without being done twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Retry {
    /// None: the next one fails in the same way.
    Never,
    /// All: with this code, none reached the upstream.
    Always,
    /// Those that reached no upstream, and GET and HEAD.
    Undispatched,
}

impl Code {
    /// Returns `error.code`, which is also a label of metrics.
    #[must_use]
    pub const fn label(self) -> &'static str {
        self.row().label
    }

    /// Returns the status of the answer, where no head was sent.
    #[must_use]
    pub const fn status(self) -> StatusCode {
        self.row().status
    }

    /// Returns the code for a RESET before the head of an answer.
    const fn of_reset(reset: &frame::Reset<'_>) -> Self {
        match reset.code {
            Reset::Cancelled => Self::Cancelled,
            Reset::Refused | Reset::Overloaded => Self::Overloaded,
            Reset::UpstreamConnect => Self::UpstreamConnect,
            Reset::UpstreamTls => Self::UpstreamTls,
            Reset::UpstreamReset | Reset::Reserved => Self::UpstreamReset,
            Reset::UpstreamTimeout => Self::UpstreamTimeout,
            Reset::UpstreamProtocol => Self::UpstreamProtocol,
            Reset::HeadTooLarge if reset.not_dispatched => Self::HeadTooLarge,
            Reset::HeadTooLarge => Self::AnswerHeadTooLarge,
            Reset::SlowReader => Self::SlowReader,
            Reset::BadPath => Self::BadPath,
            Reset::Restarting | Reset::Superseded => Self::Restarting,
            Reset::FlowControl => Self::FlowControl,
            Reset::None | Reset::Protocol => Self::Protocol,
        }
    }
}

impl Refusal {
    /// Makes a refusal with the message of its code. Where the code says nothing else, the request may be at the
    /// upstream: [`Self::undispatched`] says that it is not.
    #[must_use]
    pub fn new(code: Code) -> Self {
        let row = code.row();
        let retry_after = (row.wait > 0).then_some(Duration::from_secs(row.wait));
        // An instance refuses with these before it opens a stream.
        let is_before = matches!(code, Code::Overloaded | Code::Restarting);
        Self {
            code,
            message: row.message.into(),
            retry_after,
            may_be_dispatched: row.retry == Retry::Undispatched && !is_before,
            cause: None,
        }
    }

    /// As [`Self::new`], with another message.
    #[must_use]
    pub fn because(code: Code, message: impl Into<Cow<'static, str>>) -> Self {
        Self { message: message.into(), ..Self::new(code) }
    }

    /// Makes the refusal for a RESET of an agent. Its text goes to the log only.
    #[must_use]
    pub fn of_reset(reset: &frame::Reset<'_>) -> Self {
        let mut refusal = Self::new(Code::of_reset(reset));
        refusal.may_be_dispatched = !reset.not_dispatched
            && matches!(refusal.code.row().retry, Retry::Undispatched | Retry::Never);
        if refusal.retry_after.is_some() && reset.retry_after_ms > 0 {
            let wait = reset.retry_after_ms.min(RETRY_AFTER_MS_MAX);
            refusal.retry_after = Some(Duration::from_millis(wait.into()));
        }
        refusal.cause = (!reset.message.is_empty()).then(|| reset.message.to_owned());
        refusal
    }

    /// Notes that the request reached no upstream and never will.
    #[must_use]
    pub const fn undispatched(mut self) -> Self {
        self.may_be_dispatched = false;
        self
    }

    /// Sets the time after which a retry can succeed.
    #[must_use]
    pub const fn after(mut self, wait: Duration) -> Self {
        self.retry_after = Some(wait);
        self
    }

    /// Adds an error for the log.
    #[must_use]
    pub fn caused_by(mut self, cause: impl ToString) -> Self {
        self.cause = Some(cause.to_string());
        self
    }

    /// Returns whether the same request may be sent again without being done twice.
    #[must_use]
    pub fn is_retryable(&self, method: &Method, is_upgrade: bool) -> bool {
        let changes_nothing = !is_upgrade && (method == Method::GET || method == Method::HEAD);
        match self.code.row().retry {
            Retry::Never => false,
            Retry::Always => true,
            Retry::Undispatched => !self.may_be_dispatched || changes_nothing,
        }
    }

    /// Returns the answer to the client.
    #[must_use]
    pub fn response(&self, request: &Refused<'_>) -> Response<Body> {
        let body = if request.wants_status { self.status(request) } else { self.body(request) };
        let mut response = Response::new(Body::from(body.to_string()));
        *response.status_mut() = self.code.status();
        response.extensions_mut().insert(RefusalCode(self.code.label()));
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
        headers.insert(ERROR, HeaderValue::from_static(self.code.label()));
        headers.insert(SOURCE, HeaderValue::from_static("gateway"));
        if let Some(wait) = self.retry_after {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(retry_seconds(wait)));
        }
        match self.code {
            Code::Unauthorized => {
                let challenge = HeaderValue::from_static("Bearer realm=\"wsproxy\"");
                headers.insert(header::WWW_AUTHENTICATE, challenge);
            }
            Code::MethodNotAllowed => {
                headers.insert(header::ALLOW, HeaderValue::from_static(METHODS));
            }
            _ => {}
        }
        response
    }

    /// Returns the common form of the body.
    fn body(&self, request: &Refused<'_>) -> Value {
        json!({ "error": self.facts(request) })
    }

    /// Returns a `Status` of Kubernetes (`meta/v1`), which its clients show and act on.
    fn status(&self, request: &Refused<'_>) -> Value {
        let mut details = self.facts(request);
        let message = std::mem::take(&mut details["message"]);
        if let Some(details) = details.as_object_mut() {
            details.remove("message");
            if let Some(wait) = self.retry_after {
                details.insert("retryAfterSeconds".into(), retry_seconds(wait).into());
            }
            // Clients that know the types read only these members.
            let cause = json!({ "reason": self.code.label(), "message": &message });
            details.insert("causes".into(), json!([cause]));
        }
        json!({
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": {},
            "status": "Failure",
            "message": message,
            "reason": self.reason(),
            "details": details,
            "code": self.code.status().as_u16(),
        })
    }

    fn facts(&self, request: &Refused<'_>) -> Value {
        let path = &request.path[..request.path.floor_char_boundary(PATH_BYTES_MAX)];
        json!({
            "code": self.code.label(),
            "message": self.message,
            "retryable": self.is_retryable(request.method, request.is_upgrade),
            "cluster_id": request.cluster,
            "path": path,
            "retry_after": self.retry_after.map(retry_seconds),
            "trace_id": request.trace_id,
        })
    }

    /// Returns the reason that clients of Kubernetes know for the status.
    const fn reason(&self) -> &'static str {
        match self.code.status() {
            StatusCode::UNAUTHORIZED => "Unauthorized",
            StatusCode::FORBIDDEN => "Forbidden",
            StatusCode::METHOD_NOT_ALLOWED => "MethodNotAllowed",
            StatusCode::PAYLOAD_TOO_LARGE => "RequestEntityTooLarge",
            StatusCode::TOO_MANY_REQUESTS => "TooManyRequests",
            StatusCode::SERVICE_UNAVAILABLE => "ServiceUnavailable",
            StatusCode::GATEWAY_TIMEOUT => "Timeout",
            StatusCode::BAD_GATEWAY | StatusCode::LOOP_DETECTED => "InternalError",
            // `NotFound` of an unknown cluster would tell a controller that its objects are gone.
            _ => "BadRequest",
        }
    }
}

/// Returns whether a request is one of a client of Kubernetes, for one of its APIs.
#[must_use]
pub fn wants_status(path: &str, headers: &HeaderMap) -> bool {
    let first = path.split(['/', '?']).nth(1);
    let is_named = |name, words: &[&str]| {
        headers.get_all(name).iter().any(|value| {
            let text = String::from_utf8_lossy(value.as_bytes()).to_ascii_lowercase();
            words.iter().any(|word| text.contains(word))
        })
    };
    matches!(first, Some("api" | "apis"))
        && (is_named(header::ACCEPT, &["kubernetes", "k8s.io"])
            || is_named(header::USER_AGENT, &["kube", "openapi-generator/", "helm/"]))
}

/// Header with the code of a refusal.
pub const ERROR: &str = "x-wsproxy-error";

/// Header with the party that answered.
pub const SOURCE: &str = "x-wsproxy-source";

/// Upper bound of a path in the body of a refusal, in bytes.
const PATH_BYTES_MAX: usize = 1024;

/// Upper bound of the wait that an agent asks for.
const RETRY_AFTER_MS_MAX: u32 = 60_000;

const METHODS: &str = "GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS";

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(method: &Method) -> Refused<'_> {
        Refused {
            method,
            is_upgrade: false,
            cluster: "c1",
            path: "/a/b",
            trace_id: "0af7",
            wants_status: false,
        }
    }

    /// Status, seconds of `Retry-After`, and whether GET and POST may be sent again.
    type Row = (Code, &'static str, u16, Option<u64>, [bool; 2]);

    const NO: [bool; 2] = [false, false];
    const ALL: [bool; 2] = [true, true];
    const READING: [bool; 2] = [true, false];

    #[rustfmt::skip]
    const ROWS: &[Row] = &[
        (Code::BadPath, "bad_path", 400, None, NO),
        (Code::BadHeader, "bad_header", 400, None, NO),
        (Code::BadUpgrade, "bad_upgrade", 400, None, NO),
        (Code::Unauthorized, "unauthorized", 401, None, NO),
        (Code::Forbidden, "forbidden", 403, None, NO),
        (Code::ClusterUnknown, "cluster_unknown", 404, None, NO),
        (Code::MethodNotAllowed, "method_not_allowed", 405, None, NO),
        (Code::Loop, "loop", 508, None, NO),
        (Code::BodyTooLarge, "body_too_large", 413, None, NO),
        (Code::HeadTooLarge, "head_too_large", 431, None, NO),
        (Code::AnswerHeadTooLarge, "head_too_large", 502, None, NO),
        (Code::RateLimited, "rate_limited", 429, Some(1), ALL),
        (Code::ClusterReconnecting, "cluster_reconnecting", 503, Some(1), ALL),
        (Code::Overloaded, "overloaded", 503, Some(1), ALL),
        (Code::Restarting, "restarting", 503, Some(1), ALL),
        (Code::ClusterOffline, "cluster_offline", 503, None, ALL),
        (Code::NoLane, "no_lane", 421, None, ALL),
        (Code::LanesFull, "lanes_full", 421, None, ALL),
        (Code::CircuitOpen, "circuit_open", 503, Some(1), ALL),
        (Code::UpstreamConnect, "upstream_connect", 502, None, ALL),
        (Code::UpstreamTls, "upstream_tls", 502, None, ALL),
        (Code::UpstreamReset, "upstream_reset", 502, None, READING),
        (Code::UpstreamProtocol, "upstream_protocol", 502, None, READING),
        (Code::LaneLost, "lane_lost", 502, None, READING),
        (Code::UpstreamTimeout, "upstream_timeout", 504, None, READING),
        (Code::GatewayTimeout, "gateway_timeout", 504, None, READING),
        (Code::SlowReader, "slow_reader", 502, None, READING),
        (Code::Cancelled, "cancelled", 502, None, READING),
        (Code::FlowControl, "flow_control", 502, None, READING),
        (Code::Protocol, "protocol", 502, None, READING),
    ];

    #[test]
    fn refusals_are_as_documented() {
        assert_eq!(ROWS.iter().map(|row| row.0).collect::<Vec<_>>(), Code::ALL);
        for &(code, label, status, retry_after, retryable) in ROWS {
            let refusal = Refusal::new(code);
            let methods = [Method::GET, Method::POST];
            assert_eq!(
                methods.each_ref().map(|m| refusal.is_retryable(m, false)),
                retryable,
                "{label}"
            );
            let response = refusal.response(&refused(&Method::GET));
            assert_eq!((response.status().as_u16(), code.label()), (status, label));
            assert_eq!(response.headers()[ERROR], label);
            assert_eq!(response.headers()[SOURCE], "gateway");
            assert_eq!(response.headers()[header::CACHE_CONTROL], "no-store");
            let told = response.headers().get(header::RETRY_AFTER);
            let told = told.map(|value| value.to_str().unwrap().parse().unwrap());
            assert_eq!(told, retry_after, "{label}");
            assert_eq!(response.headers().contains_key(header::ALLOW), status == 405);
            assert_eq!(response.headers().contains_key(header::WWW_AUTHENTICATE), status == 401);
        }
    }

    #[test]
    fn a_request_that_reached_no_upstream_may_be_sent_again() {
        for &code in Code::ALL {
            let refusal = Refusal::new(code).undispatched();
            let is_final = code.row().retry == Retry::Never;
            for method in [Method::POST, Method::PUT, Method::DELETE, Method::GET] {
                assert_eq!(refusal.is_retryable(&method, false), !is_final, "{}", code.label());
            }
        }
        let mut late = Refusal::new(Code::Restarting);
        late.may_be_dispatched = true;
        let methods = ["GET", "HEAD", "POST", "OPTIONS", "DELETE", "get"];
        let retryable = methods.map(|m| late.is_retryable(&m.parse().unwrap(), false));
        assert_eq!(retryable, [true, true, false, false, false, false]);
        assert!(!late.is_retryable(&Method::GET, true));
    }

    #[test]
    fn the_body_has_all_facts() {
        let refusal = Refusal::new(Code::Overloaded).after(Duration::from_millis(1001));
        let expected = json!({ "error": {
            "code": "overloaded", "message": "There are too many requests for this cluster.",
            "retryable": true, "cluster_id": "c1", "path": "/a/b", "retry_after": 2, "trace_id": "0af7",
        }});
        assert_eq!(refusal.body(&refused(&Method::POST)), expected);
        let path = "/aä".repeat(2000);
        let long = Refused { path: &path, ..refused(&Method::GET) };
        let offline = Refusal::new(Code::ClusterOffline).body(&long);
        assert_eq!(offline["error"]["retry_after"], Value::Null);
        assert_eq!(offline["error"]["path"].as_str().unwrap().len(), 1024);
    }

    #[test]
    fn a_kubernetes_client_gets_a_status_with_the_same_facts() {
        let refusal = Refusal::new(Code::CircuitOpen).after(Duration::from_secs(7));
        let request = Refused { wants_status: true, ..refused(&Method::POST) };
        let message = "The cluster's upstream did not answer lately.";
        let expected = json!({
            "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
            "message": message, "reason": "ServiceUnavailable", "code": 503,
            "details": {
                "code": "circuit_open", "retryable": true, "cluster_id": "c1", "path": "/a/b",
                "retry_after": 7, "retryAfterSeconds": 7, "trace_id": "0af7",
                "causes": [{ "reason": "circuit_open", "message": message }],
            },
        });
        assert_eq!(refusal.status(&request), expected);
        // "Not found" would be about an object.
        for &code in Code::ALL {
            let status = Refusal::new(code).status(&request);
            assert_ne!(status["reason"], "NotFound");
            assert_eq!(status["code"], code.status().as_u16());
        }
    }

    #[test]
    fn kubernetes_clients_are_known_by_accept_and_user_agent() {
        let asks = |path: &str, accept: &str, agent: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(header::ACCEPT, accept.parse().unwrap());
            headers.insert(header::USER_AGENT, agent.parse().unwrap());
            wants_status(path, &headers)
        };
        let kubectl = "kubectl/v1.20.2 (linux/amd64) kubernetes/faecb19";
        let table = "application/json;as=Table;v=v1;g=meta.k8s.io,application/json";
        for path in ["/api", "/api/v1/pods", "/apis", "/apis/apps/v1", "/api?timeout=32s"] {
            assert!(asks(path, "application/json", kubectl), "{path}");
            assert!(asks(path, "*/*", "OpenAPI-Generator/29.0.0/python"));
            assert!(asks(path, "*/*", "fabric8-Kubernetes-client/6"));
            assert!(asks(path, table, "x"));
            assert!(asks(path, "application/vnd.kubernetes.protobuf", "x"));
            assert!(!asks(path, "application/json", "curl/8.0"));
        }
        for path in ["/", "/apix", "/version", "/x/api/v1", "//api", "/API"] {
            assert!(!asks(path, table, kubectl), "{path}");
        }
    }

    fn reset(code: Reset) -> frame::Reset<'static> {
        frame::Reset::new(code)
    }

    #[test]
    fn a_reset_becomes_a_refusal_whose_text_stays_inside() {
        for code in Reset::ALL {
            for not_dispatched in [true, false] {
                let told = frame::Reset { not_dispatched, message: "10.0.0.1", ..reset(code) };
                let refusal = Refusal::of_reset(&told);
                let is_retryable = refusal.is_retryable(&Method::POST, false);
                let body = refusal.body(&refused(&Method::POST)).to_string();
                assert!(!body.contains("10.0.0.1"));
                assert_eq!(refusal.cause.as_deref(), Some("10.0.0.1"));
                let is_final = refusal.code.row().retry == Retry::Never;
                let is_before = refusal.code.row().retry == Retry::Always;
                assert_eq!(is_retryable, (not_dispatched || is_before) && !is_final, "{code:?}");
            }
        }
        let busy = frame::Reset { retry_after_ms: 90_000, ..reset(Reset::Overloaded) };
        assert_eq!(Refusal::of_reset(&busy).retry_after, Some(Duration::from_secs(60)));
        let other = frame::Reset { retry_after_ms: 5, ..reset(Reset::UpstreamReset) };
        assert_eq!(Refusal::of_reset(&other).retry_after, None);
        let large = frame::Reset { not_dispatched: true, ..reset(Reset::HeadTooLarge) };
        assert_eq!(Refusal::of_reset(&large).code, Code::HeadTooLarge);
    }
}
