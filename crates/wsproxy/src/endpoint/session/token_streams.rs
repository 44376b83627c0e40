//! The reaper of token streams: ends streams whose worker has died, so that their lease has run out.

use std::{sync::Arc, time::Duration};

use hashbrown::{HashMap, HashSet};
use tokio::time::{Instant, MissedTickBehavior};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};
use wsproxy_proto::names::Id;

use crate::{
    core::Core,
    store::{
        command::StoreError,
        token_streams::{StreamCommand, StreamError, StreamOp},
    },
};

/// Looks for lapsed leases until `end`. Every instance runs this, and the store lets one of them end a stream.
pub async fn reap(core: Arc<Core>, end: CancellationToken) {
    let mut ticks = tokio::time::interval(EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut pauses = Pauses::default();
    loop {
        tokio::select! {
            () = end.cancelled() => return,
            _ = ticks.tick() => {}
        }
        let round = tokio::select! {
            round = reap_some(&core, &mut pauses) => round,
            () = end.cancelled() => return,
        };
        if let Err(error) = round {
            debug!(%error, "Token streams cannot be looked after now.");
        }
    }
}

async fn reap_some(core: &Core, pauses: &mut Pauses) -> Result<(), StoreError> {
    let lapsed = core.store.lapsed_streams(LOOK_MAX).await?;
    let (mut refused, mut why) = (0, String::new());
    for (session, stream) in pauses.due(lapsed, Instant::now()) {
        match end_stream(core, &session, &stream).await {
            Ok(()) => pauses.forget(&(session, stream)),
            // The store itself is away, so the other streams cannot be ended either.
            Err(StreamError::Store(error @ (StoreError::Lost(_) | StoreError::Closed))) => {
                return Err(error);
            }
            Err(error) => {
                (refused, why) = (refused + 1, error.to_string());
                pauses.refused((session, stream), Instant::now());
            }
        }
    }
    if refused > 0 {
        core.metrics.error("stream_end_refused");
        warn!(
            streams = refused,
            error = why,
            "Token streams cannot be ended now; they are tried again."
        );
    }
    Ok(())
}

/// Ends a stream if its worker is gone.
///
/// # Errors
/// [`StreamError::Store`] and others: the stream may still be open.
async fn end_stream(core: &Core, session: &Id, stream: &Id) -> Result<(), StreamError> {
    let command = StreamCommand {
        session: session.clone(),
        stream: stream.clone(),
        op: StreamOp::Lost,
        limits: core.config.history.limits(),
    };
    let ended = core.store.stream(command).await;
    match &ended {
        Ok(_) => {
            core.metrics.error("stream_worker_lost");
            // A worker that has died may leave thousands of streams.
            if let Some(left_out) = core.lines.pass("stream worker gone") {
                info!(session_id = %session, stream = %stream, left_out,
                    "A token stream's worker is gone; the stream is ended.");
            }
            Ok(())
        }
        // The worker has renewed the lease.
        Err(StreamError::LeaseRuns) => Ok(()),
        // Another instance was faster, or the stream has expired. After these two errors no client waits for an
        // end. After others, such as a full Redis or missing replicas, clients still wait.
        Err(why @ (StreamError::NotFound | StreamError::Ended(_))) => {
            debug!(session_id = %session, stream = %stream, %why, "A lease has no open stream.");
            core.store.forget_lease(session, stream).await.map_err(Into::into)
        }
        Err(_) => ended.map(drop),
    }
}

/// Streams that could not be ended, with the time of the next try.
///
/// Invariant: holds only streams of the latest round, so at most [`LOOK_MAX`].
#[derive(Default)]
struct Pauses(HashMap<(Id, Id), Pause>);

struct Pause {
    until: Instant,
    length: Duration,
}

impl Pauses {
    /// Returns at most [`BATCH`] streams for this round. Streams that were never tried come first, so that
    /// streams which cannot be ended do not hold them up.
    fn due(&mut self, lapsed: Vec<(Id, Id)>, now: Instant) -> Vec<(Id, Id)> {
        {
            let known: HashSet<&(Id, Id)> = lapsed.iter().collect();
            self.0.retain(|stream, _| known.contains(stream));
        }
        let (fresh, tried): (Vec<_>, Vec<_>) =
            lapsed.into_iter().partition(|stream| !self.0.contains_key(stream));
        let mut tried: Vec<_> = tried
            .into_iter()
            .filter_map(|stream| Some((self.0.get(&stream)?.until, stream)))
            .filter(|(until, _)| *until <= now)
            .collect();
        // The streams that wait longest come first, so that each has its turn.
        tried.sort_by_key(|(until, _)| *until);
        let tried = tried.into_iter().map(|(_, stream)| stream);
        fresh.into_iter().chain(tried).take(BATCH).collect()
    }

    fn refused(&mut self, stream: (Id, Id), now: Instant) {
        let pause = self.0.entry(stream).or_insert(Pause { until: now, length: EVERY });
        pause.until = now + pause.length;
        pause.length = (pause.length * 2).min(PAUSE_MAX);
    }

    fn forget(&mut self, stream: &(Id, Id)) {
        self.0.remove(stream);
    }
}

/// Interval between rounds, and the first pause after a stream could not be ended.
const EVERY: Duration = Duration::from_secs(2);

/// Upper bound of the pause before a stream is tried again.
const PAUSE_MAX: Duration = Duration::from_secs(10);

/// Upper bound of the streams that one round ends.
const BATCH: usize = 100;

/// Upper bound of the lapsed leases that one round reads. Pauses are remembered for these only.
const LOOK_MAX: usize = 10_000;

#[cfg(test)]
mod tests {
    use super::*;

    fn streams(numbers: std::ops::Range<usize>) -> Vec<(Id, Id)> {
        let id = |text: &str| Id::parse(text).unwrap();
        numbers.map(|n| (id("s"), id(&format!("{n:05}")))).collect()
    }

    #[test]
    fn refused_streams_pause_and_starve_no_other() {
        let (mut pauses, start) = (Pauses::default(), Instant::now());
        let stuck = streams(0..5000);
        for round in 0..50 {
            let due = pauses.due(stuck.clone(), start);
            assert_eq!(due, stuck[round * BATCH..(round + 1) * BATCH]);
            due.into_iter().for_each(|stream| pauses.refused(stream, start));
        }
        // A stream that lapses now is older than none of them, and is still tried at once.
        let all = streams(0..5001);
        assert_eq!(pauses.due(all.clone(), start), all[5000..]);
        let later = pauses.due(all, start + EVERY);
        assert_eq!((later.len(), &later[0]), (BATCH, &streams(5000..5001)[0]));
    }

    #[test]
    fn pauses_grow_to_their_bound_and_end_with_the_lease() {
        let (mut pauses, mut now) = (Pauses::default(), Instant::now());
        for seconds in [2, 4, 8, 10, 10] {
            pauses.refused(streams(0..1)[0].clone(), now);
            now += Duration::from_secs(seconds) - Duration::from_millis(1);
            assert!(pauses.due(streams(0..1), now).is_empty());
            now += Duration::from_millis(1);
            assert_eq!(pauses.due(streams(0..1), now).len(), 1);
        }
        assert!(pauses.due(Vec::new(), now).is_empty());
        assert!(pauses.0.is_empty());
    }
}
