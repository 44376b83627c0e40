//! Corrects rows of the database that say connected where no connection holds the user's place: no instance was there
//! that could write the end of such an agent.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use futures_util::future::join_all;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info};

use crate::{
    database::{Database, error::DatabaseError},
    endpoint::agents::owner::Owners,
    store::command::StoreError,
};

/// The reason why rows were not looked at.
#[derive(Debug, thiserror::Error)]
enum NotChecked {
    #[error(transparent)]
    Database(#[from] DatabaseError),
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Looks at the rows when the database comes, and at intervals, until `end`.
pub(super) async fn run(database: Arc<Database>, owners: Arc<Owners>, end: CancellationToken) {
    let mut looks = database.looks();
    let mut pause = None;
    loop {
        tokio::select! {
            () = end.cancelled() => return,
            () = sleep(pause.unwrap_or_default()), if pause.is_some() => {}
            // The sender lives as long as the database.
            _ = looks.changed() => {}
        }
        pause = match correct(&database, &owners).await {
            Ok(0) => Some(EVERY),
            Ok(users) => {
                info!(users, "Agents without a connection are disconnected in the database too.");
                Some(EVERY)
            }
            Err(error) => {
                debug!(%error, "The status of agents cannot be checked now.");
                Some(RETRY)
            }
        };
    }
}

/// Looks at all rows. Returns the number of corrected ones.
async fn correct(database: &Database, owners: &Owners) -> Result<u64, NotChecked> {
    let before = SystemTime::now() - SILENCE;
    let (mut after, mut corrected) = (String::new(), 0);
    loop {
        let users = database.stale(&after, before, PAGE).await?;
        let Some(last) = users.last() else { return Ok(corrected) };
        last.as_str().clone_into(&mut after);
        let held = join_all(users.iter().map(|user| owners.is_held(user))).await;
        let mut gone = Vec::new();
        for (user, is_held) in users.into_iter().zip(held) {
            if !is_held? {
                gone.push(user);
            }
        }
        if !gone.is_empty() {
            // An agent that connects at this moment gives a sign of life, and its row stays.
            corrected += database.end_stale(&gone, before).await?;
        }
    }
}

/// Silence from which on a row is looked at: signs of life are written once a minute.
const SILENCE: Duration = Duration::from_secs(180);

/// Interval of the looks.
const EVERY: Duration = Duration::from_secs(300);

const RETRY: Duration = Duration::from_secs(5);

/// Rows that are read at once.
const PAGE: u32 = 200;
