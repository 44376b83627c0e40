//! The handshake of an event client: token, registry, subscriptions, resume.

use std::sync::Arc;

use http::{Request, Response};
use hyper::body::Incoming;
use secrecy::{ExposeSecret, SecretString};
use tracing::{debug, info};
use uuid::Uuid;
use wsproxy_proto::{history::Position, names::Id};

use crate::{
    auth::jwt::Claims,
    config::{DownFrames, EventIds},
    core::Core,
    endpoint::events::{Events, logic::EventLogic, messages::Connected, refresh::TokenChecks},
    http::{
        Body,
        handshake::{
            self, Admitted, Opening,
            credentials::{self, Protocols},
            resume::{self, ClientTopics, ResumeRequest, Subscribed},
        },
        rejection::Rejection,
    },
    hub::{form::Form, replay::ResumeOutcome},
    registry::{Joining, Membership, Registry},
    telemetry::{family::Family, time},
    traces::Value,
};

/// Opens a client of the event endpoint, as a WebSocket or an event stream.
///
/// # Errors
/// 400, 401, 403, 405, 426, 429, 500, 503, 504.
pub async fn open(
    events: &Arc<Events>,
    core: &Arc<Core>,
    mut request: Request<Incoming>,
) -> Result<Response<Body>, Rejection> {
    let opening = Opening::begin(core, &mut request, Family::Events, &events.profile)?;
    let resume = opening.resume(&request)?;
    let token =
        credentials::find(request.headers(), request.uri().query(), &["token"], Protocols::COMMON)?;
    // Free the headers: the token's issuer and the store may take their time.
    drop(request);
    let entered =
        handshake::deadline(core, enter((events, core), opening, &token, &resume)).await?;
    let Entered { claims, client, entry, subscribed } = entered;
    debug!(user_id = %claims.user, connection_id = %client.id(), "Authenticated and subscribed.");
    let caller = Arc::clone(client.caller());
    let (id, transport) = (client.id(), client.transport());
    let events = Arc::clone(events);
    let checks = TokenChecks::new(&events, entry);
    let logic = EventLogic::new(events, claims.user, id, transport, claims.expires_at, caller);
    Ok(client.accept(core, Some(subscribed), logic, checks))
}

/// A client that has passed all checks.
struct Entered {
    claims: Claims,
    client: Admitted,
    entry: Option<Membership>,
    subscribed: Subscribed,
}

/// Checks the token, registers the connection, subscribes the client and replays what it missed: in this order.
async fn enter(
    (events, core): (&Events, &Arc<Core>),
    opening: Opening,
    token: &SecretString,
    resume: &ResumeRequest,
) -> Result<Entered, Rejection> {
    let trace = opening.trace().clone();
    trace.enter("authenticate");
    let claims = authenticate(events, token).await?;
    trace.add("wsproxy.user_id", || Value::text(claims.user.as_str()));
    let user = claims.user.clone();
    let entered = enter_as((events, core), opening, claims, resume).await;
    entered.map_err(|rejection| rejection.of_user(&user))
}

/// As [`enter`], for a client whose token is verified.
async fn enter_as(
    (events, core): (&Events, &Arc<Core>),
    opening: Opening,
    claims: Claims,
    resume: &ResumeRequest,
) -> Result<Entered, Rejection> {
    let trace = opening.trace().clone();
    let client = opening.admit(core)?;
    trace.enter("register");
    // Register first: a revocation after the check below then finds the connection.
    let entry = join((events, core), &client, &claims)?;
    check_revoked(events, &claims).await?;
    trace.enter("subscribe");
    trace.add("wsproxy.resumes", || resume.after.is_some().into());
    let hello = hello(core, client.id(), &claims);
    let (topics, histories) = (topics(core, &client, &claims.user), events.histories.as_ref());
    let subscribed = resume::subscribe(core, histories, topics, resume, hello).await?;
    Ok(Entered { claims, client, entry, subscribed })
}

/// Puts the connection into the registry.
///
/// # Errors
/// 429: the user has reached the maximum of connections.
fn join(
    (events, core): (&Events, &Core),
    client: &Admitted,
    claims: &Claims,
) -> Result<Option<Membership>, Rejection> {
    let Some(registry) = &events.registry else { return Ok(None) };
    let caller = client.caller();
    let joining = Joining {
        connection: client.id(),
        user: claims.user.clone(),
        client: client.client().clone(),
        token: claims.jti.clone(),
        issued_at: claims.issued_at,
        address: caller.address,
        user_agent: caller.user_agent.as_deref().map(ToOwned::to_owned),
        transport: client.transport(),
    };
    let entry = match core.config.limits.connections_per_user {
        0 => Some(registry.join(joining)),
        most => registry.join_within(joining, most),
    };
    entry.map(Some).ok_or_else(|| {
        Rejection::too_many_connections("The user has as many connections as one may.")
    })
}

/// Makes the first message.
fn hello(
    core: &Arc<Core>,
    connection: Uuid,
    claims: &Claims,
) -> impl FnOnce(ResumeOutcome, Option<Position>) -> Option<String> + use<> {
    let (owner, user, expires_at) = (Arc::clone(core), claims.user.clone(), claims.expires_at);
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

/// Returns the client's topics: of all clients, of its user and of its connection.
fn topics(core: &Core, client: &Admitted, user: &Id) -> ClientTopics {
    let form = Form { frames: DownFrames::Auto, ids: client.ids(EventIds::Json), acks: true };
    let names = &core.names;
    let topics = [
        names.events_broadcast(),
        names.events_user(user),
        names.events_connection(&client.id().to_string()),
    ];
    ClientTopics {
        sink: client.client_sink(form, core.config.events.on_bus_loss),
        names: topics.into_iter().map(Into::into).collect(),
        reserved: None,
        streams_of: None,
        counted_as: names.events_user(user),
    }
}

/// Verifies a token and returns its claims.
///
/// # Errors
/// 401: the token is malformed. 403: it is not valid. 503: the issuer's keys cannot be fetched.
pub(super) async fn authenticate(
    events: &Events,
    token: &SecretString,
) -> Result<Claims, Rejection> {
    let verifier = events.jwt.as_ref();
    let verifier = verifier.ok_or_else(|| Rejection::internal("No token can be verified here."))?;
    let now = time::since_epoch().as_secs();
    let claims = verifier.verify(token.expose_secret(), now).await;
    claims.map_err(|error| {
        let rejection = Rejection::from(error).because(error.label());
        match verifier.named_user(token.expose_secret()) {
            Some(user) => rejection.of_user(&user),
            None => rejection,
        }
    })
}

/// Checks that a token was not revoked.
///
/// # Errors
/// 403: the token was revoked. 503: the store does not answer.
pub(super) async fn check_revoked(events: &Events, claims: &Claims) -> Result<(), Rejection> {
    let Some(registry) = &events.registry else { return Ok(()) };
    match registry.is_revoked(&claims.user, claims.jti.as_deref(), claims.issued_at).await? {
        true => Err(Rejection::invalid_token("The token was revoked.")),
        false => Ok(()),
    }
}

/// Returns the registry of connections.
///
/// # Errors
/// 404: this instance does not serve events.
pub(super) fn registry_of<'e>(
    events: &'e Events,
    core: &Core,
) -> Result<&'e Arc<Registry>, Rejection> {
    events.registry.as_ref().ok_or_else(|| {
        if let Some(left_out) = core.lines.pass("events are off") {
            info!(left_out, "A call of the API needs events, which this instance does not serve.");
        }
        Rejection::not_found("This instance serves no events: endpoints.events is off.")
    })
}
