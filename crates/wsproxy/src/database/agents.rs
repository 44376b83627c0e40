//! Users and their secrets, as operators and applications change them. Closes no connection: callers tell that on the
//! bus.

use std::time::{Duration, SystemTime};

use secrecy::SecretString;
use uuid::Uuid;
use wsproxy_proto::names::Id;

use crate::database::{
    Database,
    error::{Cause, DatabaseError, SecretsError, is_passing},
    metrics::Operation,
    pool::{Access, Connection},
    secrets::is_marked,
    sql::{Dialect, Row, Value},
    statement::Statement,
};

/// A wish for a new secret.
#[derive(Debug, Clone)]
pub struct NewSecret {
    /// Platform of a user that is created; `None`: `linux`.
    pub platform: Option<Platform>,
    /// Time after which the secret expires; `None`: never.
    pub expires_in: Option<Duration>,
    /// The secret itself; `None`: a new one is made.
    pub secret: Option<SecretString>,
    /// Treatment of a user that does not exist, or does.
    pub user: UserRule,
    /// Treatment of the user's other secrets.
    pub others: Others,
}

/// Treatment of a user that does not exist, or does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UserRule {
    /// The user must be new.
    New,
    /// The user must exist.
    Known,
    /// Either.
    Any,
}

/// Treatment of the other secrets of a user.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Others {
    /// They stay as they are.
    Keep,
    /// They expire after this time, unless they do so before.
    Expire(Duration),
    /// They are revoked; so is a clear value of an application.
    Revoke,
}

/// Platform of an agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Platform {
    /// Linux.
    Linux,
    /// macOS.
    Darwin,
    /// Windows.
    Win32,
}

/// A secret that was stored. Its text is shown this once.
#[derive(Debug, Clone)]
pub struct Issued {
    /// Id of the secret.
    pub id: Uuid,
    /// The secret.
    pub secret: SecretString,
    /// Time of its expiry.
    pub expires_at: Option<SystemTime>,
    /// The user was created.
    pub created: bool,
    /// Other secrets were revoked, so that connections which they opened must be closed.
    pub revoked: bool,
}

/// The secrets of a user that were revoked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Revoked {
    /// Number of valid secrets that were revoked.
    pub secrets: u64,
    /// The clear value of an application was replaced by one that nothing opens.
    pub clear: bool,
}

/// A user, as shown to operators.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Agent {
    /// The user.
    pub user_id: String,
    /// Platform, as stored.
    pub platform: String,
    /// Status, as stored.
    pub status: String,
    /// Time of its creation.
    pub created_at: Option<SystemTime>,
    /// Time of the last sign of life.
    pub last_seen: Option<SystemTime>,
    /// An application keeps the secret in clear.
    pub is_clear: bool,
    /// Secrets that are valid or were, the newest first; `None` in a list.
    pub secrets: Option<Vec<SecretInfo>>,
}

/// A secret, without its digest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SecretInfo {
    /// Its id.
    pub id: Uuid,
    /// Time of its creation.
    pub created_at: Option<SystemTime>,
    /// Time of its expiry.
    pub expires_at: Option<SystemTime>,
    /// Time of its revocation.
    pub revoked_at: Option<SystemTime>,
}

impl Database {
    /// Returns a user with its secrets.
    ///
    /// # Errors
    /// [`SecretsError::UnknownUser`], [`SecretsError::Database`].
    pub async fn show(&self, user: &Id) -> Result<Agent, SecretsError> {
        let show = Show { user: user.as_str(), has_secrets: self.has_secrets() };
        let agent = self.attempts(&show).await.map_err(|error| failed(&error))?;
        agent.ok_or(SecretsError::UnknownUser)
    }

    /// Returns users behind `after`, in the database's order, at most `count`; their secrets are left out.
    ///
    /// # Errors
    /// [`SecretsError::Database`]
    pub async fn list(
        &self,
        after: &str,
        count: u32,
        connected: bool,
    ) -> Result<Vec<Agent>, SecretsError> {
        self.attempts(&List { after, count, connected }).await.map_err(|error| failed(&error))
    }

    /// Returns whether the table of secrets is there.
    pub(super) fn has_secrets(&self) -> bool {
        self.schema().is_some_and(|schema| schema.has_secrets)
    }

    /// Refuses where the table of secrets is absent.
    pub(super) fn needs_secrets(&self) -> Result<(), SecretsError> {
        match self.schema() {
            Some(schema) if schema.has_secrets => Ok(()),
            Some(_) => Err(SecretsError::NoTable(self.secrets_sql())),
            None => {
                Err(SecretsError::Database(DatabaseError::Unavailable, "it is not ready".into()))
            }
        }
    }
}

impl Platform {
    /// Returns the value of the column.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::Linux => "linux",
            Self::Darwin => "darwin",
            Self::Win32 => "win32",
        }
    }

    /// Reads the value of the column.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        [Self::Linux, Self::Darwin, Self::Win32].into_iter().find(|known| known.label() == text)
    }
}

struct Show<'a> {
    user: &'a str,
    has_secrets: bool,
}

impl Statement for Show<'_> {
    type Answer = Option<Agent>;
    const OPERATION: Operation = Operation::Secrets;
    const ACCESS: Access = Access::Read;

    async fn run(&self, connection: &mut Connection) -> Result<Option<Agent>, sqlx::Error> {
        let dialect = connection.dialect();
        let sql = format!("{} WHERE user_id = $1", select_agents(dialect));
        let rows = connection.fetch(sql, &[Value::Text(self.user)]).await?;
        let Some(row) = rows.first() else { return Ok(None) };
        let mut agent = agent(row)?;
        if !self.has_secrets {
            return Ok(Some(agent));
        }
        let mut secrets = Vec::new();
        let [created, end, revoked] =
            ["created_at", "expires_at", "revoked_at"].map(|column| dialect.millis(column));
        let sql = format!(
            "SELECT CAST(id AS TEXT), {created}, {end}, {revoked} FROM agent_secrets WHERE user_id = $1 \
             ORDER BY created_at DESC LIMIT {SHOWN_MAX}"
        );
        for row in connection.fetch(sql, &[Value::Text(self.user)]).await? {
            let id = row.text(0)?.and_then(|id| Uuid::parse_str(&id).ok()).unwrap_or_default();
            let (created_at, expires_at, revoked_at) = (row.time(1)?, row.time(2)?, row.time(3)?);
            secrets.push(SecretInfo { id, created_at, expires_at, revoked_at });
        }
        agent.secrets = Some(secrets);
        Ok(Some(agent))
    }
}

struct List<'a> {
    after: &'a str,
    count: u32,
    connected: bool,
}

impl Statement for List<'_> {
    type Answer = Vec<Agent>;
    const OPERATION: Operation = Operation::Secrets;
    const ACCESS: Access = Access::Read;

    async fn run(&self, connection: &mut Connection) -> Result<Vec<Agent>, sqlx::Error> {
        let only = if self.connected { "AND status = 'connected' " } else { "" };
        let select = select_agents(connection.dialect());
        let sql = format!("{select} WHERE user_id > $1 {only}ORDER BY user_id LIMIT $2");
        let values = [Value::Text(self.after), Value::Number(Some(self.count.into()))];
        connection.fetch(sql, &values).await?.iter().map(agent).collect()
    }
}

fn select_agents(dialect: Dialect) -> String {
    let [created, seen] = ["created_at", "last_seen"].map(|column| dialect.millis(column));
    format!(
        "SELECT CAST(user_id AS TEXT), CAST(platform AS TEXT), CAST(status AS TEXT), {created}, {seen}, \
         shared_secret FROM agent_credentials"
    )
}

fn agent(row: &Row) -> Result<Agent, sqlx::Error> {
    Ok(Agent {
        user_id: row.text(0)?.unwrap_or_default(),
        platform: row.text(1)?.unwrap_or_default(),
        status: row.text(2)?.unwrap_or_default(),
        created_at: row.time(3)?,
        last_seen: row.time(4)?,
        is_clear: row.text(5)?.is_some_and(|value| !is_marked(&value)),
        secrets: None,
    })
}

/// Returns the failure of a statement about secrets.
pub(super) fn failed(error: &sqlx::Error) -> SecretsError {
    let kind = match is_passing(error) {
        true => DatabaseError::Unavailable,
        false => DatabaseError::Refused,
    };
    SecretsError::Database(kind, Cause(error).to_string())
}

/// Most secrets of a user that are shown: the newest ones.
const SHOWN_MAX: usize = 100;
