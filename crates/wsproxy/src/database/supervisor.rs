//! The one background task of the database: makes the tables ready, writes statuses, and asks whether the database
//! answers.

use std::{
    sync::{Arc, atomic::Ordering::Relaxed},
    time::Duration,
};

use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use crate::{
    config::agents::LegacySecrets,
    database::{
        Database,
        error::DatabaseError,
        metrics::Operation,
        migrate::NotReady,
        pool::{Access, Connection},
        schema::Schema,
        sql::Value,
        statement::Statement,
        status::Batch,
    },
};

/// Rules of a start.
#[derive(Debug, Clone, Copy)]
pub(super) struct Rules {
    /// Absent tables are created.
    pub(super) migrate: bool,
    /// This instance is the only one, so that no agent is connected when it starts.
    pub(super) is_alone: bool,
    /// Treatment of secrets in clear.
    pub(super) legacy: LegacySecrets,
}

/// Runs until `end`, and then writes what waits.
pub(super) async fn run(database: Arc<Database>, rules: Rules, end: CancellationToken) {
    let mut supervisor = Supervisor { database: &database, rules, last_words: None };
    tokio::select! {
        () = end.cancelled() => {}
        () = supervisor.work() => {}
    }
    if timeout(FLUSH_TIMEOUT, database.flush(true)).await.is_err() {
        warn!("There was no time to write the status of all agents.");
    }
    let left = database.statuses.len() as u64;
    if left > 0 {
        database.counters.status_lost.add(left);
        warn!(users = left, "The status of agents was not written.");
    }
}

struct Supervisor<'a> {
    database: &'a Database,
    rules: Rules,
    /// The last reason that was logged, so that it is logged once.
    last_words: Option<NotReady>,
}

impl Supervisor<'_> {
    async fn work(&mut self) {
        self.make_ready().await;
        self.begin().await;
        let database = self.database;
        let (mut probed, mut seen) = (Instant::now(), Instant::now());
        let mut is_up = true;
        loop {
            tokio::select! {
                () = database.statuses.changed() => sleep(GATHER).await,
                () = sleep(PROBE_EVERY) => {}
            }
            let is_minute = seen.elapsed() >= SEEN_EVERY;
            if is_minute {
                seen = Instant::now();
            }
            let is_written = database.flush(is_minute).await;
            if is_written && !is_minute && probed.elapsed() < PROBE_EVERY {
                continue;
            }
            probed = Instant::now();
            let answers = database.run(&Probe).await.is_ok();
            if answers != is_up {
                self.tell(answers);
            }
            // A database that comes back may be another one.
            if answers && !is_up {
                self.make_ready().await;
            }
            let is_whole = |schema: &Schema| *schema == Schema::WHOLE;
            if answers && is_minute && !database.schema().as_deref().is_some_and(is_whole) {
                database.look_again().await;
            }
            is_up = answers;
        }
    }

    /// Looks at the tables until they can be used.
    async fn make_ready(&mut self) {
        let mut pause = PAUSE_MIN;
        loop {
            let why = match self.database.prepare(self.rules.migrate).await {
                Ok(schema) => {
                    self.database.schema.send_replace(Some(Arc::new(schema)));
                    if self.last_words.take().is_some() {
                        info!(database = self.database.pool.kind(), "The database is ready.");
                    }
                    return;
                }
                // The instance ends: nothing is to be told any more.
                Err(_) if self.database.pool.is_closed() => return std::future::pending().await,
                Err(why) => why,
            };
            if let NotReady::Unusable(_) = why {
                self.database.schema.send_replace(None);
            }
            if self.last_words.as_ref() != Some(&why) {
                match &why {
                    NotReady::Unavailable(cause) => {
                        warn!(
                            cause,
                            "The database is away: agents cannot connect until it answers."
                        );
                    }
                    NotReady::Unusable(cause) => {
                        error!(cause, "The database cannot be used: agents cannot connect.");
                    }
                }
                self.last_words = Some(why);
            }
            sleep(pause).await;
            pause = (pause * 2).min(PAUSE_MAX);
        }
    }

    /// Does what is done once at a start.
    async fn begin(&self) {
        if self.rules.is_alone
            && let Err(error) = self.database.run(&Disconnect).await
        {
            warn!(%error, "The status of agents cannot be set to disconnected.");
        }
        if self.rules.legacy == LegacySecrets::Accept
            && let Ok(rows @ 1..) = self.database.run(&CountClear).await
        {
            warn!(
                rows,
                "Secrets of agents lie in clear in agent_credentials.shared_secret: `wsproxy agents adopt` replaces \
                 them by hashes; agents.legacy_secrets = \"reject\" refuses them."
            );
        }
    }

    fn tell(&self, answers: bool) {
        let database = self.database.pool.kind();
        if answers {
            info!(database, "The database answers again.");
        } else {
            warn!(database, "The database is away: agents cannot connect; connected ones stay.");
        }
    }
}

impl Database {
    /// Writes the changes of status that wait; at a minute also the signs of life. Returns whether all is written.
    pub(super) async fn flush(&self, with_seen: bool) -> bool {
        loop {
            let mut taken = Taken { database: self, batch: self.statuses.take(with_seen) };
            if taken.batch.is_empty() {
                return true;
            }
            match self.run(&taken.batch).await {
                Ok(()) => taken.batch = Batch::default(),
                Err(DatabaseError::Unavailable) => return false,
                Err(DatabaseError::Refused) => {
                    self.counters.status_lost.add(std::mem::take(&mut taken.batch).len() as u64);
                }
            }
        }
    }

    /// Writes what waits, and closes all connections: the last act of an instance.
    pub async fn close(&self) {
        if timeout(FLUSH_TIMEOUT, async {
            self.flush(true).await;
            self.pool.close().await;
        })
        .await
        .is_err()
        {
            warn!("There was no time to close the database.");
        }
        self.answers.store(false, Relaxed);
    }
}

/// A batch that is being written. Dropped before that is done, the batch waits again.
struct Taken<'a> {
    database: &'a Database,
    batch: Batch,
}

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        let lost = self.database.statuses.put_back(std::mem::take(&mut self.batch));
        self.database.counters.status_lost.add(lost);
    }
}

struct Probe;

impl Statement for Probe {
    type Answer = ();
    const OPERATION: Operation = Operation::Probe;
    const ACCESS: Access = Access::Read;
    const TIMEOUT: Duration = Duration::from_secs(2);

    async fn run(&self, connection: &mut Connection) -> Result<(), sqlx::Error> {
        connection.fetch("SELECT 1", &[]).await.map(drop)
    }
}

/// Says of all agents that they are not connected.
struct Disconnect;

impl Statement for Disconnect {
    type Answer = ();
    const OPERATION: Operation = Operation::Status;
    const ACCESS: Access = Access::Write;

    async fn run(&self, connection: &mut Connection) -> Result<(), sqlx::Error> {
        let sql = "UPDATE agent_credentials SET status = $1 WHERE status = $2";
        let values = ["disconnected", "connected"].map(Value::Text);
        connection.execute(sql, &values).await.map(drop)
    }
}

/// Counts secrets in clear.
struct CountClear;

impl Statement for CountClear {
    type Answer = i64;
    const OPERATION: Operation = Operation::Secrets;
    const ACCESS: Access = Access::Read;

    async fn run(&self, connection: &mut Connection) -> Result<i64, sqlx::Error> {
        let sql = "SELECT count(*) FROM agent_credentials WHERE shared_secret NOT LIKE 'sha256$%'";
        let rows = connection.fetch(sql, &[]).await?;
        rows.first().map_or(Ok(0), |row| row.number(0).map(Option::unwrap_or_default))
    }
}

/// Time in which changes gather before they are written.
const GATHER: Duration = Duration::from_millis(100);

/// Interval at which signs of life are written.
const SEEN_EVERY: Duration = Duration::from_secs(60);

/// Interval of probes while nothing else proves that the database answers.
const PROBE_EVERY: Duration = Duration::from_secs(5);

const PAUSE_MIN: Duration = Duration::from_millis(250);
const PAUSE_MAX: Duration = Duration::from_secs(5);

/// Bound of the last writes.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(2);
