//! Which request goes where.

use std::{convert::Infallible, sync::Arc};

use axum::Router;
use http::{HeaderValue, Request, Response, StatusCode, header};
use hyper::body::Incoming;
use tower::ServiceExt;
use tracing::{debug, info};

use crate::{
    endpoint::caller::Caller,
    gateway::Gateway,
    http::{
        Body,
        cors::{self, Grant},
        events, host,
        rejection::Rejection,
        sse, upgrade,
    },
    telemetry::metrics::{ACCEPTED, Endpoint},
};

/// What a listener serves.
#[derive(Clone)]
pub struct Routes {
    gateway: Arc<Gateway>,
    /// Whether WebSocket endpoints are among it.
    data_plane: bool,
    /// Admin routes, API and, where it runs, the demo.
    rest: Router,
}

/// The part of a path that may be in a log: none that looks like a query that was written with a wrong character, since
/// a token may be in it.
fn shown(path: &str) -> &str {
    let path = &path[..path.floor_char_boundary(LOGGED_PATH_BYTES_MAX)];
    let lower = path.to_ascii_lowercase();
    let marks = ["&", ";", "?", "%26", "%3b", "%3f", "token=", "token%3d"];
    let end = marks.iter().filter_map(|mark| lower.find(mark)).min();
    &path[..end.unwrap_or(path.len())]
}

/// So much of a refused path goes to the log.
const LOGGED_PATH_BYTES_MAX: usize = 256;

/// A WebSocket endpoint, by path.
enum Target<'a> {
    Session(&'a str, &'a str),
    Events,
    Echo,
}

impl Target<'_> {
    const fn endpoint(&self) -> Endpoint {
        match self {
            Self::Session(..) => Endpoint::Sessions,
            Self::Events => Endpoint::Events,
            Self::Echo => Endpoint::Echo,
        }
    }
}

impl Routes {
    /// WebSocket endpoints where `data_plane`, and `rest` for all else.
    #[must_use]
    pub const fn new(gateway: Arc<Gateway>, data_plane: bool, rest: Router) -> Self {
        Self { gateway, data_plane, rest }
    }

    /// The instance.
    #[must_use]
    pub const fn gateway(&self) -> &Arc<Gateway> {
        &self.gateway
    }

    /// Answers a request.
    ///
    /// # Errors
    /// Never: a refusal is an answer.
    pub async fn serve(self, mut request: Request<Incoming>) -> Result<Response<Body>, Infallible> {
        let path = request.uri().path().to_owned();
        let target = self.target(&path);
        let address = upgrade::client_address(&self.gateway, &request).ok();
        let caller = Arc::new(self.gateway.texts.caller(address, request.headers()));
        if let Err(rejection) = self.check_host(&request) {
            return Ok(match target {
                Some(target) => self.refuse(Some(target.endpoint()), &rejection, &path, &caller),
                None => {
                    self.gateway.metrics.error("bad_request");
                    rejection.response()
                }
            });
        }
        let Some(target) = target else {
            return self.serve_rest(request.map(Body::new), &path, &caller).await;
        };
        let endpoint = target.endpoint();
        if !endpoint.is_served(&self.gateway.config.endpoints) {
            let rejection = Rejection::not_found(not_served(endpoint));
            return Ok(self.refuse(Some(endpoint), &rejection, &path, &caller));
        }
        let grant = Grant::of(request.headers(), &self.gateway.config.server.allowed_origins);
        let is_events = sse::is_asked(&self.gateway, request.headers());
        let is_preflight = cors::is_preflight(request.method(), request.headers());
        if self.gateway.config.sse.enabled && is_preflight && grant.is_some() {
            return Ok(granted(grant, cors::preflight()));
        }
        request.extensions_mut().insert(Arc::clone(&caller));
        let answer = match target {
            Target::Session(agent, session) if is_events => {
                sse::session(&self.gateway, request, (agent, session)).await
            }
            Target::Session(agent, session) => {
                upgrade::session(&self.gateway, request, (agent, session)).await
            }
            Target::Events if is_events => events::stream(&self.gateway, request).await,
            Target::Events => events::open(&self.gateway, request).await,
            Target::Echo => upgrade::echo(&self.gateway, request),
        };
        // WebSockets need no such permission: the browser tells their origin, and that is all.
        let grant = grant.filter(|_| is_events);
        Ok(match answer {
            Ok(response) => {
                self.gateway.metrics.handshake(Some(endpoint), ACCEPTED);
                granted(grant, response)
            }
            Err(rejection) => {
                granted(grant, self.refuse(Some(endpoint), &rejection, &path, &caller))
            }
        })
    }

    /// Which host a request names, before anything else is looked at.
    fn check_host(&self, request: &Request<Incoming>) -> Result<(), Rejection> {
        host::check(request)?;
        let server = &self.gateway.config.server;
        if server.local_hosts_only { host::check_local(request, server.bind) } else { Ok(()) }
    }

    fn refuse(
        &self,
        endpoint: Option<Endpoint>,
        rejection: &Rejection,
        path: &str,
        caller: &Caller,
    ) -> Response<Body> {
        self.gateway.metrics.handshake(endpoint, rejection.code);
        let told = rejection.for_client();
        let left_out = self.gateway.lines.pass(rejection.code);
        // A second line of a kind within a second is for whoever looks closely.
        macro_rules! log {
            ($level:ident) => {
                $level!(
                    endpoint = endpoint.map(Endpoint::label),
                    path = shown(path),
                    address = caller.address.map(display),
                    origin = caller.origin.as_deref(),
                    user_agent = caller.user_agent.as_deref(),
                    status = told.status.as_u16(),
                    code = rejection.code,
                    error = rejection.cause,
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

    /// A body that drips in must not hold its socket for ever. The stream of an answer may.
    async fn serve_rest(
        self,
        request: Request<Body>,
        path: &str,
        caller: &Caller,
    ) -> Result<Response<Body>, Infallible> {
        let is_handshake = self.data_plane && request.headers().contains_key(header::UPGRADE);
        let has_body = !hyper::body::Body::is_end_stream(request.body());
        let server = &self.gateway.config.server;
        let limit = server.header_timeout + server.handshake_timeout;
        let answer = tokio::time::timeout(limit, self.rest.clone().oneshot(request)).await;
        let Ok(answer) = answer else {
            self.gateway.metrics.error("slow_request");
            let message = "The request did not arrive in time.";
            return Ok(Rejection::request_timeout(message).response());
        };
        let mut response = answer?;
        if has_body && !response.status().is_success() {
            // Its body may not have been read: then the connection is closed, and the client must not send the next
            // request on it.
            let close = HeaderValue::from_static("close");
            response.headers_mut().insert(header::CONNECTION, close);
        }
        if is_handshake && response.status() == StatusCode::NOT_FOUND {
            return Ok(self.refuse(None, &nothing_here(), path, caller));
        }
        Ok(response)
    }

    /// The endpoint of a path, whether or not this instance serves it.
    fn target<'a>(&self, path: &'a str) -> Option<Target<'a>> {
        if !self.data_plane {
            return None;
        }
        let mut segments = path.strip_prefix('/')?.split('/');
        match (segments.next()?, segments.next(), segments.next(), segments.next()) {
            ("ws", None, None, None) => Some(Target::Events),
            // Otherwise it is a route of its own.
            ("ws", Some("health"), None, None) if !self.gateway.config.endpoints.events => {
                Some(Target::Events)
            }
            ("echo", None, None, None) => Some(Target::Echo),
            (agent, Some("ws"), Some(session), None) => Some(Target::Session(agent, session)),
            _ => None,
        }
    }
}

/// The answer, with what a page of the request's origin may do with it.
fn granted(grant: Option<Grant>, mut response: Response<Body>) -> Response<Body> {
    if let Some(grant) = grant {
        grant.apply(response.headers_mut());
    }
    response
}

/// The answer to a path that nobody serves.
pub async fn not_found() -> Response<Body> {
    nothing_here().response()
}

fn nothing_here() -> Rejection {
    Rejection::not_found("Nothing is served at this path.")
}

const fn not_served(endpoint: Endpoint) -> &'static str {
    match endpoint {
        Endpoint::Sessions => "This instance serves no sessions: endpoints.sessions is off.",
        Endpoint::Events => "This instance serves no events: endpoints.events is off.",
        Endpoint::Echo => "This instance serves no echo: endpoints.echo is off.",
    }
}

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
