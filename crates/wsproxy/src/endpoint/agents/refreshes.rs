//! Keeps the places of connected agents: the wishes of many connections become one write to the store. Knows no
//! message.

use std::{sync::Arc, time::Duration};

use parking_lot::Mutex;
use tokio::{sync::Notify, time::sleep};
use tokio_util::sync::CancellationToken;
use tracing::debug;

use crate::{
    endpoint::agents::{
        inbox::AgentInbox,
        owner::{Claimed, Kept, Owners},
        place,
        presence::Presence,
    },
    store::command::StoreError,
};

/// Connections whose places are to be kept.
///
/// Invariant: each connection waits at most once, since it asks again only when its answer has come
/// ([`AgentInbox::begin_refresh`]).
#[derive(Default)]
pub(super) struct Refreshes {
    /// Guards the connections, and the generations with which they hold their places.
    waiting: Mutex<Vec<(Arc<AgentInbox>, u64)>>,
    wanted: Notify,
}

impl Refreshes {
    /// Asks to keep the place that a connection holds with `generation`. Nothing is done while an earlier such wish of
    /// the connection is not answered.
    pub(super) fn want(&self, inbox: &Arc<AgentInbox>, generation: u64) {
        if !inbox.begin_refresh() {
            return;
        }
        let was_empty = {
            let mut waiting = self.waiting.lock();
            waiting.push((Arc::clone(inbox), generation));
            waiting.len() == 1
        };
        if was_empty {
            self.wanted.notify_one();
        }
    }

    /// Keeps places until `end`.
    pub(super) async fn run(
        self: Arc<Self>,
        owners: Arc<Owners>,
        presence: Arc<Presence>,
        end: CancellationToken,
    ) {
        loop {
            tokio::select! {
                () = end.cancelled() => return,
                () = self.wanted.notified() => sleep(LINGER).await,
            }
            let waiting = std::mem::take(&mut *self.waiting.lock());
            for batch in waiting.chunks(BATCH) {
                keep(&owners, &presence, batch).await;
            }
        }
    }
}

async fn keep(owners: &Owners, presence: &Presence, batch: &[(Arc<AgentInbox>, u64)]) {
    let places: Vec<_> = batch
        .iter()
        .map(|(inbox, generation)| Kept {
            user: &inbox.user,
            connection: inbox.connection,
            generation: *generation,
        })
        .collect();
    let claimed = owners.keep(&places).await;
    for ((inbox, generation), claimed) in batch.iter().zip(claimed) {
        inbox.end_refresh();
        answer(inbox, *generation, claimed, presence);
    }
}

fn answer(
    inbox: &Arc<AgentInbox>,
    held: u64,
    claimed: Result<Claimed, StoreError>,
    presence: &Presence,
) {
    match claimed {
        // Nothing has changed, so that the connection needs no answer.
        Ok(Claimed::Held { generation, replaced: None, .. }) if generation == held => {
            if !inbox.if_open(|| presence.kept(&inbox.user)) {
                place::release_late(inbox, generation);
            }
        }
        Ok(Claimed::Held { generation, .. }) => {
            if !inbox.claimed(claimed) {
                place::release_late(inbox, generation);
            }
        }
        Ok(_) => drop(inbox.claimed(claimed)),
        Err(error) => {
            debug!(user_id = %inbox.user, connection_id = %inbox.connection, %error,
                "The place was not refreshed.");
        }
    }
}

/// Time that a wish waits for others. A place is kept for far longer.
const LINGER: Duration = Duration::from_millis(100);

/// Places that are kept with one write.
const BATCH: usize = 128;
