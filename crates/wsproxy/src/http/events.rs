//! From a request for events to a driven connection, and how a newer token is looked at later.

use std::sync::Arc;

use http::{Request, Response};
use hyper::body::Incoming;
use secrecy::{ExposeSecret, SecretString};
use tracing::{debug, info};
use uuid::Uuid;
use wsproxy_conn::{Event, Link, clock};
use wsproxy_proto::{disconnect::Disconnect, history::Position, names::Id};

use crate::{
    auth::jwt::Claims,
    config::{DownFrames, EventIds},
    endpoint::{
        caller::Caller,
        events::{
            EventLogic, VERIFIED,
            messages::{Connected, Verdict},
        },
    },
    gateway::Gateway,
    http::{
        Body,
        admission::Place,
        credentials,
        rejection::Rejection,
        resume::{self, Opened, Resume, Wanted},
        sse,
        upgrade::{self, Waiting},
    },
    hub::{Form, Sink, replay::Outcome},
    registry::{Entry, Joining, Peer, Registry, Transport},
    telemetry::{metrics::Endpoint, time},
};

/// Opens a client of the event endpoint: contract section 4. The answer is `101` or a refusal.
///
/// # Errors
/// How to refuse it.
pub async fn open(
    gateway: &Arc<Gateway>,
    mut request: Request<Incoming>,
) -> Result<Response<Body>, Rejection> {
    let (handshake, waiting) = upgrade::begin(gateway, &mut request, &gateway.event_profile)?;
    let resume = Resume::read(request.headers(), request.uri().query())?;
    let entrance = Entrance::read(&mut request, waiting)?;
    drop(request);
    let link = &handshake.link;
    let form = Form { frames: DownFrames::Auto, ids: handshake.ids(EventIds::Json), acks: true };
    let on_loss = gateway.config.events.on_bus_loss;
    let client = Sink::Client { link: Arc::clone(link), form, on_loss };
    let (connection, peer) = (link.id(), Peer::Link(Arc::clone(link)));
    let entered =
        entrance.enter(gateway, connection, (client, peer), Transport::WebSocket, &resume).await?;
    let logic = entered.logic(gateway, connection, Transport::WebSocket);
    let Entered { opened, place, registered, .. } = entered;
    let handshake = (handshake, place);
    Ok(upgrade::accept(gateway, Endpoint::Events, handshake, Some(opened), registered, logic))
}

/// Opens a client of the event endpoint that only listens.
///
/// # Errors
/// How to refuse it.
pub async fn stream(
    gateway: &Arc<Gateway>,
    mut request: Request<Incoming>,
) -> Result<Response<Body>, Rejection> {
    let (opening, waiting) = sse::Opening::begin(gateway, &mut request, &gateway.event_profile)?;
    let entrance = Entrance::read(&mut request, waiting)?;
    drop(request);
    let ends = (opening.client(gateway.config.events.on_bus_loss), opening.peer());
    let (connection, resume) = (opening.id(), opening.resume());
    let entered = entrance.enter(gateway, connection, ends, Transport::Sse, resume).await?;
    let logic = entered.logic(gateway, connection, Transport::Sse);
    let Entered { opened, place, registered, .. } = entered;
    Ok(opening.answer(gateway, Endpoint::Events, (opened, place), registered, logic))
}

/// A client before the door: what its request says of it.
struct Entrance {
    token: SecretString,
    caller: Arc<Caller>,
    waiting: Waiting,
}

/// A client behind it.
struct Entered {
    claims: Claims,
    caller: Arc<Caller>,
    place: Place,
    opened: Opened,
    registered: Option<Entry>,
}

impl Entrance {
    fn read(request: &mut Request<Incoming>, waiting: Waiting) -> Result<Self, Rejection> {
        let token = credentials::find(request.headers(), request.uri().query(), "token")?;
        Ok(Self { token, caller: upgrade::caller(request), waiting })
    }

    /// Token, registry, subscriptions and what was missed, in this order and under one deadline.
    async fn enter(
        self,
        gateway: &Arc<Gateway>,
        connection: Uuid,
        (client, peer): (Sink, Peer),
        transport: Transport,
        resume: &Resume,
    ) -> Result<Entered, Rejection> {
        let entering = async {
            let claims = authenticate(gateway, &self.token).await?;
            let place = self.waiting.enter(gateway)?;
            let joining = Joining {
                connection,
                user: claims.user.clone(),
                peer,
                token: claims.jti.clone(),
                issued_at: claims.issued_at,
                address: self.caller.address,
                user_agent: self.caller.user_agent.as_deref().map(ToOwned::to_owned),
                transport,
            };
            // First, so that a revocation from now on finds the connection.
            let registered = join(gateway, joining)?;
            check_revoked(gateway, &claims).await?;
            let hello = hello(gateway, connection, &claims);
            let wanted = wanted(gateway, &claims.user, connection, client);
            let histories = gateway.event_histories.as_ref();
            let opened = resume::open(gateway, histories, wanted, resume, hello).await?;
            Ok(Entered { claims, caller: self.caller, place, opened, registered })
        };
        let entered = upgrade::deadline(gateway, entering).await?;
        debug!(user_id = %entered.claims.user, connection_id = %connection, "Authenticated and subscribed.");
        Ok(entered)
    }
}

impl Entered {
    fn logic(&self, gateway: &Gateway, connection: Uuid, transport: Transport) -> EventLogic {
        let expires_at = self.claims.expires_at;
        let (user, caller) = (self.claims.user.clone(), Arc::clone(&self.caller));
        let endpoint = Arc::clone(&gateway.events);
        EventLogic::new(endpoint, user, connection, transport, expires_at, caller)
    }
}

/// The connection in the registry, unless its user has too many.
fn join(gateway: &Gateway, joining: Joining) -> Result<Option<Entry>, Rejection> {
    let Some(registry) = &gateway.registry else { return Ok(None) };
    let entry = match gateway.config.limits.connections_per_user {
        0 => Some(registry.join(joining)),
        most => registry.join_within(joining, most),
    };
    entry.map(Some).ok_or_else(|| {
        Rejection::too_many_connections("The user has as many connections as one may.")
    })
}

/// The first message.
fn hello(
    gateway: &Arc<Gateway>,
    connection: Uuid,
    claims: &Claims,
) -> impl FnOnce(Outcome, Option<Position>) -> Option<String> + use<> {
    let (owner, user, expires_at) = (Arc::clone(gateway), claims.user.clone(), claims.expires_at);
    move |_, position| {
        let heartbeat = &owner.config.heartbeat;
        let connected = Connected {
            connection,
            user: &user,
            server_id: &owner.server_id,
            expires_at,
            heartbeat: (heartbeat.interval.as_secs_f64(), heartbeat.timeout.as_secs_f64()),
        };
        Some(connected.to_json(position))
    }
}

/// Who a token says its bearer is.
///
/// # Errors
/// It is not believed, or that cannot be known now.
pub async fn authenticate(gateway: &Gateway, token: &SecretString) -> Result<Claims, Rejection> {
    let verifier = gateway.jwt.as_ref();
    let verifier = verifier.ok_or_else(|| Rejection::internal("No token can be verified here."))?;
    let now = time::since_epoch().as_secs();
    let claims = verifier.verify(token.expose_secret(), now).await;
    claims.map_err(|error| Rejection::from(error).because(error.label()))
}

/// Where the connections of events are known.
///
/// # Errors
/// Events are not switched on.
pub fn registry_of(gateway: &Gateway) -> Result<&Arc<Registry>, Rejection> {
    gateway.registry.as_ref().ok_or_else(|| {
        if let Some(left_out) = gateway.lines.pass("events are off") {
            info!(left_out, "A call of the API needs events, which this instance does not serve.");
        }
        Rejection::not_found("The event endpoint is not switched on.")
    })
}

/// Whether a token was taken back before it expires.
async fn check_revoked(gateway: &Gateway, claims: &Claims) -> Result<(), Rejection> {
    let Some(registry) = &gateway.registry else { return Ok(()) };
    match registry.is_revoked(&claims.user, claims.jti.as_deref(), claims.issued_at).await? {
        true => Err(Rejection::invalid_token("The token was revoked.")),
        false => Ok(()),
    }
}

/// Looks at a token that a client brought later; the verdict goes to its handler.
pub fn look_at(
    gateway: &Arc<Gateway>,
    link: &Arc<Link>,
    registered: Option<&Arc<Entry>>,
    token: SecretString,
) {
    let (owner, link) = (Arc::clone(gateway), Arc::clone(link));
    // The entry must not outlive its connection.
    let registered = registered.map(Arc::downgrade);
    gateway.tasks.spawn(async move {
        let looking = async {
            let claims = authenticate(&owner, &token).await?;
            check_revoked(&owner, &claims).await?;
            Ok(claims)
        };
        let verdict = match upgrade::deadline(&owner, looking).await {
            Ok(claims) => {
                let entry = registered.and_then(|entry| entry.upgrade());
                // Of another user: then the verdict ends the connection.
                if let Some(entry) = entry.filter(|entry| entry.is_of(&claims.user)) {
                    entry.renew(claims.jti.as_deref(), claims.issued_at);
                    drop(entry);
                    // It may have been revoked just before the registry knew of it.
                    let again = upgrade::deadline(&owner, check_revoked(&owner, &claims)).await;
                    if again.is_err_and(|rejection| rejection.status.is_client_error()) {
                        link.disconnect(&Disconnect::REVOKED, clock::now());
                    }
                }
                let user = claims.user.as_str().into();
                Verdict::Good { user, expires_at: claims.expires_at }
            }
            Err(rejection) => {
                if let Some(left_out) = owner.lines.pass("token refused") {
                    info!(connection_id = %link.id(), code = rejection.code, error = rejection.cause,
                        left_out, "A newer token was refused.");
                }
                // Whoever sent it knows a token of this connection: what is wrong with it is one kind of error.
                let is_token = rejection.status.is_client_error();
                let code = if is_token { "invalid_token" } else { rejection.code };
                Verdict::Bad { code: code.into(), message: rejection.message }
            }
        };
        link.notify(Event { tag: VERIFIED, number: 0, payload: verdict.to_bytes() });
    });
}

/// To everybody, to this user, to this connection.
fn wanted(gateway: &Gateway, user: &Id, connection: Uuid, client: Sink) -> Wanted {
    let names = &gateway.names;
    let topics = [
        names.events_broadcast(),
        names.events_user(user),
        names.events_connection(&connection.to_string()),
    ];
    let topics = topics.into_iter().map(Into::into).collect();
    let counted_as = names.events_user(user);
    Wanted { client, topics, reserved: None, streams_of: None, counted_as }
}
