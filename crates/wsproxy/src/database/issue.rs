//! Changes of users' secrets: issued, revoked, removed. Each is one transaction that locks the user's row.

use std::{
    sync::atomic::{AtomicBool, Ordering::Relaxed},
    time::SystemTime,
};

use uuid::Uuid;
use wsproxy_proto::names::Id;

use crate::database::{
    Database,
    agents::{Issued, NewSecret, Others, Platform, Revoked, UserRule, failed},
    error::{Cause, SecretsError, is_answer, reveal},
    metrics::Operation,
    pool::{Access, Connection},
    secrets::{Digest, SECRETS_MAX, is_marked, make_secret},
    sql::{Dialect, Value, to_millis},
    statement::Statement,
};

impl Database {
    /// Stores a new secret of a user.
    ///
    /// # Errors
    /// See [`SecretsError`]; not [`SecretsError::UnknownSecret`].
    pub async fn issue(&self, user: &Id, wish: NewSecret) -> Result<Issued, SecretsError> {
        self.needs_secrets()?;
        let secret = wish.secret.clone().unwrap_or_else(make_secret);
        let now = SystemTime::now();
        let expires_at = wish.expires_in.map(|time| now + time);
        let digest = Digest::new(reveal(&secret).as_bytes()).text();
        let id = Uuid::new_v4();
        let is_committing = AtomicBool::new(false);
        let user = user.as_str();
        let issue = Issue { user, wish: &wish, id, digest, now, expires_at, is_committing };
        let mut result = self.attempts(&issue).await;
        // Another command created the user at the same instant.
        if result.as_ref().is_err_and(is_duplicate) {
            result = self.attempts(&issue).await;
        }
        let result = result.map_err(|error| match issue.is_committing.load(Relaxed) {
            true => SecretsError::InDoubt(Cause(&error).to_string()),
            false => failed(&error),
        });
        let (created, revoked) = result??;
        Ok(Issued { id, secret, expires_at, created, revoked })
    }

    /// Revokes a secret of a user; `None`: all. Then a clear value of an application opens nothing either.
    ///
    /// # Errors
    /// [`SecretsError::UnknownUser`], [`SecretsError::UnknownSecret`], [`SecretsError::NoTable`],
    /// [`SecretsError::Database`].
    pub async fn revoke(&self, user: &Id, secret: Option<Uuid>) -> Result<Revoked, SecretsError> {
        if secret.is_some() {
            self.needs_secrets()?;
        }
        let has_secrets = self.has_secrets();
        let revoke = Revoke { user: user.as_str(), secret, has_secrets };
        self.attempts(&revoke).await.map_err(|error| failed(&error))?
    }

    /// Removes a user with all secrets.
    ///
    /// # Errors
    /// [`SecretsError::UnknownUser`], [`SecretsError::Database`].
    pub async fn remove(&self, user: &Id) -> Result<(), SecretsError> {
        let remove = Remove { user: user.as_str(), has_secrets: self.has_secrets() };
        match self.attempts(&remove).await.map_err(|error| failed(&error))? {
            true => Ok(()),
            false => Err(SecretsError::UnknownUser),
        }
    }
}

/// Stores a secret. The answer is whether the user was created, and whether others were revoked.
struct Issue<'a> {
    user: &'a str,
    wish: &'a NewSecret,
    id: Uuid,
    digest: String,
    now: SystemTime,
    expires_at: Option<SystemTime>,
    /// The database was told to commit, and has not said what became of that.
    is_committing: AtomicBool,
}

impl Statement for Issue<'_> {
    type Answer = Result<(bool, bool), SecretsError>;
    const OPERATION: Operation = Operation::Secrets;
    const ACCESS: Access = Access::Write;

    async fn run(&self, connection: &mut Connection) -> Result<Self::Answer, sqlx::Error> {
        connection.begin().await?;
        let result = self.write(connection).await;
        if matches!(result, Ok(Ok(_))) {
            self.is_committing.store(true, Relaxed);
        }
        let ended = finish(connection, result).await;
        if ended.as_ref().err().is_none_or(is_answer) {
            self.is_committing.store(false, Relaxed);
        }
        ended
    }
}

impl Issue<'_> {
    async fn write(
        &self,
        connection: &mut Connection,
    ) -> Result<<Self as Statement>::Answer, sqlx::Error> {
        let id = self.id.to_string();
        let known = "SELECT 1 FROM agent_secrets WHERE CAST(id AS TEXT) = $1 AND user_id = $2";
        if !connection.fetch(known, &[Value::Text(&id), Value::Text(self.user)]).await?.is_empty() {
            // The connection broke behind the commit of the first attempt.
            return Ok(Ok((false, self.wish.others == Others::Revoke)));
        }
        let stored = lock_user(connection, self.user).await?;
        let now = to_millis(self.now);
        match (&stored, self.wish.user) {
            (None, UserRule::Known) => return Ok(Err(SecretsError::UnknownUser)),
            (Some(_), UserRule::New) => return Ok(Err(SecretsError::Exists)),
            (None, _) => self.create_user(connection, now).await?,
            (Some(_), _) => {}
        }
        let is_clear = stored.as_ref().is_some_and(|value| !is_marked(value));
        if is_clear && self.wish.others != Others::Revoke {
            return Ok(Err(SecretsError::Clear));
        }
        let revoked = self.treat_others(connection, now).await?;
        if count_valid(connection, self.user, now).await? >= SECRETS_MAX as i64 {
            return Ok(Err(SecretsError::TooMany));
        }
        insert_secret(connection, (&id, self.user, &self.digest), now, self.expires_at).await?;
        if stored.is_some() {
            set_value(connection, self.user, &self.digest).await?;
        }
        Ok(Ok((stored.is_none(), is_clear || revoked)))
    }

    async fn create_user(&self, connection: &mut Connection, now: i64) -> Result<(), sqlx::Error> {
        let created_at = connection.dialect().utc("$4");
        let platform = self.wish.platform.unwrap_or(Platform::Linux).label();
        let sql = format!(
            "INSERT INTO agent_credentials (user_id, shared_secret, platform, status, created_at) \
             VALUES ($1, $2, $3, 'pending', {created_at})"
        );
        let texts = [self.user, &self.digest, platform].map(Value::Text);
        connection.execute(sql, &[&texts[..], &[Value::Number(Some(now))]].concat()).await.map(drop)
    }

    /// Returns whether secrets were revoked.
    async fn treat_others(
        &self,
        connection: &mut Connection,
        now: i64,
    ) -> Result<bool, sqlx::Error> {
        let overlap = match self.wish.others {
            Others::Keep => return Ok(false),
            Others::Revoke => return Ok(revoke_all(connection, self.user, now).await? > 0),
            Others::Expire(overlap) => i64::try_from(overlap.as_millis()).unwrap_or(i64::MAX),
        };
        let end = connection.dialect().time("$2");
        let sql = format!(
            "UPDATE agent_secrets SET expires_at = {end} WHERE user_id = $1 AND revoked_at IS NULL \
             AND (expires_at IS NULL OR expires_at > {end})"
        );
        let end = Value::Number(Some(now.saturating_add(overlap)));
        connection.execute(sql, &[Value::Text(self.user), end]).await?;
        Ok(false)
    }
}

struct Revoke<'a> {
    user: &'a str,
    secret: Option<Uuid>,
    has_secrets: bool,
}

impl Statement for Revoke<'_> {
    type Answer = Result<Revoked, SecretsError>;
    const OPERATION: Operation = Operation::Secrets;
    const ACCESS: Access = Access::Write;

    async fn run(&self, connection: &mut Connection) -> Result<Self::Answer, sqlx::Error> {
        connection.begin().await?;
        let result = self.write(connection).await;
        finish(connection, result).await
    }
}

impl Revoke<'_> {
    async fn write(
        &self,
        connection: &mut Connection,
    ) -> Result<<Self as Statement>::Answer, sqlx::Error> {
        let Some(value) = lock_user(connection, self.user).await? else {
            return Ok(Err(SecretsError::UnknownUser));
        };
        let now = to_millis(SystemTime::now());
        let Some(secret) = self.secret else {
            let clear = !is_marked(&value);
            if clear {
                // A hash of a secret that exists nowhere: the column may not be empty, and must be unique.
                let nothing = Digest::new(reveal(&make_secret()).as_bytes()).text();
                set_value(connection, self.user, &nothing).await?;
            }
            let secrets = match self.has_secrets {
                true => revoke_all(connection, self.user, now).await?,
                false => 0,
            };
            return Ok(Ok(Revoked { secrets, clear }));
        };
        let time = connection.dialect().time("$3");
        let sql = format!(
            "UPDATE agent_secrets SET revoked_at = {time} WHERE CAST(id AS TEXT) = $1 AND user_id = $2 \
             AND revoked_at IS NULL AND (expires_at IS NULL OR expires_at > {time})"
        );
        let id = secret.to_string();
        let values = [Value::Text(&id), Value::Text(self.user), Value::Number(Some(now))];
        match connection.execute(sql, &values).await? {
            0 => {
                // A secret that opens nothing any more may have opened a connection that stays: it is told all the same.
                let known =
                    "SELECT 1 FROM agent_secrets WHERE CAST(id AS TEXT) = $1 AND user_id = $2";
                match connection.fetch(known, &values[..2]).await?.is_empty() {
                    true => Ok(Err(SecretsError::UnknownSecret)),
                    false => Ok(Ok(Revoked { secrets: 0, clear: false })),
                }
            }
            secrets => Ok(Ok(Revoked { secrets, clear: false })),
        }
    }
}

struct Remove<'a> {
    user: &'a str,
    has_secrets: bool,
}

impl Statement for Remove<'_> {
    type Answer = bool;
    const OPERATION: Operation = Operation::Secrets;
    const ACCESS: Access = Access::Write;

    async fn run(&self, connection: &mut Connection) -> Result<bool, sqlx::Error> {
        connection.begin().await?;
        let result = self.write(connection).await;
        connection.end(result).await
    }
}

impl Remove<'_> {
    async fn write(&self, connection: &mut Connection) -> Result<bool, sqlx::Error> {
        let user = [Value::Text(self.user)];
        if self.has_secrets {
            connection.execute("DELETE FROM agent_secrets WHERE user_id = $1", &user).await?;
        }
        let sql = "DELETE FROM agent_credentials WHERE user_id = $1";
        connection.execute(sql, &user).await.map(|rows| rows > 0)
    }
}

/// Ends the transaction of a change; a refused change is undone.
async fn finish<T>(
    connection: &mut Connection,
    result: Result<Result<T, SecretsError>, sqlx::Error>,
) -> Result<Result<T, SecretsError>, sqlx::Error> {
    match result {
        Ok(Err(refused)) => {
            connection.script("ROLLBACK").await?;
            Ok(Err(refused))
        }
        result => connection.end(result).await,
    }
}

/// Locks the row of a user, and returns `shared_secret`; `None`: no such user.
async fn lock_user(connection: &mut Connection, user: &str) -> Result<Option<String>, sqlx::Error> {
    let lock = if connection.dialect() == Dialect::Postgres { " FOR UPDATE" } else { "" };
    let sql = format!("SELECT shared_secret FROM agent_credentials WHERE user_id = $1{lock}");
    let rows = connection.fetch(sql, &[Value::Text(user)]).await?;
    let value = rows.first().map(|row| row.text(0)).transpose()?;
    Ok(value.map(Option::unwrap_or_default))
}

/// Writes `shared_secret`.
async fn set_value(
    connection: &mut Connection,
    user: &str,
    value: &str,
) -> Result<(), sqlx::Error> {
    let sql = "UPDATE agent_credentials SET shared_secret = $2 WHERE user_id = $1";
    connection.execute(sql, &[user, value].map(Value::Text)).await.map(drop)
}

/// Writes a secret: its id, its user and its digest.
pub(super) async fn insert_secret(
    connection: &mut Connection,
    (id, user, digest): (&str, &str, &str),
    now: i64,
    expires_at: Option<SystemTime>,
) -> Result<(), sqlx::Error> {
    let dialect = connection.dialect();
    let (created_at, end) = (dialect.time("$4"), dialect.time("$5"));
    let uuid = if dialect == Dialect::Postgres { "$1::uuid" } else { "$1" };
    let sql = format!(
        "INSERT INTO agent_secrets (id, user_id, digest, created_at, expires_at) \
         VALUES ({uuid}, $2, $3, {created_at}, {end})"
    );
    let texts = [id, user, digest].map(Value::Text);
    let times = [Some(now), expires_at.map(to_millis)].map(Value::Number);
    connection.execute(sql, &[&texts[..], &times].concat()).await.map(drop)
}

/// Revokes the valid secrets of a user. Returns their number.
pub(super) async fn revoke_all(
    connection: &mut Connection,
    user: &str,
    now: i64,
) -> Result<u64, sqlx::Error> {
    let time = connection.dialect().time("$2");
    let sql = format!(
        "UPDATE agent_secrets SET revoked_at = {time} WHERE user_id = $1 AND revoked_at IS NULL \
         AND (expires_at IS NULL OR expires_at > {time})"
    );
    connection.execute(sql, &[Value::Text(user), Value::Number(Some(now))]).await
}

async fn count_valid(
    connection: &mut Connection,
    user: &str,
    now: i64,
) -> Result<i64, sqlx::Error> {
    let time = connection.dialect().time("$2");
    let sql = format!(
        "SELECT count(*) FROM agent_secrets WHERE user_id = $1 AND revoked_at IS NULL \
         AND (expires_at IS NULL OR expires_at > {time})"
    );
    let rows = connection.fetch(sql, &[Value::Text(user), Value::Number(Some(now))]).await?;
    rows.first().map_or(Ok(0), |row| row.number(0).map(Option::unwrap_or_default))
}

fn is_duplicate(error: &sqlx::Error) -> bool {
    error.as_database_error().is_some_and(|error| error.is_unique_violation())
}
