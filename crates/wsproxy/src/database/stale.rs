//! Rows of agents that say connected, although no sign of life came for long: found, and corrected. Knows no place.

use std::time::SystemTime;

use wsproxy_proto::names::Id;

use crate::database::{
    Database,
    error::DatabaseError,
    metrics::Operation,
    pool::{Access, Connection},
    sql::{Value, to_millis},
    statement::Statement,
};

impl Database {
    /// Returns at most `count` connected users behind `after` whose last sign of life is older than `before`. Ids that
    /// no gateway serves are left out.
    ///
    /// # Errors
    /// [`DatabaseError::Unavailable`] also while the tables were not looked at yet; [`DatabaseError::Refused`].
    pub async fn stale(
        &self,
        after: &str,
        before: SystemTime,
        count: u32,
    ) -> Result<Vec<Id>, DatabaseError> {
        self.schema().ok_or(DatabaseError::Unavailable)?;
        self.run(&ReadStale { after, before, count }).await
    }

    /// Writes that users are disconnected, unless a sign of life has come since `before`. Returns their number.
    ///
    /// # Errors
    /// [`DatabaseError`]
    pub async fn end_stale(&self, users: &[Id], before: SystemTime) -> Result<u64, DatabaseError> {
        self.run(&EndStale { users, before }).await
    }
}

struct ReadStale<'a> {
    after: &'a str,
    before: SystemTime,
    count: u32,
}

impl Statement for ReadStale<'_> {
    type Answer = Vec<Id>;
    const OPERATION: Operation = Operation::Status;
    const ACCESS: Access = Access::Read;

    async fn run(&self, connection: &mut Connection) -> Result<Vec<Id>, sqlx::Error> {
        let before = connection.dialect().utc("$2");
        let sql = format!(
            "SELECT CAST(user_id AS TEXT) FROM agent_credentials WHERE user_id > $1 \
             AND status = 'connected' AND (last_seen IS NULL OR last_seen < {before}) \
             ORDER BY user_id LIMIT {}",
            self.count
        );
        let before = Value::Number(Some(to_millis(self.before)));
        let rows = connection.fetch(sql, &[Value::Text(self.after), before]).await?;
        let user = |text: Option<String>| Id::parse(&text.unwrap_or_default()).ok();
        rows.iter().filter_map(|row| row.text(0).map(user).transpose()).collect()
    }
}

struct EndStale<'a> {
    users: &'a [Id],
    before: SystemTime,
}

impl Statement for EndStale<'_> {
    type Answer = u64;
    const OPERATION: Operation = Operation::Status;
    const ACCESS: Access = Access::Write;

    async fn run(&self, connection: &mut Connection) -> Result<u64, sqlx::Error> {
        let dialect = connection.dialect();
        let (users, before) = (dialect.texts("$1"), dialect.utc("$2"));
        let sql = format!(
            "UPDATE agent_credentials SET status = 'disconnected' WHERE user_id IN {users} \
             AND status = 'connected' AND (last_seen IS NULL OR last_seen < {before})"
        );
        let users: Vec<_> = self.users.iter().map(Id::as_str).collect();
        let users = serde_json::json!(users).to_string();
        let before = Value::Number(Some(to_millis(self.before)));
        connection.execute(sql, &[Value::Text(&users), before]).await
    }
}
