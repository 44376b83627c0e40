//! `wsproxy serve`: logs, a runtime, the server.

use std::time::Duration;

use anyhow::Context;

use crate::{
    config::{
        Config,
        load::{ConfigSources, Loaded, Origins, load},
    },
    server, telemetry,
};

/// Runs an instance until it has ended.
///
/// # Errors
/// The instance could not start, or could not end as it should; see [`super::exit::code`].
pub fn run(sources: ConfigSources) -> anyhow::Result<()> {
    let loaded = load(sources.clone())?;
    let threads = loaded.config.server.threads;
    run_with(loaded, threads, |config, origins| server::run(config, origins, sources))
}

/// Starts logs and a runtime, and runs `work` on it, which runs an instance until it has ended.
pub(super) fn run_with<F: Future<Output = anyhow::Result<()>>>(
    loaded: Loaded,
    threads: usize,
    work: impl FnOnce(Config, Origins) -> F,
) -> anyhow::Result<()> {
    let Loaded { config, ignored, warnings, origins } = loaded;
    let _logs = telemetry::log::start(&config.log)?;
    for warning in warnings {
        tracing::warn!(warning, "The configuration may not be what is meant.");
    }
    if !ignored.is_empty() {
        let names = ignored.join(", ");
        tracing::info!(names, "These variables are not read: no endpoint that is on needs them.");
    }
    let mut builder = tokio::runtime::Builder::new_multi_thread();
    builder.enable_all().thread_name("wsproxy");
    if threads > 0 {
        builder.worker_threads(threads);
    }
    let runtime = builder.build().context("cannot start the runtime")?;
    let result = runtime.block_on(work(config, origins));
    // The server has waited for all tasks that matter; the others are dropped.
    runtime.shutdown_timeout(LEFTOVER_GRACE);
    result
}

pub(super) const EXAMPLE: &str = "Example:
  REDIS_URL=redis://127.0.0.1:6379 wsproxy serve --port 8080 --metrics-port 9090

Every key of the configuration can be set in a file (--config) and in the environment; flags are for the \
most common ones: wsproxy config example, wsproxy config check.";

/// Time for work on blocking threads, such as name lookups, which cannot be cancelled.
const LEFTOVER_GRACE: Duration = Duration::from_millis(200);
