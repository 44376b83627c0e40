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

#[cfg(test)]
mod tests {
    use std::sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    };

    use tracing::{Event, Level, Subscriber};
    use tracing_subscriber::layer::{Context, Layer, SubscriberExt};

    use super::*;

    /// Counts the warnings of this module.
    #[derive(Clone, Default)]
    struct Warnings(Arc<AtomicUsize>);

    impl<S: Subscriber> Layer<S> for Warnings {
        fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
            let metadata = event.metadata();
            let is_ours = module_path!().starts_with(metadata.target());
            self.0.fetch_add(usize::from(is_ours && *metadata.level() == Level::WARN), Relaxed);
        }
    }

    /// Returns the number of warnings at once, just before each of two intervals is over, and behind it, and an interval
    /// after the end.
    async fn warnings(config: &Config) -> [usize; 6] {
        let seen = Warnings::default();
        let subscriber = tracing_subscriber::registry().with(seen.clone());
        let _guard = tracing::subscriber::set_default(subscriber);
        let (background, end) = (TaskTracker::new(), CancellationToken::new());
        warn_of(config, &background, &end);
        let mut counts = [0; 6];
        let waits = [0, 599, 1, 599, 1];
        for (count, seconds) in counts.iter_mut().zip(waits) {
            tokio::time::sleep(Duration::from_secs(seconds)).await;
            tokio::task::yield_now().await;
            *count = seen.0.load(Relaxed);
        }
        end.cancel();
        background.close();
        background.wait().await;
        tokio::time::sleep(EVERY).await;
        counts[5] = seen.0.load(Relaxed);
        counts
    }

    #[tokio::test(start_paused = true)]
    async fn development_mode_is_warned_of_every_ten_minutes() {
        let mut config = Config::default();
        (config.endpoints.rooms, config.rooms.development) = (true, Development::Loopback);
        assert_eq!(warnings(&config).await, [1, 1, 2, 2, 3, 3]);
        config.server.local_hosts_only = true;
        assert_eq!(warnings(&config).await, [0; 6]);
        config.server.local_hosts_only = false;
        config.rooms.development = Development::Off;
        assert_eq!(warnings(&config).await, [0; 6]);
    }
}
