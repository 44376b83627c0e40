//! Which secrets of open connections were revoked meanwhile. Knows no connection.

use std::collections::HashMap;

use uuid::Uuid;
use wsproxy_proto::names::Id;

use crate::database::{
    Database,
    error::DatabaseError,
    metrics::Operation,
    pool::{Access, Connection},
    secrets::SecretId,
    sql::Value,
    statement::Statement,
};

impl Database {
    /// Returns those users whose secret was revoked since it opened a connection, or who were removed. A secret that has
    /// only expired is not among them, nor is a clear value that its application has changed.
    ///
    /// # Errors
    /// [`DatabaseError::Unavailable`] also while the tables were not looked at yet; [`DatabaseError::Refused`].
    pub async fn revoked_since(
        &self,
        opened: &[(Id, SecretId)],
    ) -> Result<Vec<(Id, SecretId)>, DatabaseError> {
        let schema = self.schema().ok_or(DatabaseError::Unavailable)?;
        let mut revoked = Vec::new();
        for opened in opened.chunks(USERS_AT_ONCE) {
            let users = opened.iter().map(|(user, _)| user.as_str()).collect::<Vec<_>>();
            let read = ReadStandings { users, has_secrets: schema.has_secrets };
            let standings = self.run(&read).await?;
            let is_revoked = |(user, secret): &&(Id, SecretId)| {
                standings.get(user.as_str()).is_none_or(|standing| !standing.holds(*secret))
            };
            revoked.extend(opened.iter().filter(is_revoked).cloned());
        }
        Ok(revoked)
    }
}

/// Secrets of a user that were not revoked.
#[derive(Debug, Default)]
struct Standing {
    /// The application's value counts.
    is_clear: bool,
    secrets: Vec<Uuid>,
}

impl Standing {
    /// Returns whether a secret was not revoked.
    fn holds(&self, secret: SecretId) -> bool {
        match secret {
            SecretId::Stored(id) => self.secrets.contains(&id),
            // A clear value that became a hash is one of the stored secrets since then.
            SecretId::Clear => self.is_clear || !self.secrets.is_empty(),
        }
    }
}

struct ReadStandings<'a> {
    users: Vec<&'a str>,
    has_secrets: bool,
}

impl Statement for ReadStandings<'_> {
    type Answer = HashMap<String, Standing>;
    const OPERATION: Operation = Operation::Secrets;
    const ACCESS: Access = Access::Read;

    async fn run(&self, connection: &mut Connection) -> Result<Self::Answer, sqlx::Error> {
        let users = connection.dialect().texts("$1");
        let marked = "CAST(CASE WHEN c.shared_secret LIKE 'sha256$%' THEN 1 ELSE 0 END AS BIGINT)";
        let (secret, join) = match self.has_secrets {
            true => (
                "CAST(s.id AS TEXT)",
                "LEFT JOIN agent_secrets s ON s.user_id = c.user_id AND s.revoked_at IS NULL",
            ),
            false => ("NULL", ""),
        };
        let sql = format!(
            "SELECT CAST(c.user_id AS TEXT), {marked}, {secret} FROM agent_credentials c {join} \
             WHERE c.user_id IN {users}"
        );
        let users = serde_json::json!(self.users).to_string();
        let mut standings = Self::Answer::new();
        for row in connection.fetch(sql, &[Value::Text(&users)]).await? {
            let standing = standings.entry(row.text(0)?.unwrap_or_default()).or_default();
            standing.is_clear = row.number(1)? == Some(0);
            let secret = row.text(2)?.and_then(|id| Uuid::parse_str(&id).ok());
            standing.secrets.extend(secret);
        }
        Ok(standings)
    }
}

/// Users that are read at once.
const USERS_AT_ONCE: usize = 500;
