//! Secrets of users over HTTP, for applications that give them out. Knows no connection.

use std::{ops::RangeInclusive, sync::Arc, time::Duration};

use axum::{
    Extension, Json,
    extract::{
        Query, State,
        rejection::{BytesRejection, QueryRejection},
    },
    response::{IntoResponse, Response},
};
use bytes::Bytes;
use http::{StatusCode, header};
use secrecy::ExposeSecret;
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::time::timeout;

use crate::{
    core::Core,
    database::{
        Database,
        agents::{NewSecret, Others, Platform, UserRule},
        error::{DatabaseError, SecretsError},
    },
    endpoint::agents::{
        Agents,
        api::directory::{order, presence_of},
        presence::control::Order,
    },
    http::{
        api::{PathId, Worker, optional_json},
        rejection::Rejection,
    },
};

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct SecretQuery {
    /// The older secrets are revoked.
    #[serde(default)]
    replace: bool,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct SecretRequest {
    expires_in: Option<u64>,
    platform: Option<String>,
}

/// Gives a user a new secret, and creates a user that is not there: 201.
pub(super) async fn add(
    _worker: Worker,
    State(core): State<Arc<Core>>,
    Extension(agents): Extension<Arc<Agents>>,
    PathId(user): PathId,
    query: Result<Query<SecretQuery>, QueryRejection>,
    body: Result<Bytes, BytesRejection>,
) -> Result<Response, Rejection> {
    let (database, presence) = (database_of(&agents)?, presence_of(&agents)?);
    let Query(SecretQuery { replace }) =
        query.map_err(|error| Rejection::bad_request(error.body_text()))?;
    let others = if replace { Others::Revoke } else { Others::Keep };
    let wish = wish(optional_json(body)?, others)?;
    // A repetition with `replace` revokes the secret that the first request may have stored.
    let issued = in_time(&core, replace, database.issue(&user, wish)).await?;
    let mut answer = json!({
        "user_id": user.as_str(),
        "secret_id": issued.id,
        "secret": issued.secret.expose_secret(),
        "created": issued.created,
        "expires_at": issued.expires_at.map(|at| humantime::format_rfc3339_seconds(at).to_string()),
    });
    if issued.revoked {
        // The secret is shown this once, so it is shown even if other instances do not hear of the others' end.
        let told = order(&core, presence, &Order::revoke(user, None)).await;
        answer["instances"] = told.map_or(Value::Null, |Json(told)| told["instances"].clone());
    }
    let headers = [(header::CACHE_CONTROL, "no-store")];
    Ok((StatusCode::CREATED, headers, Json(answer)).into_response())
}

/// Removes a user with all secrets, and ends the connection of the user's agent.
pub(super) async fn remove(
    _worker: Worker,
    State(core): State<Arc<Core>>,
    Extension(agents): Extension<Arc<Agents>>,
    PathId(user): PathId,
) -> Result<Json<Value>, Rejection> {
    let (database, presence) = (database_of(&agents)?, presence_of(&agents)?);
    let removed = in_time(&core, true, async {
        match database.remove(&user).await {
            Ok(()) => Ok(true),
            Err(SecretsError::UnknownUser) => Ok(false),
            Err(error) => Err(error),
        }
    });
    let removed = removed.await?;
    // Also where the user is gone already: the request may be the repetition of one that told no instance.
    let told = order(&core, presence, &Order::revoke(user.clone(), None)).await?;
    if removed { Ok(told) } else { Err(Rejection::not_found(format!("There is no user {user}."))) }
}

/// Reads the wish for a secret.
///
/// # Errors
/// 400: a member is out of range.
fn wish(request: SecretRequest, others: Others) -> Result<NewSecret, Rejection> {
    let SecretRequest { expires_in, platform } = request;
    if expires_in.is_some_and(|seconds| !EXPIRES_IN.contains(&seconds)) {
        let longest = EXPIRES_IN.end();
        return Err(Rejection::bad_request(format!("expires_in must be 1 to {longest} seconds.")));
    }
    let known = |text: String| {
        let wrong = || Rejection::bad_request("platform must be linux, darwin or win32.");
        Platform::parse(&text).ok_or_else(wrong)
    };
    Ok(NewSecret {
        platform: platform.map(known).transpose()?,
        expires_in: expires_in.map(Duration::from_secs),
        secret: None,
        user: UserRule::Any,
        others,
    })
}

/// Bounds the time of a change of secrets. `repeated`: a second request does no harm where the first may have been done.
///
/// # Errors
/// 503: the database is away. 504: the database is slow. 404, 409, 500: it refuses.
async fn in_time<T>(
    core: &Core,
    repeated: bool,
    work: impl Future<Output = Result<T, SecretsError>>,
) -> Result<T, Rejection> {
    match timeout(core.config.server.handshake_timeout, work).await {
        Ok(result) => result.map_err(|error| rejection(error, repeated)),
        Err(_) => {
            Err(Rejection::deadline("The database did not answer in time.").in_doubt(repeated))
        }
    }
}

fn rejection(error: SecretsError, repeated: bool) -> Rejection {
    let rejection = match &error {
        SecretsError::InDoubt(_) => {
            let message = "The database did not answer; the change may have been made.";
            Rejection::database_unavailable(message).in_doubt(repeated)
        }
        // The text has the SQL, which is for operators.
        SecretsError::NoTable(_) => {
            let message = "The table agent_secrets is absent: an operator runs `wsproxy migrate`.";
            Rejection { retryable: false, ..Rejection::database_unavailable(message) }
        }
        SecretsError::Database(DatabaseError::Unavailable, _) => {
            Rejection::database_unavailable("The database cannot be used now.")
        }
        SecretsError::Database(DatabaseError::Refused, _) => {
            Rejection::internal("The database refused.")
        }
        SecretsError::UnknownUser | SecretsError::UnknownSecret => {
            Rejection::not_found(error.to_string())
        }
        SecretsError::Exists | SecretsError::TooMany | SecretsError::Clear => {
            Rejection::conflict(error.to_string())
        }
    };
    rejection.because(error)
}

/// Returns the database.
///
/// # Errors
/// 404: this instance serves no agents.
fn database_of(agents: &Agents) -> Result<&Arc<Database>, Rejection> {
    agents.database.as_ref().ok_or_else(super::not_served)
}

/// Times to expiry in seconds, up to ten years.
const EXPIRES_IN: RangeInclusive<u64> = 1..=10 * 365 * 24 * 3600;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_absent_table_is_unavailable_without_its_sql() {
        let refusal = rejection(SecretsError::NoTable("CREATE TABLE x".into()), true);
        let (status, code) = (refusal.status, refusal.code);
        assert_eq!((status, code), (StatusCode::SERVICE_UNAVAILABLE, "database_unavailable"));
        assert!(!refusal.retryable && !refusal.body().to_string().contains("CREATE"));
    }

    #[test]
    fn a_secret_in_doubt_is_retryable_where_a_repetition_revokes_it() {
        let in_doubt = |repeated| rejection(SecretsError::InDoubt("lost".into()), repeated);
        assert!(!in_doubt(false).retryable && in_doubt(true).retryable);
        let away = SecretsError::Database(DatabaseError::Unavailable, "away".into());
        assert!(rejection(away, false).retryable);
    }
}
