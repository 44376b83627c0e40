//! The handshake of a user's agent: its secret, then the place of its user.

use std::{net::IpAddr, sync::Arc, time::SystemTime};

use http::{Request, Response};
use hyper::body::Incoming;
use percent_encoding::percent_decode_str;
use secrecy::{ExposeSecret, SecretString};
use tracing::debug;
use wsproxy_conn::clock;
use wsproxy_proto::names::Id;

use crate::{
    core::Core,
    database::secrets::{Credential, SecretId},
    endpoint::agents::{
        Agents,
        inbox::AgentInbox,
        logic::AgentLogic,
        place::{self, Place},
    },
    http::{
        Body,
        handshake::{
            self, Admitted, Opening,
            credentials::{self, Protocols},
        },
        rejection::Rejection,
    },
    telemetry::family::Family,
    traces::Value,
};

/// Opens the connection of a user's agent.
///
/// # Errors
/// 400, 401, 403, 405, 409, 426, 429, 500, 503, 504.
pub async fn open(
    agents: &Arc<Agents>,
    core: &Arc<Core>,
    mut request: Request<Incoming>,
) -> Result<Response<Body>, Rejection> {
    let shared = (Family::Agents, &agents.profile);
    let opening = Opening::begin_websocket(core, &mut request, shared, Protocols::AGENTS)?;
    let asked = Asked::read(&request);
    let Asked { user, secret, is_v2 } =
        asked.inspect_err(|_| agents.counters.auth.malformed.add(1))?;
    let is_v2 = is_v2 || opening.is_agent_protocol();
    // Free the headers: the database may take its time.
    drop(request);
    let inbox = AgentInbox::new(Arc::clone(agents), user, opening.id());
    let opened = open_for(agents, core, opening, &inbox, secret, is_v2).await;
    opened.map_err(|refusal| refusal.of_user(&inbox.user))
}

/// Opens the connection of a user.
async fn open_for(
    agents: &Arc<Agents>,
    core: &Arc<Core>,
    opening: Opening,
    inbox: &Arc<AgentInbox>,
    secret: SecretString,
    is_v2: bool,
) -> Result<Response<Body>, Rejection> {
    let registered = agents.connections.add(inbox);
    let mut place = Place::new(Arc::clone(inbox), registered);
    let entering = enter(agents, core, opening, &mut place, secret);
    let client = handshake::deadline(core, entering).await?;
    place.check()?;
    debug!(user_id = %inbox.user, connection_id = %inbox.connection, "Authenticated; holds the place.");
    inbox.open(client.client().clone());
    let logic = AgentLogic::new(place, Arc::clone(client.caller()), is_v2);
    Ok(client.accept(core, None, logic, ()))
}

/// Judges the secret, and takes the place.
async fn enter(
    agents: &Agents,
    core: &Core,
    opening: Opening,
    place: &mut Place,
    secret: SecretString,
) -> Result<Admitted, Rejection> {
    let address = opening.caller().address;
    let trace = opening.trace().clone();
    trace.add("wsproxy.user_id", || Value::text(place.inbox.user.as_str()));
    trace.enter("authenticate");
    let opened_by = judge(agents, &place.inbox.user, address, &secret).await?;
    drop(secret);
    place.inbox.set_secret(opened_by);
    let client = opening.admit(core)?;
    trace.enter("take place");
    place.take(address).await?;
    Ok(client)
}

/// Judges a secret.
///
/// # Errors
/// 403, 429, 503.
async fn judge(
    agents: &Agents,
    user: &Id,
    address: Option<IpAddr>,
    secret: &SecretString,
) -> Result<SecretId, Rejection> {
    let counters = &agents.counters.auth;
    let pair = address.map(|address| (address, user));
    if let Some(wait) = pair.and_then(|pair| agents.failures.wait(pair, clock::now())) {
        counters.limited.add(1);
        return Err(Rejection::too_often(wait));
    }
    let unavailable = || Rejection::database_unavailable("Credentials cannot be checked now.");
    let database = agents.database.as_ref().ok_or_else(unavailable)?;
    let credential = database.credential(user).await.map_err(|error| {
        counters.unavailable.add(1);
        unavailable().because(error)
    })?;
    let presented = secret.expose_secret().as_bytes();
    let (now, legacy) = (SystemTime::now(), agents.config.legacy_secrets);
    match Credential::check(credential.as_ref(), presented, now, legacy) {
        Ok(opened_by) => {
            counters.accepted.add(1);
            Ok(opened_by)
        }
        Err(error) => {
            counters.refused.add(1);
            if let Some(pair) = pair {
                agents.failures.add(pair, clock::now());
            }
            Err(place::invalid().because(error))
        }
    }
}

/// Parts of a request that are the family's own.
struct Asked {
    user: Id,
    secret: SecretString,
    /// The agent knows more messages than the first version has.
    is_v2: bool,
}

impl Asked {
    /// Reads them.
    ///
    /// # Errors
    /// 401: one is missing, malformed or given twice.
    fn read(request: &Request<Incoming>) -> Result<Self, Rejection> {
        let query = request.uri().query().unwrap_or_default();
        let secret =
            credentials::find(request.headers(), Some(query), &["secret"], Protocols::AGENTS)?;
        let user = parameter(query, "userId")?
            .ok_or_else(|| Rejection::missing_credentials("userId is missing."))?;
        let user = Id::parse(&user)
            .map_err(|error| Rejection::malformed_credentials(format!("userId {error}.")))?;
        let is_v2 = parameter(query, "v")?.is_some_and(|version| version == "2");
        Ok(Self { user, secret, is_v2 })
    }
}

/// Returns a parameter of the query.
fn parameter(query: &str, name: &str) -> Result<Option<String>, Rejection> {
    let malformed =
        || Rejection::malformed_credentials(format!("{name} is malformed or given twice."));
    let pairs = query.split('&').map(|pair| pair.split_once('=').unwrap_or((pair, "")));
    let mut values = pairs.filter(|(key, _)| *key == name).map(|(_, value)| value);
    let Some(value) = values.next() else { return Ok(None) };
    if values.next().is_some() {
        return Err(malformed());
    }
    let value = percent_decode_str(value).decode_utf8().map_err(|_| malformed())?;
    Ok(Some(value.into_owned()))
}
