//! The handshake of a session's client: token, subscriptions, resume.

use std::sync::Arc;

use bytes::Bytes;
use http::{Request, Response};
use hyper::body::Incoming;
use secrecy::{ExposeSecret, SecretString};
use serde_json::json;
use tracing::debug;
use uuid::Uuid;
use wsproxy_proto::{history::Position, names::Id};

use crate::{
    auth::{self, session::WrongToken},
    core::Core,
    endpoint::session::{
        Sessions,
        logic::{COMMANDS, SessionLogic},
    },
    http::{
        Body,
        handshake::{
            self, Admitted, Opening,
            credentials::{self, Protocols},
            resume::{self, ClientTopics, ResumeRequest, Subscribed},
        },
        path,
        rejection::Rejection,
    },
    hub::{form::Form, replay::ResumeOutcome, sink::Sink, subscription::Subscription},
    registry::Transport,
    store::command::StoreError,
    telemetry::family::Family,
    traces::Value,
};

/// Opens a client of a session, as a WebSocket or an event stream.
///
/// # Errors
/// 400, 401, 403, 405, 426, 429, 500, 503, 504.
pub async fn open(
    sessions: &Arc<Sessions>,
    core: &Arc<Core>,
    mut request: Request<Incoming>,
    (agent, session): (&str, &str),
) -> Result<Response<Body>, Rejection> {
    let agent = path::parse_id("agent_id", agent)?;
    if agent.as_str() == "ws" && core.config.endpoints.rooms {
        // So `/ws/{room_id}/stats` has one meaning.
        return Err(Rejection::bad_id(
            "ws is the name of a path, and no agent_id, since rooms are served.",
        ));
    }
    let session = path::parse_id("session_id", session)?;
    let opening = Opening::begin(core, &mut request, Family::Sessions, &sessions.profile)?;
    let token =
        credentials::find(request.headers(), request.uri().query(), &["token"], Protocols::COMMON)?;
    let resume = opening.resume(&request)?;
    let trace = opening.trace().clone();
    trace.add("wsproxy.agent_id", || Value::text(agent.as_str()));
    trace.add("wsproxy.session_id", || Value::text(session.as_str()));
    // Free the headers: the store may take its time.
    drop(request);
    let entrance = Entrance { sessions, agent: &agent, session: &session, token };
    let (client, subscribed) = entrance.enter(core, opening, &resume).await?;
    debug!(session_id = %session, connection_id = %client.id(), "Authenticated and subscribed.");
    let caller = Arc::clone(client.caller());
    let (id, transport) = (client.id(), client.transport());
    let client_of = (agent, session);
    let logic =
        SessionLogic::new(Arc::clone(sessions), client_of, id, transport, caller, trace.handover());
    Ok(client.accept(core, Some(subscribed), logic, ()))
}

/// Path and token of a client's request for a session.
struct Entrance<'a> {
    sessions: &'a Sessions,
    agent: &'a Id,
    session: &'a Id,
    token: SecretString,
}

impl Entrance<'_> {
    /// Checks the token, subscribes the client, replays what it missed, and uses up the token: in this order.
    async fn enter(
        &self,
        core: &Core,
        opening: Opening,
        resume: &ResumeRequest,
    ) -> Result<(Admitted, Subscribed), Rejection> {
        let is_for_event_streams = auth::session::is_for_event_streams(self.token());
        if is_for_event_streams && opening.transport() != Transport::Sse {
            // Refuse before the store is asked, so that the answer does not depend on the token's value.
            let message = "A token that begins with sse. opens event streams only.";
            return Err(Rejection::invalid_token(message).because("an event stream's token"));
        }
        let key = core.names.session_auth(self.session);
        let trace = opening.trace().clone();
        trace.enter("authenticate");
        let entering = async {
            let stored = self.load_token(core, &key).await?;
            let client = opening.admit(core)?;
            trace.enter("subscribe");
            trace.add("wsproxy.resumes", || resume.after.is_some().into());
            let topics = self.topics(core, &client)?;
            let hello = hello(resume, client.id());
            let histories = self.sessions.histories.as_ref();
            let subscribed = resume::subscribe(core, histories, topics, resume, hello).await?;
            if is_for_event_streams {
                // Check again after the subscription: if a worker removes the token and then closes the session, the
                // client is either refused here or closed by the command.
                self.load_token(core, &key).await?;
            }
            Ok((stored, client, subscribed))
        };
        let (stored, client, subscribed) = handshake::deadline(core, entering).await?;
        trace.enter("consume token");
        // Use up the token last, so that a client whose handshake failed earlier can try again with it.
        if !is_for_event_streams && !consume(core, &key, &stored).await? {
            return Err(wrong_token(core, &key, WrongToken::Missing));
        }
        Ok((client, subscribed))
    }

    fn token(&self) -> &[u8] {
        self.token.expose_secret().as_bytes()
    }

    /// Loads the session's stored token and checks the client's token against it.
    ///
    /// # Errors
    /// 403: the token does not open the path. 500, 503: the store did not answer.
    async fn load_token(&self, core: &Core, key: &str) -> Result<Bytes, Rejection> {
        let stored = core.store.load(key).await?.unwrap_or_default();
        let checked = auth::session::check(&stored, self.token(), self.agent);
        checked.map_err(|cause| wrong_token(core, key, cause))?;
        Ok(stored)
    }

    fn topics(&self, core: &Core, client: &Admitted) -> Result<ClientTopics, Rejection> {
        let config = &self.sessions.config;
        let ids = client.ids(config.event_ids);
        let form = Form { frames: config.down_frames, ids, acks: false };
        let reserved = reserve(core, self.session, client.handler_sink(COMMANDS))?;
        Ok(ClientTopics {
            sink: client.client_sink(form, config.on_bus_loss),
            names: vec![core.names.session_down(self.session).into()],
            reserved: Some(reserved),
            streams_of: Some(self.session.clone()),
            counted_as: core.names.session_down(self.session),
        })
    }
}

/// Makes the first message, which only a client that asked for its position gets.
fn hello(
    resume: &ResumeRequest,
    connection: Uuid,
) -> impl FnOnce(ResumeOutcome, Option<Position>) -> Option<String> + use<> {
    let asked = resume.asked;
    move |outcome, position| {
        let position = position.filter(|_| asked && outcome == ResumeOutcome::Fresh)?.to_string();
        let hello = json!({ "type": "opened", "connection_id": connection, "event_id": position });
        Some(hello.to_string())
    }
}

/// Counts the client among the session's connections, by subscribing the client's handler to the session's commands.
///
/// # Errors
/// 429: the session has reached its maximum.
fn reserve(core: &Core, session: &Id, handler: Sink) -> Result<Subscription, Rejection> {
    let control = core.names.session_control(session).into();
    let most = match core.config.limits.connections_per_session {
        0 => usize::MAX,
        most => most,
    };
    core.hub.reserve(control, handler, most).ok_or_else(|| {
        Rejection::too_many_connections("The session has as many connections as it may.")
    })
}

/// Refuses a token: 403. Only the log names the cause. It also names the key and the Redis, since all tokens are
/// refused if a worker stores them in another Redis or with another prefix.
fn wrong_token(core: &Core, key: &str, cause: WrongToken) -> Rejection {
    let bus = core.bus.describe();
    Rejection::invalid_token("The token is wrong, expired, used or for another path.")
        .because(format!("{cause} (key {key}, {bus})"))
}

/// Uses up a token; `false` if another handshake was faster. The store compares and removes the token in one step, so
/// exactly one of several handshakes wins.
///
/// This is not bounded by the handshake's deadline: if the handshake were given up after the request was sent, the
/// token could be gone without a connection. `redis.response_timeout` bounds it.
///
/// # Errors
/// 500, 503: the token was not used up. 504: it may have been.
async fn consume(core: &Core, key: &str, stored: &[u8]) -> Result<bool, Rejection> {
    let answer = core.store.take_if_equal(key, stored);
    match tokio::time::timeout(core.config.redis.response_timeout, answer).await {
        Ok(taken) => taken.map_err(not_consumed),
        Err(_) => Err(Rejection::deadline("The store did not answer in time.")),
    }
}

/// Refuses a handshake because of an error of the store.
///
/// Invariant: after 503 the token is still valid, since proxies retry such a request at the next instance. If the token
/// may be used up, the status is 504.
fn not_consumed(error: StoreError) -> Rejection {
    match error {
        StoreError::Lost(cause) => {
            Rejection::deadline("The store was lost before it answered.").because(cause)
        }
        error => error.into(),
    }
}

#[cfg(test)]
mod tests {
    use http::StatusCode;

    use super::*;

    #[test]
    fn a_token_in_doubt_is_refused_with_504_not_503() {
        let lost = not_consumed(StoreError::Lost("cut".into()));
        assert_eq!((lost.status, lost.code), (StatusCode::GATEWAY_TIMEOUT, "deadline"));
        let kept = not_consumed(StoreError::Full);
        assert_eq!((kept.status, kept.code), (StatusCode::SERVICE_UNAVAILABLE, "not_done"));
    }
}
