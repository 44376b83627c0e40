//! The composition root: starts what a configuration asks for and ends it again.

use crate::config::Config;

/// Runs an instance until it is told to end.
///
/// # Errors
/// Why it could not start, or did not end well.
#[expect(clippy::unused_async, reason = "the gateway will await its end here")]
pub async fn run(_config: Config) -> anyhow::Result<()> {
    anyhow::bail!("this build holds no server yet")
}
