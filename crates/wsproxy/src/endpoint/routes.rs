//! Dispatch of requests to the endpoint families, the worker API and the admin routes.

use std::{convert::Infallible, sync::Arc};

use axum::Router;
use http::{HeaderMap, HeaderValue, Request, Response, StatusCode, header};
use hyper::body::Incoming;
use tower::ServiceExt;
use tracing::{debug, info};
use wsproxy_proto::{names::Id, ws::handshake::Refusal as NoUpgrade};

use crate::{
    core::{
        Core,
        caller::Caller,
        recent::{Refusal, Who},
    },
    endpoint::{Endpoint, Families, tunnel::proxy},
    http::{
        Body,
        answer_time::AnswerTime,
        cors::{self, Grant},
        handshake::{self, event_stream},
        host,
        listener::Service,
        path,
        rejection::Rejection,
    },
    telemetry::{family::Family, metrics::ACCEPTED},
    traces::Trace,
};

mod spans;

/// The routes of a listener.
#[derive(Clone)]
pub struct Routes {
    core: Arc<Core>,
    families: Arc<Families>,
    /// The listener serves the families' endpoints.
    data_plane: bool,
    /// Admin routes, worker API and, if it runs, the demo.
    rest: Router,
}

/// Returns the part of a path that may be logged. The rest may hold a token: a client may have mistyped the `?` before
/// its query.
fn shown(path: &str) -> &str {
    let path = &path[..path.floor_char_boundary(LOGGED_PATH_BYTES_MAX)];
    let lower = path.to_ascii_lowercase();
    let marks = ["&", ";", "?", "%26", "%3b", "%3f", "token=", "token%3d"];
    let end = marks.iter().filter_map(|mark| lower.find(mark)).min();
    &path[..end.unwrap_or(path.len())]
}

impl Service for Routes {
    fn core(&self) -> &Arc<Core> {
        &self.core
    }

    async fn serve(self, mut request: Request<Incoming>) -> Result<Response<Body>, Infallible> {
        let path = request.uri().path().to_owned();
        let is_websocket = asks_for_websocket(request.headers());
        let target =
            self.data_plane.then(|| Endpoint::of(&self.core, &path, is_websocket)).flatten();
        let address = handshake::client_address(&self.core, &request).ok();
        let caller = Arc::new(self.core.texts.caller(address, request.headers()));
        if let Err(rejection) = self.check_host(&request) {
            return Ok(match target {
                Some(target) => {
                    self.refuse((Some(target.family()), None), &rejection, &path, &caller)
                }
                None => {
                    self.core.metrics.error("bad_request");
                    rejection.response()
                }
            });
        }
        if self.data_plane && proxy::is_proxied(&self.core, request.uri()) {
            let answer = proxy::serve(&self.families.tunnel, &self.core, &caller, request);
            return Ok(Box::pin(answer).await);
        }
        let Some(target) = target else {
            return self.serve_rest(request.map(Body::new), &path, &caller).await;
        };
        let family = target.family();
        if !Families::serves(&self.core, family) {
            return Ok(self.refuse((Some(family), None), &not_served(family), &path, &caller));
        }
        let grant = Grant::of(request.headers(), &self.core.allowed_origins.rules());
        let is_events = event_stream::is_asked(&self.core, request.headers());
        let is_preflight = cors::is_preflight(request.method(), request.headers());
        if self.core.config.sse.enabled && is_preflight && grant.is_some() {
            return Ok(granted(grant, cors::preflight()));
        }
        let span = spans::handshake(&self.core.traces, target, &request, &caller, is_events);
        if self.core.traces.is_on() {
            request.extensions_mut().insert(span.trace().clone());
        }
        request.extensions_mut().insert(Arc::clone(&caller));
        let answer = self.families.open(target, &self.core, request).await;
        // A browser asks for no permission before it opens a WebSocket.
        let grant = grant.filter(|_| is_events);
        Ok(match answer {
            Ok(response) => {
                self.core.metrics.handshake(Some(family), ACCEPTED);
                span.end(response.status(), None);
                granted(grant, response)
            }
            Err(rejection) => {
                let trace = Some(span.trace());
                let response = self.refuse((Some(family), trace), &rejection, &path, &caller);
                span.end(response.status(), Some(rejection.code));
                granted(grant, response)
            }
        })
    }
}

impl Routes {
    /// Makes the routes of a listener: with `data_plane` the families' endpoints, and `rest`.
    #[must_use]
    pub const fn new(
        core: Arc<Core>,
        families: Arc<Families>,
        data_plane: bool,
        rest: Router,
    ) -> Self {
        Self { core, families, data_plane, rest }
    }

    /// Checks the host that a request names, before any other part of the request is used.
    fn check_host(&self, request: &Request<Incoming>) -> Result<(), Rejection> {
        host::check(request)?;
        let server = &self.core.config.server;
        if server.local_hosts_only { host::check_local(request, server.bind) } else { Ok(()) }
    }

    fn refuse(
        &self,
        (family, trace): (Option<Family>, Option<&Trace>),
        rejection: &Rejection,
        path: &str,
        caller: &Caller,
    ) -> Response<Body> {
        self.core.metrics.handshake(family, rejection.code);
        let told = rejection.for_client();
        if let Some(family) = family {
            self.keep(family, rejection, path, caller);
        }
        let left_out = self.core.lines.pass(rejection.code);
        // A code is logged once a second, and otherwise at debug: a flood of refusals must not fill the log.
        macro_rules! log {
            ($level:ident) => {
                $level!(
                    endpoint = family.map(Family::label),
                    path = shown(path),
                    user_id = rejection.user.as_deref(),
                    address = caller.address.map(display),
                    origin = caller.origin.as_deref(),
                    user_agent = caller.user_agent.as_deref(),
                    status = told.status.as_u16(),
                    code = rejection.code,
                    error = rejection.cause,
                    trace_id = trace.and_then(Trace::id).map(display),
                    left_out,
                    "Handshake refused."
                )
            };
        }
        match left_out {
            Some(_) => log!(info),
            None => log!(debug),
        }
        let mut response = told.response();
        if rejection.status == StatusCode::METHOD_NOT_ALLOWED {
            response.headers_mut().insert(header::ALLOW, HeaderValue::from_static("GET"));
        }
        response
    }

    /// Keeps a refusal for operators who look for one of its ids.
    fn keep(&self, family: Family, rejection: &Rejection, path: &str, caller: &Caller) {
        let id = |text: &str| path::parse_id("", text).ok();
        let (agent, session, room) = match Endpoint::of(&self.core, shown(path), true) {
            Some(Endpoint::Session(agent, session)) => (id(agent), id(session), None),
            Some(Endpoint::Room(room)) => (None, None, id(room)),
            _ => (None, None, None),
        };
        let who = Who {
            session: session.as_ref().map(Id::as_str),
            agent: agent.as_ref().map(Id::as_str),
            user: rejection.user.as_deref(),
            room: room.as_ref().map(Id::as_str),
            client: None,
            address: caller.address,
        };
        let refusal = Refusal {
            status: rejection.status.as_u16(),
            code: rejection.code,
            message: &rejection.message,
            cause: rejection.cause.as_deref(),
        };
        self.core.recent.refused(family, who, refusal);
    }

    /// Serves all other routes. A request that arrives slowly must not hold its socket for ever, so its time is
    /// bounded, unless a handler that has the whole request lifts the bound. The body of the answer may last.
    async fn serve_rest(
        self,
        mut request: Request<Body>,
        path: &str,
        caller: &Caller,
    ) -> Result<Response<Body>, Infallible> {
        let span = spans::call(&self.core.traces, &request, caller);
        if span.trace().context().is_some() {
            request.extensions_mut().insert(span.trace().clone());
        }
        let refusal = self.no_endpoint(&request);
        let has_body = !hyper::body::Body::is_end_stream(request.body());
        let server = &self.core.config.server;
        let limit = server.header_timeout + server.handshake_timeout;
        let time = AnswerTime::default();
        request.extensions_mut().insert(time.clone());
        let answer = time.bound(limit, self.rest.clone().oneshot(request)).await;
        let Some(answer) = answer else {
            self.core.metrics.error("slow_request");
            let message = "The request did not arrive in time.";
            return Ok(Rejection::request_timeout(message).response());
        };
        let mut response = answer?;
        spans::answer_call(span, &mut response);
        if has_body && !response.status().is_success() {
            // The request's body may not have been read. Then hyper closes the connection, so the client must not send
            // its next request on it.
            let close = HeaderValue::from_static("close");
            response.headers_mut().insert(header::CONNECTION, close);
        }
        match refusal {
            Some((family, rejection)) if response.status() == StatusCode::NOT_FOUND => {
                Ok(self.refuse((family, None), &rejection, path, caller))
            }
            _ => Ok(response),
        }
    }

    /// Returns the refusal of a handshake where no endpoint is, and nothing else either; `None` for other requests.
    fn no_endpoint(&self, request: &Request<Body>) -> Option<(Option<Family>, Rejection)> {
        let config = &self.core.config;
        let is_upgrade = request.headers().contains_key(header::UPGRADE);
        let is_agents_path = request.uri().path() == config.agents.path;
        let query = request.uri().query().unwrap_or_default();
        let names_user = query.split('&').any(|pair| pair.starts_with("userId="));
        if !self.data_plane {
            None
        } else if is_agents_path && config.endpoints.agents && names_user {
            // An agent behind a proxy that does not pass `Upgrade` on.
            Some((Some(Family::Agents), NoUpgrade::NotAnUpgrade.into()))
        } else if is_agents_path && !config.endpoints.agents && is_upgrade {
            Some((Some(Family::Agents), not_served(Family::Agents)))
        } else {
            is_upgrade.then(|| (None, nothing_here()))
        }
    }
}

/// Adds the permission for the page's origin to an answer.
fn granted(grant: Option<Grant>, mut response: Response<Body>) -> Response<Body> {
    if let Some(grant) = grant {
        grant.apply(response.headers_mut());
    }
    response
}

/// Returns whether a request is for a WebSocket. Another `Upgrade`, such as `h2c`, changes nothing about a page or a
/// probe.
fn asks_for_websocket(headers: &HeaderMap) -> bool {
    headers.get_all(header::UPGRADE).iter().any(|value| {
        let mut names = value.as_bytes().split(|byte| *byte == b',');
        names.any(|name| name.trim_ascii().eq_ignore_ascii_case(b"websocket"))
    })
}

/// Answers a request for an unknown path: 404.
pub async fn not_found() -> Response<Body> {
    nothing_here().response()
}

fn nothing_here() -> Rejection {
    Rejection::not_found("Nothing is served at this path.")
}

/// Refuses a client of a family that is switched off: 404.
fn not_served(family: Family) -> Rejection {
    let name = family.label();
    Rejection::not_found(format!("This instance serves no {name}: endpoints.{name} is off."))
}

/// Upper bound of a logged path.
const LOGGED_PATH_BYTES_MAX: usize = 256;

#[cfg(test)]
mod tests {
    use super::shown;

    #[test]
    fn a_token_that_was_put_into_the_path_is_not_shown() {
        for (path, expected) in [
            ("/demo/ws/s-1", "/demo/ws/s-1"),
            ("/demo/ws/s-1&token=secret", "/demo/ws/s-1"),
            ("/demo/ws/s-1;token=secret", "/demo/ws/s-1"),
            ("/demo/ws/s-1%3Ftoken=secret", "/demo/ws/s-1"),
            ("/demo/ws/s-1%26x", "/demo/ws/s-1"),
            ("/demo/ws/s-1/Token=secret", "/demo/ws/s-1/"),
            ("/demo/ws/s-1/access_token%3dsecret", "/demo/ws/s-1/access_"),
        ] {
            assert_eq!(shown(path), expected);
        }
        assert_eq!(shown(&"é".repeat(500)).len(), 256);
    }
}
