//! Replaces secrets in clear, which an application stored, by hashes: an operator's step, since the application can then
//! no longer read them.

use std::time::SystemTime;

use secrecy::SecretString;
use uuid::Uuid;

use crate::database::{
    Database,
    agents::failed,
    error::{SecretsError, reveal},
    issue::{insert_secret, revoke_all},
    metrics::Operation,
    pool::{Access, Connection},
    secrets::{Digest, SECRET_CHARACTERS_MIN},
    sql::{Value, to_millis},
    statement::Statement,
};

/// Result of an adoption.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Adopted {
    /// Users whose secret was replaced by its hash, or would be.
    pub adopted: Vec<String>,
    /// Users whose secret is too short for a fast hash, and stays as it is.
    pub too_short: Vec<String>,
    /// Users whose secret changed meanwhile, and stays as it is.
    pub changed: Vec<String>,
}

impl Database {
    /// Replaces all secrets in clear by their hashes; `dry_run`: only tells which.
    ///
    /// # Errors
    /// [`SecretsError::NoTable`], [`SecretsError::Database`]; then a part may be done, and another attempt does the rest.
    pub async fn adopt(&self, dry_run: bool) -> Result<Adopted, SecretsError> {
        self.needs_secrets()?;
        let (mut result, mut after) = (Adopted::default(), String::new());
        loop {
            let page = self.attempts(&ListClear { after: &after }).await;
            let page = page.map_err(|error| failed(&error))?;
            let Some((last, _)) = page.last() else { return Ok(result) };
            after.clone_from(last);
            for (user, clear) in page {
                if reveal(&clear).chars().count() < SECRET_CHARACTERS_MIN {
                    result.too_short.push(user);
                    continue;
                }
                let adopt = Adopt::new(&user, &clear);
                let is_done =
                    dry_run || self.attempts(&adopt).await.map_err(|error| failed(&error))?;
                let list = if is_done { &mut result.adopted } else { &mut result.changed };
                list.push(user);
            }
        }
    }
}

/// Users with a secret in clear, behind a user.
struct ListClear<'a> {
    after: &'a str,
}

impl Statement for ListClear<'_> {
    type Answer = Vec<(String, SecretString)>;
    const OPERATION: Operation = Operation::Secrets;
    const ACCESS: Access = Access::Read;

    async fn run(&self, connection: &mut Connection) -> Result<Self::Answer, sqlx::Error> {
        let sql = format!(
            "SELECT CAST(user_id AS TEXT), shared_secret FROM agent_credentials \
             WHERE user_id > $1 AND shared_secret NOT LIKE 'sha256$%' ORDER BY user_id LIMIT {PAGE}"
        );
        let rows = connection.fetch(sql, &[Value::Text(self.after)]).await?;
        let pair = |user: Option<String>, clear: Option<String>| {
            (user.unwrap_or_default(), clear.unwrap_or_default().into())
        };
        rows.iter().map(|row| Ok(pair(row.text(0)?, row.text(1)?))).collect()
    }
}

/// Replaces the secret of a user, unless it changed meanwhile. The answer is whether it was replaced.
struct Adopt<'a> {
    user: &'a str,
    clear: &'a str,
    id: String,
    digest: String,
}

impl<'a> Adopt<'a> {
    fn new(user: &'a str, clear: &'a SecretString) -> Self {
        let clear = reveal(clear);
        let digest = Digest::new(clear.as_bytes()).text();
        Self { user, clear, id: Uuid::new_v4().to_string(), digest }
    }

    async fn write(&self, connection: &mut Connection) -> Result<bool, sqlx::Error> {
        let sql = "UPDATE agent_credentials SET shared_secret = $3 WHERE user_id = $1 AND shared_secret = $2";
        let values = [self.user, self.clear, &self.digest].map(Value::Text);
        if connection.execute(sql, &values).await? == 0 {
            // The connection may have broken behind the commit of the first attempt.
            let own = "SELECT 1 FROM agent_credentials WHERE user_id = $1 AND shared_secret = $2";
            let values = [self.user, &self.digest].map(Value::Text);
            return Ok(!connection.fetch(own, &values).await?.is_empty());
        }
        let now = to_millis(SystemTime::now());
        // Secrets of a time before the application wrote its own: its value alone counted, and so it stays.
        revoke_all(connection, self.user, now).await?;
        let secret = (self.id.as_str(), self.user, self.digest.as_str());
        insert_secret(connection, secret, now, None).await?;
        Ok(true)
    }
}

impl Statement for Adopt<'_> {
    type Answer = bool;
    const OPERATION: Operation = Operation::Secrets;
    const ACCESS: Access = Access::Write;

    async fn run(&self, connection: &mut Connection) -> Result<bool, sqlx::Error> {
        connection.begin().await?;
        let result = self.write(connection).await;
        connection.end(result).await
    }
}

/// Users that are read at once.
const PAGE: usize = 200;
