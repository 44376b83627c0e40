//! `wsproxy agent`: the cluster agent, with the keys of `[tunnel_agent]`.

use anyhow::Context;

use super::{
    exit::Failure,
    serve,
    settings::{CliSettings, Reads},
};
use crate::config::keys::Key;

/// The keys of the agent, and of its log.
pub(super) struct AgentKeys;

impl Reads for AgentKeys {
    const SKIPS_FILES: bool = true;

    fn reads(key: &Key) -> bool {
        matches!(key.section, "tunnel_agent" | "log")
    }
}

pub(super) fn run(settings: CliSettings<AgentKeys>) -> anyhow::Result<()> {
    let loaded = settings.load()?;
    let settings = loaded.config.tunnel_agent.settings();
    let config = settings.config();
    let config = config.map_err(|error| {
        let problem = anyhow::anyhow!("tunnel_agent.{error}");
        problem.context(Failure::Config)
    })?;
    serve::run_with(loaded, settings.threads, |_, _| async {
        let ended = wsproxy_agent::agent::run_until_signal(config).await;
        ended.context("cannot listen to signals").context(Failure::Os)
    })
}

pub(super) const EXAMPLE: &str = "Example:
  wsproxy agent --gateway wss://gateway.example --cluster c1 --token-file token --upstream http://127.0.0.1:9000

The token stands in a file, or in the variable WSPROXY_TUNNEL_AGENT__TOKEN. The program wsproxy-agent is the same without \
the gateway, and takes the same flags.";
