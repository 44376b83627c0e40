//! The list of the endpoint families. No family knows another.
//!
//! A new family needs a folder here, a row in each list below and a label in `telemetry/family.rs`. Its settings need a
//! file in `config`, its channels and keys a file in `names` of `wsproxy-proto`.

use std::sync::Arc;

use axum::Router;
use hashbrown::HashSet;
use http::{Request, Response};
use hyper::body::Incoming;
use tokio::time::Instant;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use uuid::Uuid;
use wsproxy_proto::disconnect::Disconnect;

use crate::{
    config::Config,
    core::{self, Core},
    endpoint::{
        agents::{Agents, inbox::Ending},
        echo::Echo,
        events::Events,
        rooms::{NO_ROOMS, Rooms},
        session::Sessions,
        tunnel::Tunnel,
    },
    http::{Body, admin::Details, api, listener::tls::TlsListener, rejection::Rejection},
    telemetry::{
        family::Family,
        report::Reporter,
        scrape::{Scrape, Source},
    },
};

pub mod agents;
pub mod console;
pub mod echo;
pub mod events;
pub mod rooms;
pub mod routes;
pub mod session;
pub mod tunnel;

/// The endpoint families of an instance, including those that are switched off. The routes of such a family answer 404,
/// its metrics are zero, and workers can still prepare sessions that another instance serves.
pub struct Families {
    /// `/{agent_id}/ws/{session_id}`
    pub sessions: Arc<Sessions>,
    /// `/ws`
    pub events: Arc<Events>,
    /// `/ws/{room_id}`
    pub rooms: Arc<Rooms>,
    /// Users' agents
    pub agents: Arc<Agents>,
    /// `/clusters/{cluster_id}/…`
    pub tunnel: Arc<Tunnel>,
    /// `/echo`
    pub echo: Arc<Echo>,
}

/// The endpoint that a path names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Endpoint<'p> {
    /// `/{agent_id}/ws/{session_id}`
    Session(&'p str, &'p str),
    /// `/ws`
    Events,
    /// `/ws/{room_id}`
    Room(&'p str),
    /// An upgrade at `agents.path`
    Agents,
    /// `/clusters/{cluster_id}/connect`
    Lane(&'p str),
    /// `/echo`
    Echo,
}

impl Families {
    /// Starts every family. Their tasks run on `background` until `end`.
    ///
    /// # Errors
    /// A sentence for the operator: the configuration of a family cannot be used.
    pub fn start(
        core: &Arc<Core>,
        background: &TaskTracker,
        end: &CancellationToken,
    ) -> Result<Arc<Self>, String> {
        Ok(Arc::new(Self {
            events: Events::start(core, background, end)?,
            sessions: Sessions::start(core, background, end),
            rooms: Rooms::start(core, background, end)?,
            agents: Agents::start(core, background, end)?,
            tunnel: Tunnel::start(core, background, end)?,
            echo: Echo::start(core),
        }))
    }

    /// Refuses a configuration that only other servers know to be wrong, where they answer in time.
    ///
    /// # Errors
    /// A sentence for the operator.
    pub async fn check(&self, core: &Core) -> Result<(), String> {
        self.agents.check(core).await
    }

    /// Returns whether this instance serves a family.
    #[must_use]
    pub const fn serves(core: &Core, family: Family) -> bool {
        let endpoints = &core.config.endpoints;
        match family {
            Family::Sessions => endpoints.sessions,
            Family::Events => endpoints.events,
            Family::Rooms => endpoints.rooms,
            Family::Agents => endpoints.agents,
            Family::Tunnel => endpoints.tunnel,
            Family::Echo => endpoints.echo,
        }
    }

    /// Opens a client of an endpoint.
    ///
    /// # Errors
    /// All entries of the table of refusals.
    pub async fn open(
        &self,
        endpoint: Endpoint<'_>,
        core: &Arc<Core>,
        request: Request<Incoming>,
    ) -> Result<Response<Body>, Rejection> {
        match endpoint {
            // The first segment of the tunnel's paths.
            Endpoint::Session(CLUSTERS, _) if core.config.endpoints.tunnel => {
                let message = "\"clusters\" is no agent id where endpoints.tunnel is on.";
                Err(Rejection::bad_id(message))
            }
            Endpoint::Session(agent, session) => {
                session::entrance::open(&self.sessions, core, request, (agent, session)).await
            }
            Endpoint::Events => events::entrance::open(&self.events, core, request).await,
            Endpoint::Room(room) => rooms::entrance::open(&self.rooms, core, request, room).await,
            // A database's futures are large, and no other handshake is to carry them.
            Endpoint::Agents => Box::pin(agents::entrance::open(&self.agents, core, request)).await,
            // The store may be asked, and its futures are large.
            Endpoint::Lane(cluster) => {
                Box::pin(tunnel::connect::open(&self.tunnel, core, request, cluster)).await
            }
            Endpoint::Echo => self.echo.open(core, request),
        }
    }

    /// Opens the listeners that families have for other instances, with at most `sockets_max` sockets each.
    ///
    /// # Errors
    /// Another process listens there, or the address does not belong to this machine.
    pub fn listen(
        &self,
        core: &Arc<Core>,
        tls: Option<Arc<TlsListener>>,
        sockets_max: usize,
    ) -> std::io::Result<()> {
        self.tunnel.listen(core, tls, sockets_max)
    }

    /// Returns the families' routes of the worker API.
    pub fn api(&self) -> Router<Arc<Core>> {
        session::api::router(&self.sessions)
            .merge(events::api::router(&self.events))
            .merge(rooms::api::router(&self.rooms))
            .merge(agents::api::router(&self.agents))
            .merge(tunnel::api::router(&self.tunnel))
    }

    /// Returns the families' routes for load balancers and supervisors, which every port serves.
    /// `details` tells who gets more than counts.
    pub fn probes(&self, details: Details) -> Router<Arc<Core>> {
        events::health::router(&self.events).merge(rooms::stats::router(&self.rooms, details))
    }

    /// Puts the values of another configuration into force that a reload replaces: the rates of connections.
    pub fn reload(&self, config: &Config) {
        let limits = &config.limits;
        let Self { sessions, events, rooms, agents, tunnel, echo } = self;
        for profile in [&sessions.profile, &events.profile, &echo.profile] {
            profile.rate.store(core::message_rate(limits));
            profile.byte_rate.store(core::byte_rate(limits));
        }
        // Agents' messages count by their bytes alone.
        agents.profile.byte_rate.store(core::byte_rate(limits));
        rooms.reload(config);
        tunnel.reload(config);
    }

    /// Begins no further work on connections, which are about to be closed, until `deadline` at the latest.
    pub fn stop_calls(&self, deadline: Instant) {
        self.agents.stop_calls();
        self.tunnel.drain(deadline);
    }

    /// Returns the connections with work in flight, which are closed last.
    #[must_use]
    pub fn busy(&self) -> HashSet<Uuid> {
        self.agents.connections.busy().iter().map(|inbox| inbox.connection).collect()
    }

    /// Ends the connections with work in flight, and their work.
    pub fn end_busy(&self) {
        for inbox in self.agents.connections.busy() {
            inbox.close(Ending { why: &Disconnect::RESTART, reason: None, secret: None });
        }
    }

    /// Returns the families that tell operators more than their numbers.
    pub fn reporters(&self) -> Vec<Arc<dyn Reporter>> {
        vec![Arc::clone(&self.agents) as Arc<dyn Reporter>]
    }

    /// Removes this instance's connections from the store, where other instances see them. Members of rooms may come
    /// back at other instances until `deadline`.
    pub async fn close(&self, deadline: Instant) {
        self.sessions.close().await;
        self.events.close().await;
        let (agents, tunnel) = (Box::pin(self.agents.close()), self.tunnel.close());
        tokio::join!(self.rooms.close(deadline), agents, tunnel);
    }
}

/// Returns all routes of the worker API: method, and path in OpenAPI's form.
pub fn api_routes() -> impl Iterator<Item = &'static (&'static str, &'static str)> {
    let of_families = [
        session::api::ROUTES,
        events::api::ROUTES,
        rooms::api::ROUTES,
        agents::api::ROUTES,
        tunnel::api::ROUTES,
    ];
    of_families.into_iter().flatten().chain(console::api::ROUTES).chain(api::ROUTES)
}

impl Source for Families {
    fn collect(&self, scrape: &mut Scrape) {
        self.sessions.collect(scrape);
        self.events.collect(scrape);
        self.rooms.collect(scrape);
        self.agents.collect(scrape);
        self.tunnel.collect(scrape);
        self.echo.collect(scrape);
    }
}

impl<'p> Endpoint<'p> {
    /// Returns the endpoint of a path, even one that this instance does not serve. Only a request for a WebSocket
    /// reaches users' agents: what else is at their path stays there.
    #[must_use]
    pub fn of(core: &Core, path: &'p str, is_websocket: bool) -> Option<Self> {
        let config = &core.config;
        if is_websocket && config.endpoints.agents && config.agents.path == path {
            return Some(Self::Agents);
        }
        let mut segments = path.strip_prefix('/')?.split('/');
        match (segments.next()?, segments.next(), segments.next(), segments.next()) {
            (CLUSTERS, Some(cluster), Some("connect"), None) => Some(Self::Lane(cluster)),
            ("ws", None, None, None) => Some(Self::Events),
            ("echo", None, None, None) => Some(Self::Echo),
            // Some names are those of probes. A client that opens a WebSocket there is told that they are no rooms.
            ("ws", Some(room), None, None)
                if config.endpoints.rooms && (is_websocket || !NO_ROOMS.contains(&room)) =>
            {
                Some(Self::Room(room))
            }
            // While events are served, `/ws/health` is a probe.
            ("ws", Some("health"), None, None) if !config.endpoints.events => Some(Self::Events),
            (agent, Some("ws"), Some(session), None) => Some(Self::Session(agent, session)),
            _ => None,
        }
    }

    /// Returns the family of the endpoint.
    #[must_use]
    pub const fn family(self) -> Family {
        match self {
            Self::Session(..) => Family::Sessions,
            Self::Events => Family::Events,
            Self::Room(_) => Family::Rooms,
            Self::Agents => Family::Agents,
            Self::Lane(_) => Family::Tunnel,
            Self::Echo => Family::Echo,
        }
    }
}

/// First segment of the tunnel's paths.
pub const CLUSTERS: &str = "clusters";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_document_describes_exactly_these_routes() {
        let document: serde_json::Value = serde_json::from_str(api::OPENAPI).unwrap();
        let mut described: Vec<_> = document["paths"]
            .as_object()
            .unwrap()
            .iter()
            .filter(|(path, _)| path.starts_with("/api/"))
            .flat_map(|(path, item)| {
                let methods = item.as_object().unwrap().keys();
                methods.filter(|m| *m != "parameters").map(move |m| (m.clone(), path.clone()))
            })
            .collect();
        let mut served: Vec<_> =
            api_routes().map(|(m, p)| ((*m).to_owned(), (*p).to_owned())).collect();
        described.sort();
        served.sort();
        assert_eq!(described, served);
    }
}
