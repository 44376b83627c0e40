//! The one table of refusals: every way in which wsproxy says no before `101`.

use std::time::Duration;

use http::{HeaderValue, Response, StatusCode, header};
use wsproxy_proto::ws::handshake::Refusal;

use crate::{
    auth::jwt::JwtError,
    bus::{BusError, not_done::NotDone},
    http::Body,
    store::StoreError,
};

/// A refusal: what the client is told. The cause inside, if any, goes to the log only.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{} {}: {message}", status.as_u16(), code)]
pub struct Rejection {
    /// The status of the response.
    pub status: StatusCode,
    /// `error.code`, and the metric label `outcome`.
    pub code: &'static str,
    /// `error.message`.
    pub message: String,
    /// `Retry-After`.
    pub retry_after: Option<Duration>,
    /// Whether the same request may be sent again without being done twice.
    pub retryable: bool,
    /// What happened inside.
    pub cause: Option<String>,
}

macro_rules! table {
    ($($(#[$doc:meta])* $name:ident = $status:ident, $code:literal;)*) => {
        impl Rejection {
            $($(#[$doc])* #[must_use] pub fn $name(message: impl Into<String>) -> Self {
                Self::new(StatusCode::$status, $code, message.into())
            })*

            /// Every entry of the table.
            #[cfg(test)]
            fn all() -> Vec<Self> {
                vec![$(Self::$name("m")),*]
            }
        }

        /// Codes of the table.
        #[cfg(test)]
        pub(super) const CODES: &[&str] = &[$($code),*];
    };
}

table! {
    /// The request cannot be understood.
    bad_request = BAD_REQUEST, "bad_request";
    /// An id in the path is none.
    bad_id = BAD_REQUEST, "bad_id";
    /// No credential.
    missing_credentials = UNAUTHORIZED, "missing_credentials";
    /// Something in the place of a credential that is none.
    malformed_credentials = UNAUTHORIZED, "malformed_credentials";
    /// Wrong, expired, used, or of a kind that does not open this.
    invalid_token = FORBIDDEN, "invalid_token";
    /// A page of this origin may not connect.
    origin_not_allowed = FORBIDDEN, "origin_not_allowed";
    /// The API key lacks the scope `sessions`.
    missing_scope_sessions = FORBIDDEN, "missing_scope_sessions";
    /// The API key lacks the scope `events`.
    missing_scope_events = FORBIDDEN, "missing_scope_events";
    /// The API key lacks the scope `rooms`.
    missing_scope_rooms = FORBIDDEN, "missing_scope_rooms";
    /// The API key lacks the scope `agents`.
    missing_scope_agents = FORBIDDEN, "missing_scope_agents";
    /// The API key lacks the scope `admin`.
    missing_scope_admin = FORBIDDEN, "missing_scope_admin";
    /// This instance does not answer to that name.
    host_not_allowed = FORBIDDEN, "host_not_allowed";
    /// Nothing here.
    not_found = NOT_FOUND, "not_found";
    /// Something here, but not for this method.
    method_not_allowed = METHOD_NOT_ALLOWED, "method_not_allowed";
    /// The request did not arrive whole in time.
    request_timeout = REQUEST_TIMEOUT, "request_timeout";
    /// What is there does not fit to what was asked.
    conflict = CONFLICT, "conflict";
    /// The body is larger than the limit.
    too_large = PAYLOAD_TOO_LARGE, "too_large";
    /// A WebSocket lives here.
    upgrade_required = UPGRADE_REQUIRED, "upgrade_required";
    /// Attempts from this address above the rate.
    rate_limited = TOO_MANY_REQUESTS, "rate_limited";
    /// A user or a session has as many connections as it may.
    too_many_connections = TOO_MANY_REQUESTS, "too_many_connections";
    /// As many handshakes as may be wait for their credentials to be checked.
    too_many_handshakes = SERVICE_UNAVAILABLE, "too_many_handshakes";
    /// The instance holds as many connections as it may.
    full = SERVICE_UNAVAILABLE, "full";
    /// The instance is about to end.
    draining = SERVICE_UNAVAILABLE, "draining";
    /// The bus or the store cannot be reached.
    bus_unavailable = SERVICE_UNAVAILABLE, "bus_unavailable";
    /// Whoever issues tokens cannot be reached, so that none can be checked.
    issuer_unavailable = SERVICE_UNAVAILABLE, "issuer_unavailable";
    /// The bus or the store did not answer in time.
    deadline = GATEWAY_TIMEOUT, "deadline";
    /// A fault of the gateway's own.
    internal = INTERNAL_SERVER_ERROR, "internal";
}

impl Rejection {
    fn new(status: StatusCode, code: &'static str, message: String) -> Self {
        let retryable = matches!(
            status,
            StatusCode::SERVICE_UNAVAILABLE
                | StatusCode::TOO_MANY_REQUESTS
                | StatusCode::GATEWAY_TIMEOUT
        );
        let retry_after = retryable.then_some(Duration::from_secs(1));
        Self { status, code, message, retry_after, retryable, cause: None }
    }

    /// The bus or the store certainly did not do it.
    #[must_use]
    pub fn not_done(refusal: NotDone) -> Self {
        let status = match refusal {
            NotDone::WrongType => StatusCode::CONFLICT,
            _ if refusal.is_passing() => StatusCode::SERVICE_UNAVAILABLE,
            _ => StatusCode::INTERNAL_SERVER_ERROR,
        };
        let message = format!("Not done: {}.", refusal.reason());
        Self { retryable: true, ..Self::new(status, NOT_DONE, message) }
    }

    /// More waits for the bus than may; this was not put behind it.
    fn overloaded() -> Self {
        let message = "Not done: the bus is overloaded.".into();
        Self::new(StatusCode::SERVICE_UNAVAILABLE, NOT_DONE, message)
    }

    /// It is not known whether the request was done: only one that can be `repeated` may be sent again.
    #[must_use]
    pub fn in_doubt(mut self, repeated: bool) -> Self {
        self.retryable &= repeated || self.code == NOT_DONE;
        self
    }

    /// For a client, who is not told how the store is: to try again later is all that it can do.
    #[must_use]
    pub fn for_client(&self) -> Self {
        if self.code != NOT_DONE {
            return self.clone();
        }
        let message = "Not done: the store cannot be used now.".into();
        Self::new(StatusCode::SERVICE_UNAVAILABLE, NOT_DONE, message)
    }

    /// Attempts from this address above the rate; one can succeed after `wait`.
    #[must_use]
    pub fn too_often(wait: Duration) -> Self {
        let seconds = retry_seconds(wait);
        Self::rate_limited(format!("Too many attempts. Try again in {seconds} seconds."))
            .after(wait)
    }

    /// With what happened inside, for the log.
    #[must_use]
    pub fn because(mut self, cause: impl ToString) -> Self {
        self.cause = Some(cause.to_string());
        self
    }

    /// With another time after which a retry can succeed.
    #[must_use]
    pub const fn after(mut self, wait: Duration) -> Self {
        self.retry_after = Some(wait);
        self
    }

    /// The body of the response: contract section 8.
    #[must_use]
    pub fn body(&self) -> serde_json::Value {
        serde_json::json!({ "error": {
            "code": self.code,
            "message": self.message,
            "retryable": self.retryable,
        }})
    }

    /// The response.
    #[must_use]
    pub fn response(&self) -> Response<Body> {
        let mut response = Response::new(Body::from(self.body().to_string()));
        *response.status_mut() = self.status;
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
        if let Some(wait) = self.retry_after {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(retry_seconds(wait)));
        }
        match self.status {
            StatusCode::UNAUTHORIZED => {
                let challenge = HeaderValue::from_static("Bearer realm=\"wsproxy\"");
                headers.insert(header::WWW_AUTHENTICATE, challenge);
            }
            StatusCode::UPGRADE_REQUIRED => {
                headers.insert(header::UPGRADE, HeaderValue::from_static("websocket"));
                headers.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
                headers.insert(header::SEC_WEBSOCKET_VERSION, HeaderValue::from_static("13"));
            }
            _ => {}
        }
        response
    }
}

/// `error.code` where certainly nothing was done.
pub(super) const NOT_DONE: &str = "not_done";

/// Codes with which handshakes are refused.
pub(crate) const OF_HANDSHAKES: [&str; 20] = [
    "bad_id",
    "bad_request",
    "bus_unavailable",
    "deadline",
    "draining",
    "full",
    "host_not_allowed",
    "internal",
    "invalid_token",
    "issuer_unavailable",
    "malformed_credentials",
    "method_not_allowed",
    "missing_credentials",
    NOT_DONE,
    "not_found",
    "origin_not_allowed",
    "rate_limited",
    "too_many_connections",
    "too_many_handshakes",
    "upgrade_required",
];

/// A wait as a client is told it: rounded up, since earlier than that it would fail again.
fn retry_seconds(wait: Duration) -> u64 {
    (wait.as_secs() + u64::from(wait.subsec_nanos() > 0)).max(1)
}

impl From<Refusal> for Rejection {
    fn from(refusal: Refusal) -> Self {
        match refusal {
            Refusal::NotAnUpgrade => Self::upgrade_required("This is a WebSocket endpoint."),
            Refusal::Version => Self::upgrade_required("Only WebSocket version 13 is spoken here."),
            Refusal::Method => Self::method_not_allowed("A WebSocket handshake is a GET request."),
            Refusal::Malformed(what) => Self::bad_request(what),
        }
    }
}

impl From<BusError> for Rejection {
    fn from(error: BusError) -> Self {
        match error {
            BusError::Full => Self::overloaded().because(error),
            BusError::Closed => Self::draining("The instance is ending.").because(error),
            BusError::NotDone(refusal) => Self::not_done(refusal).because(error),
            BusError::Unreachable(_) | BusError::Refused(_) => {
                Self::bus_unavailable("The bus cannot be used now.").because(error)
            }
        }
    }
}

impl From<StoreError> for Rejection {
    fn from(error: StoreError) -> Self {
        let rejection = match &error {
            StoreError::NotDone { refusal, .. } => Self::not_done(*refusal),
            StoreError::Full => Self::not_done(NotDone::Memory),
            StoreError::Closed => Self::draining("The instance is ending."),
            StoreError::Lost(_) | StoreError::Refused(_) => {
                Self::bus_unavailable("The store cannot be used now.")
            }
        };
        rejection.because(error)
    }
}

impl From<JwtError> for Rejection {
    fn from(error: JwtError) -> Self {
        let make = match error {
            JwtError::Malformed => Self::malformed_credentials,
            JwtError::Unavailable => Self::issuer_unavailable,
            _ => Self::invalid_token,
        };
        make(error.to_string())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use serde_json::Value;
    use wsproxy_proto::disconnect::Disconnect;

    use super::*;

    /// Codes that only workers meet.
    const OF_WORKERS: &[&str] = &["too_large"];

    fn rule() -> Value {
        serde_json::from_str(include_str!("../../../../spec/finality.json")).unwrap()
    }

    /// Rows of a section by name.
    fn rows(rule: &Value, section: &str) -> BTreeMap<String, Value> {
        let rows = rule[section].as_array().unwrap();
        rows.iter().map(|row| (row["name"].as_str().unwrap().to_owned(), row.clone())).collect()
    }

    #[test]
    fn clients_rule_knows_every_refusal() {
        let rule = rule();
        let rows = rows(&rule, "handshakes");
        let refused = NotDone::of(b"OOM").map(|refusal| Rejection::not_done(refusal).for_client());
        for rejection in Rejection::all().into_iter().chain(refused) {
            let code = rejection.code;
            if code.starts_with("missing_scope_") || OF_WORKERS.contains(&code) {
                continue;
            }
            let row =
                rows.get(code).unwrap_or_else(|| panic!("{code} is not in spec/finality.json"));
            assert_eq!(row["status"], rejection.status.as_u16(), "{code}");
            let told: Value = serde_json::from_str(row["body"].as_str().unwrap()).unwrap();
            assert_eq!(told["error"]["code"], code);
            assert_eq!(told["error"]["retryable"], rejection.retryable, "{code}");
            let is_final = row["advice"] == "final";
            assert!(!(is_final && rejection.retryable), "{code} may be tried again");
        }
    }

    #[test]
    fn clients_rule_agrees_with_every_close() {
        let rule = rule();
        let rows = rows(&rule, "closes");
        for close in Disconnect::ALL.iter().filter(|close| **close != Disconnect::SERVER_LOST) {
            let row = rows.get(close.label);
            let row = row.unwrap_or_else(|| panic!("{} is not in spec/finality.json", close.label));
            assert_eq!(row["code"], close.code, "{}", close.label);
            assert_eq!(row["reason"], close.reason, "{}", close.label);
            match row["advice"].as_str().unwrap() {
                "final" | "credentials" => assert!(!close.reconnect, "{}", close.label),
                _ => assert!(close.reconnect, "{}", close.label),
            }
        }
    }

    #[test]
    fn handshakes_are_refused_with_codes_of_the_table() {
        let unknown =
            OF_HANDSHAKES.iter().find(|code| ![CODES, &[NOT_DONE]].concat().contains(code));
        assert_eq!(unknown, None);
    }
}
