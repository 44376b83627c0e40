//! Which request goes where.

use std::{convert::Infallible, net::IpAddr, sync::Arc};

use axum::Router;
use http::{HeaderValue, Request, Response, StatusCode, header};
use hyper::body::Incoming;
use tower::ServiceExt;
use tracing::info;

use crate::{
    gateway::Gateway,
    http::{
        Body,
        cors::{self, Grant},
        events, host,
        rejection::Rejection,
        sse, upgrade,
    },
    telemetry::metrics::Endpoint,
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
    pub async fn serve(self, request: Request<Incoming>) -> Result<Response<Body>, Infallible> {
        let path = request.uri().path().to_owned();
        if let Err(rejection) = self.check_host(&request) {
            return Ok(match self.target(&path) {
                Some(target) => {
                    let address = upgrade::client_address(&self.gateway, &request).ok();
                    self.refuse(target.endpoint(), &rejection, &path, address)
                }
                None => {
                    self.gateway.metrics.error("bad_request");
                    rejection.response()
                }
            });
        }
        let address = upgrade::client_address(&self.gateway, &request).ok();
        let grant = Grant::of(request.headers(), &self.gateway.config.server.allowed_origins);
        let is_events = sse::is_asked(&self.gateway, request.headers());
        let is_preflight = cors::is_preflight(request.method(), request.headers());
        let (endpoint, answer) = match self.target(&path) {
            Some(_) if self.gateway.config.sse.enabled && is_preflight && grant.is_some() => {
                return Ok(granted(grant, cors::preflight()));
            }
            Some(Target::Session(agent, session)) if is_events => {
                (Endpoint::Sessions, sse::session(&self.gateway, request, (agent, session)).await)
            }
            Some(Target::Session(agent, session)) => (
                Endpoint::Sessions,
                upgrade::session(&self.gateway, request, (agent, session)).await,
            ),
            Some(Target::Events) if is_events => {
                (Endpoint::Events, events::stream(&self.gateway, request).await)
            }
            Some(Target::Events) => (Endpoint::Events, events::open(&self.gateway, request).await),
            Some(Target::Echo) => (Endpoint::Echo, upgrade::echo(&self.gateway, request)),
            None => return self.serve_rest(request.map(Body::new)).await,
        };
        // WebSockets need no such permission: the browser tells their origin, and that is all.
        let grant = grant.filter(|_| is_events);
        Ok(match answer {
            Ok(response) => {
                self.gateway.metrics.handshake(Some(endpoint), "accepted");
                granted(grant, response)
            }
            Err(rejection) => granted(grant, self.refuse(endpoint, &rejection, &path, address)),
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
        endpoint: Endpoint,
        rejection: &Rejection,
        path: &str,
        address: Option<IpAddr>,
    ) -> Response<Body> {
        self.gateway.metrics.handshake(Some(endpoint), rejection.code);
        let told = rejection.for_client();
        info!(
            endpoint = endpoint.label(),
            path = &path[..path.floor_char_boundary(LOGGED_PATH_BYTES_MAX)],
            address = address.map(tracing::field::display),
            status = told.status.as_u16(),
            code = rejection.code,
            error = rejection.cause,
            "Handshake refused."
        );
        let mut response = told.response();
        if rejection.status == StatusCode::METHOD_NOT_ALLOWED {
            response.headers_mut().insert(header::ALLOW, HeaderValue::from_static("GET"));
        }
        response
    }

    /// A body that drips in must not hold its socket for ever. The stream of an answer may.
    async fn serve_rest(self, request: Request<Body>) -> Result<Response<Body>, Infallible> {
        let server = &self.gateway.config.server;
        let limit = server.header_timeout + server.handshake_timeout;
        let answer = tokio::time::timeout(limit, self.rest.oneshot(request)).await;
        answer.unwrap_or_else(|_| {
            self.gateway.metrics.error("slow_request");
            Ok(Rejection::request_timeout("The request did not arrive in time.").response())
        })
    }

    fn target<'a>(&self, path: &'a str) -> Option<Target<'a>> {
        if !self.data_plane {
            return None;
        }
        let endpoints = &self.gateway.config.endpoints;
        let mut segments = path.strip_prefix('/')?.split('/');
        match (segments.next()?, segments.next(), segments.next(), segments.next()) {
            ("ws", None, None, None) if endpoints.events => Some(Target::Events),
            ("echo", None, None, None) if endpoints.echo => Some(Target::Echo),
            (agent, Some("ws"), Some(session), None) if endpoints.sessions => {
                Some(Target::Session(agent, session))
            }
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
    Rejection::not_found("Nothing is served at this path.").response()
}
