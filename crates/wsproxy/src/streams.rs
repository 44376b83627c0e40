//! Ends token streams whose worker has died: nobody renewed their lease.

use std::{sync::Arc, time::Duration};

use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info};

use crate::{
    gateway::Gateway,
    store::{StoreError, StreamCommand, StreamOp},
};

/// How often they are looked for.
const EVERY: Duration = Duration::from_secs(2);

/// So many are ended at a time.
const BATCH: usize = 100;

/// Looks for them until `end`. Every instance does; the store lets one of them end a stream.
pub async fn reap(gateway: Arc<Gateway>, end: CancellationToken) {
    let mut ticks = tokio::time::interval(EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = end.cancelled() => return,
            _ = ticks.tick() => {}
        }
        let round = tokio::select! {
            round = reap_some(&gateway) => round,
            () = end.cancelled() => return,
        };
        if let Err(error) = round {
            debug!(%error, "Token streams cannot be looked after now.");
        }
    }
}

async fn reap_some(gateway: &Gateway) -> Result<(), StoreError> {
    for (session, stream) in gateway.store.lapsed_streams(BATCH).await? {
        let limits = gateway.config.history.limits();
        let command = StreamCommand { session, stream, op: StreamOp::Lost, limits };
        let (session, stream) = (command.session.clone(), command.stream.clone());
        match gateway.store.stream(command).await {
            Ok(_) => {
                gateway.metrics.error("stream_worker_lost");
                info!(session_id = %session, stream = %stream, "A token stream's worker is gone; the stream is ended.");
            }
            // Its worker came back.
            Err(StoreError::Refused(why)) if why.starts_with("ALIVE") => {}
            // Another instance was faster, or what it belongs to is no stream.
            Err(StoreError::Refused(why))
                if why.starts_with("NOSTREAM") || why.starts_with("ENDED") =>
            {
                debug!(session_id = %session, stream = %stream, why, "A lease has no stream.");
                gateway.store.forget_lease(&session, &stream).await?;
            }
            // This one stays, and must not keep the others from their end.
            Err(error @ (StoreError::Refused(_) | StoreError::NotDone { .. })) => {
                debug!(session_id = %session, stream = %stream, %error, "A token stream cannot be ended now.");
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
