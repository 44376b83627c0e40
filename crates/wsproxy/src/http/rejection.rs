//! The table of all refusals: status, code and retry advice of every request that is not served.

use std::time::Duration;

use http::{HeaderValue, Response, StatusCode, header};
use wsproxy_proto::{names::Id, ws::handshake::Refusal};

use crate::{
    auth::jwt::JwtError,
    bus::publish::BusError,
    http::Body,
    store::{command::StoreError, not_done::NotDone},
};

/// A refusal as the client or worker gets it. Its cause goes to the log only.
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
    /// The same request may be sent again without being done twice.
    pub retryable: bool,
    /// Error inside the gateway, for the log.
    pub cause: Option<String>,
    /// User that the client named, for the log. The client may not have proved to be that user.
    pub user: Option<Box<str>>,
    /// Form of the body.
    pub form: BodyForm,
}

/// Code of a refusal, among the extensions of its response.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RefusalCode(pub &'static str);

/// Form of the body of a refusal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BodyForm {
    /// That of the contract: a code, a message, and whether a retry does no harm.
    Common,
    /// That of rooms' limit of attempts, which clients of an older gateway read.
    RoomAttempts,
}

macro_rules! table {
    ($($(#[$doc:meta])* $name:ident = $status:ident, $code:literal;)*) => {
        impl Rejection {
            $($(#[$doc])* #[must_use] pub fn $name(message: impl Into<String>) -> Self {
                Self::new(StatusCode::$status, $code, message.into())
            })*

            /// All entries of the table.
            #[cfg(test)]
            fn all() -> Vec<Self> {
                vec![$(Self::$name("m")),*]
            }
        }

        /// All codes of the table.
        #[cfg(test)]
        pub(super) const CODES: &[&str] = &[$($code),*];
    };
}

table! {
    /// The request is malformed.
    bad_request = BAD_REQUEST, "bad_request";
    /// The listener speaks TLS, and the client does not.
    tls_required = BAD_REQUEST, "tls_required";
    /// A text in the path is not an id.
    bad_id = BAD_REQUEST, "bad_id";
    /// The request has no credential.
    missing_credentials = UNAUTHORIZED, "missing_credentials";
    /// The request's credential is malformed.
    malformed_credentials = UNAUTHORIZED, "malformed_credentials";
    /// The credential is wrong, expired, used, or of another kind.
    invalid_token = FORBIDDEN, "invalid_token";
    /// The user is unknown, or the secret is wrong, expired or revoked.
    invalid_credentials = FORBIDDEN, "invalid_credentials";
    /// The token does not open this room.
    room_forbidden = FORBIDDEN, "room_forbidden";
    /// Pages of this origin may not connect.
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
    /// The request names a host that is not this instance.
    host_not_allowed = FORBIDDEN, "host_not_allowed";
    /// The path, or the thing that it names, does not exist.
    not_found = NOT_FOUND, "not_found";
    /// The path exists, but not for this method.
    method_not_allowed = METHOD_NOT_ALLOWED, "method_not_allowed";
    /// The whole request did not arrive in time.
    request_timeout = REQUEST_TIMEOUT, "request_timeout";
    /// The client id belongs to another user in this room.
    taken = CONFLICT, "taken";
    /// The request does not fit the stored state.
    conflict = CONFLICT, "conflict";
    /// The configuration has problems, so nothing was reloaded.
    configuration_invalid = CONFLICT, "configuration_invalid";
    /// A newer connection of the user took the place of this one while it was opening.
    replaced = CONFLICT, "replaced";
    /// The body is larger than the limit.
    too_large = PAYLOAD_TOO_LARGE, "too_large";
    /// The path is a WebSocket endpoint.
    upgrade_required = UPGRADE_REQUIRED, "upgrade_required";
    /// The client's address makes more attempts than its rate allows.
    rate_limited = TOO_MANY_REQUESTS, "rate_limited";
    /// The user or session has reached its maximum of connections.
    too_many_connections = TOO_MANY_REQUESTS, "too_many_connections";
    /// The maximum of handshakes waits for their credentials to be checked.
    too_many_handshakes = SERVICE_UNAVAILABLE, "too_many_handshakes";
    /// The instance has reached its maximum of connections.
    full = SERVICE_UNAVAILABLE, "full";
    /// The room has its maximum of members, or the instance its maximum of rooms.
    room_full = SERVICE_UNAVAILABLE, "room_full";
    /// The instance is shutting down.
    draining = SERVICE_UNAVAILABLE, "draining";
    /// The bus or the store cannot be reached.
    bus_unavailable = SERVICE_UNAVAILABLE, "bus_unavailable";
    /// The database cannot be reached, so credentials cannot be checked.
    database_unavailable = SERVICE_UNAVAILABLE, "database_unavailable";
    /// The token issuer's keys cannot be fetched, so tokens cannot be checked.
    issuer_unavailable = SERVICE_UNAVAILABLE, "issuer_unavailable";
    /// No agent of the user is connected, so the call was not sent.
    agent_offline = SERVICE_UNAVAILABLE, "agent_offline";
    /// The agent's connection ended before the agent answered.
    agent_gone = BAD_GATEWAY, "agent_gone";
    /// The agent has the maximum of calls in flight, so the call was not sent.
    agent_busy = TOO_MANY_REQUESTS, "busy";
    /// The instance takes no calls, so the call was not sent.
    instance_busy = SERVICE_UNAVAILABLE, "busy";
    /// The agent did not answer in time.
    timeout = GATEWAY_TIMEOUT, "timeout";
    /// The call was cancelled.
    cancelled = CONFLICT, "cancelled";
    /// A call with this request id has ended already.
    duplicate = CONFLICT, "duplicate";
    /// The bus was lost while the call was on its way.
    outcome_unknown = SERVICE_UNAVAILABLE, "outcome_unknown";
    /// The bus or the store did not answer in time.
    deadline = GATEWAY_TIMEOUT, "deadline";
    /// The gateway has a fault.
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
        let (cause, user, form) = (None, None, BodyForm::Common);
        Self { status, code, message, retry_after, retryable, cause, user, form }
    }

    /// The bus or the store refused the request, so it certainly was not done.
    #[must_use]
    pub fn not_done(refusal: NotDone) -> Self {
        let status = match refusal {
            NotDone::WrongType => StatusCode::CONFLICT,
            _ if refusal.is_passing() => StatusCode::SERVICE_UNAVAILABLE,
            _ => StatusCode::INTERNAL_SERVER_ERROR,
        };
        // Retryable even with status 409 or 500: nothing was done, so a repetition cannot do it twice.
        let message = format!("Not done: {}.", refusal.reason());
        Self { retryable: true, ..Self::new(status, NOT_DONE, message) }
    }

    /// The bus's queue is full, so the request was not queued.
    fn overloaded() -> Self {
        let message = "Not done: the bus is overloaded.".into();
        Self::new(StatusCode::SERVICE_UNAVAILABLE, NOT_DONE, message)
    }

    /// Marks the outcome as unknown. Only a request that can be `repeated` stays retryable.
    #[must_use]
    pub fn in_doubt(mut self, repeated: bool) -> Self {
        self.retryable &= repeated || self.code == NOT_DONE;
        self
    }

    /// Returns the refusal as a client gets it. Details of the store are left out: a client can only try again later.
    #[must_use]
    pub fn for_client(&self) -> Self {
        if self.code != NOT_DONE {
            return self.clone();
        }
        let message = "Not done: the store cannot be used now.".into();
        Self::new(StatusCode::SERVICE_UNAVAILABLE, NOT_DONE, message)
    }

    /// The client's address makes more attempts than its rate allows. An attempt can succeed after `wait`.
    #[must_use]
    pub fn too_often(wait: Duration) -> Self {
        let seconds = retry_seconds(wait);
        Self::rate_limited(format!("Too many attempts. Try again in {seconds} seconds."))
            .after(wait)
    }

    /// As [`Self::too_often`], of rooms. Deployed clients of rooms read these words.
    #[must_use]
    pub fn too_often_for_rooms(wait: Duration) -> Self {
        let seconds = retry_seconds(wait);
        let message = format!("{ROOM_ATTEMPTS}. Try again in {seconds} seconds.");
        Self { form: BodyForm::RoomAttempts, ..Self::rate_limited(message).after(wait) }
    }

    /// Adds the error inside the gateway, for the log.
    #[must_use]
    pub fn because(mut self, cause: impl ToString) -> Self {
        self.cause = Some(cause.to_string());
        self
    }

    /// Adds the user that the client named, for the log.
    #[must_use]
    pub fn of_user(mut self, user: &Id) -> Self {
        self.user = Some(user.as_str().into());
        self
    }

    /// Sets the time after which a retry can succeed.
    #[must_use]
    pub const fn after(mut self, wait: Duration) -> Self {
        self.retry_after = Some(wait);
        self
    }

    /// Returns the JSON body of the response.
    #[must_use]
    pub fn body(&self) -> serde_json::Value {
        match self.form {
            BodyForm::Common => serde_json::json!({ "error": {
                "code": self.code,
                "message": self.message,
                "retryable": self.retryable,
            }}),
            BodyForm::RoomAttempts => {
                serde_json::json!({ "error": ROOM_ATTEMPTS, "message": self.message })
            }
        }
    }

    /// Returns the HTTP response.
    #[must_use]
    pub fn response(&self) -> Response<Body> {
        let mut response = Response::new(Body::from(self.body().to_string()));
        *response.status_mut() = self.status;
        response.extensions_mut().insert(RefusalCode(self.code));
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

/// Rounds a wait up to whole seconds: an earlier retry would fail.
pub(crate) fn retry_seconds(wait: Duration) -> u64 {
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

/// `error.code` of a request that certainly was not done.
pub(super) const NOT_DONE: &str = "not_done";

/// Member `error` of a body of [`BodyForm::RoomAttempts`].
const ROOM_ATTEMPTS: &str = "Rate limit exceeded";

/// Codes of refused handshakes.
pub(crate) const OF_HANDSHAKES: [&str; 26] = [
    "bad_id",
    "bad_request",
    "bus_unavailable",
    "database_unavailable",
    "deadline",
    "draining",
    "full",
    "host_not_allowed",
    "internal",
    "invalid_credentials",
    "invalid_token",
    "issuer_unavailable",
    "malformed_credentials",
    "method_not_allowed",
    "missing_credentials",
    NOT_DONE,
    "not_found",
    "origin_not_allowed",
    "rate_limited",
    "replaced",
    "room_forbidden",
    "room_full",
    "taken",
    "too_many_connections",
    "too_many_handshakes",
    "upgrade_required",
];

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use serde_json::Value;

    use super::*;

    /// Codes that only workers get.
    const OF_WORKERS: &[&str] = &[
        "agent_gone",
        "agent_offline",
        "busy",
        "cancelled",
        "configuration_invalid",
        "duplicate",
        "outcome_unknown",
        "timeout",
        "too_large",
    ];

    fn rule() -> Value {
        serde_json::from_str(include_str!("../../../../spec/finality.json")).unwrap()
    }

    /// Returns the rows of a section by name.
    fn rows(rule: &Value, section: &str) -> BTreeMap<String, Value> {
        let rows = rule[section].as_array().unwrap();
        rows.iter().map(|row| (row["name"].as_str().unwrap().to_owned(), row.clone())).collect()
    }

    #[test]
    fn clients_rule_knows_every_refusal() {
        let rule = rule();
        let rows = rows(&rule, "handshakes");
        let refused = Rejection::not_done(NotDone::Memory).for_client();
        for rejection in Rejection::all().into_iter().chain([refused]) {
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
    fn rooms_refuse_attempts_in_the_words_of_older_gateways() {
        let refused = Rejection::too_often_for_rooms(Duration::from_millis(29_001));
        let expected = r#"{"error":"Rate limit exceeded","message":"Rate limit exceeded. Try again in 30 seconds."}"#;
        assert_eq!(refused.body().to_string(), expected);
        let response = refused.response();
        assert_eq!(response.status(), StatusCode::TOO_MANY_REQUESTS);
        assert_eq!(response.headers()[header::RETRY_AFTER], "30");
        let row = rows(&rule(), "handshakes").remove("rate_limited, of rooms").unwrap();
        assert_eq!(row["body"], expected);
        let at_once = Rejection::too_often_for_rooms(Duration::ZERO);
        assert_eq!(at_once.message, "Rate limit exceeded. Try again in 1 seconds.");
    }

    #[test]
    fn handshakes_are_refused_with_codes_of_the_table() {
        let unknown =
            OF_HANDSHAKES.iter().find(|code| ![CODES, &[NOT_DONE]].concat().contains(code));
        assert_eq!(unknown, None);
    }
}
