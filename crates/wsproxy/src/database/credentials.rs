//! Reads the credential of a handshake: one statement, never from a cache.

use std::time::{Duration, SystemTime};

use uuid::Uuid;
use wsproxy_proto::names::Id;

use crate::database::{
    Database,
    error::DatabaseError,
    metrics::Operation,
    pool::{Access, Connection},
    secrets::{Credential, Digest, SECRETS_MAX, StoredSecret, is_marked},
    sql::{Row, Value, to_millis},
    statement::Statement,
};

impl Database {
    /// Returns the credential of a user; `None` if there is no such user.
    ///
    /// # Errors
    /// [`DatabaseError::Unavailable`] also while the tables were not looked at yet; [`DatabaseError::Refused`].
    pub async fn credential(&self, user: &Id) -> Result<Option<Credential>, DatabaseError> {
        let schema = self.schema().ok_or(DatabaseError::Unavailable)?;
        self.run(&ReadCredential { user, has_secrets: schema.has_secrets }).await
    }
}

struct ReadCredential<'a> {
    user: &'a Id,
    has_secrets: bool,
}

impl Statement for ReadCredential<'_> {
    type Answer = Option<Credential>;
    const OPERATION: Operation = Operation::Credential;
    const ACCESS: Access = Access::Read;
    // A handshake has five seconds, of which two are for a connection.
    const TIMEOUT: Duration = Duration::from_secs(2);

    async fn run(&self, connection: &mut Connection) -> Result<Self::Answer, sqlx::Error> {
        select(connection, self.user, self.has_secrets).await
    }
}

async fn select(
    connection: &mut Connection,
    user: &Id,
    has_secrets: bool,
) -> Result<Option<Credential>, sqlx::Error> {
    let user = Value::Text(user.as_str());
    if !has_secrets {
        let sql =
            "SELECT shared_secret, NULL, NULL, NULL FROM agent_credentials WHERE user_id = $1";
        let rows = connection.fetch(sql, &[user]).await?;
        return rows.first().map(|row| credential(row, &[])).transpose();
    }
    let dialect = connection.dialect();
    let (now, end) = (dialect.time("$2"), dialect.millis("s.expires_at"));
    let sql = format!(
        "SELECT c.shared_secret, CAST(s.id AS TEXT), s.digest, {end} FROM agent_credentials c \
         LEFT JOIN agent_secrets s ON s.user_id = c.user_id AND s.revoked_at IS NULL \
         AND (s.expires_at IS NULL OR s.expires_at > {now}) \
         WHERE c.user_id = $1 ORDER BY s.created_at DESC LIMIT {SECRETS_MAX}"
    );
    let now = Value::Number(Some(to_millis(SystemTime::now())));
    let rows = connection.fetch(sql, &[user, now]).await?;
    rows.first().map(|row| credential(row, &rows)).transpose()
}

fn credential(row: &Row, rows: &[Row]) -> Result<Credential, sqlx::Error> {
    // Without a value nothing opens: an application may have revoked it so.
    let value = row.text(0)?.unwrap_or_default();
    if !is_marked(&value) {
        return Ok(Credential { clear: Some(value.into()), secrets: Vec::new() });
    }
    let mut secrets = Vec::with_capacity(rows.len());
    for row in rows {
        let Some(id) = row.text(1)? else { continue };
        let digest = row.text(2)?.as_deref().and_then(Digest::parse);
        let id = Uuid::parse_str(&id).unwrap_or_default();
        secrets.push(StoredSecret { id, digest, expires_at: row.time(3)? });
    }
    Ok(Credential { clear: None, secrets })
}
