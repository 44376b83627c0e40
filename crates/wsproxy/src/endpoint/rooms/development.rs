//! Development mode of rooms: the warning that clients are believed without a token.

use std::time::Duration;

use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::warn;

use crate::config::{Config, rooms::Development};

/// Returns whether rooms are served and believe clients without a token.
#[must_use]
pub(super) fn is_on(config: &Config) -> bool {
    config.endpoints.rooms && config.rooms.development != Development::Off
}

/// Warns of development mode, at once and at intervals until `end`. `wsproxy dev` tells it by itself, in place of that.
pub(super) fn warn_of(config: &Config, background: &TaskTracker, end: &CancellationToken) {
    if !is_on(config) || config.server.local_hosts_only {
        return;
    }
    let (end, bind) = (end.clone(), config.server.bind);
    background.spawn(async move {
        let mut ticks = tokio::time::interval(EVERY);
        loop {
            tokio::select! {
                () = end.cancelled() => return,
                _ = ticks.tick() => warn!(
                    %bind,
                    "rooms.development is on: clients without a token are whoever they say they are."
                ),
            }
        }
    });
}

/// Interval of the warning.
const EVERY: Duration = Duration::from_secs(600);
