//! `wsproxy dev`: the gateway for a person who tries it out.

use std::{
    net::{IpAddr, Ipv4Addr},
    time::Duration,
};

use super::{
    serve,
    settings::{CliSettings, Reads},
};
use crate::{
    config::{Config, NoReceiver, keys::Key},
    dev,
};

/// The configuration of a gateway for a person who tries it out.
pub(super) struct DevKeys;

impl Reads for DevKeys {
    /// Leaves out `[admin]`: everything is on one port, so that the page reaches it.
    fn reads(key: &Key) -> bool {
        !matches!(key.section, "admin" | "tunnel_agent")
    }

    fn defaults() -> Config {
        let mut defaults = Config::default();
        // Nothing is protected, so other machines reach it only if --bind is given.
        defaults.server.bind = IpAddr::V4(Ipv4Addr::LOCALHOST);
        // The author of a first worker wants to see at once that it does not receive messages.
        defaults.sessions.no_receiver = NoReceiver::Error;
        // The first `npx wscat` may download for minutes before it uses the token.
        defaults.sessions.token_ttl = Duration::from_mins(10);
        // The page shows the traffic; with fewer log lines the address stays the last line of the terminal.
        defaults.log.level = "warn".into();
        defaults
    }
}

pub(super) fn run(settings: CliSettings<DevKeys>) -> anyhow::Result<()> {
    let loaded = settings.load()?;
    let threads = loaded.config.server.threads;
    serve::run_with(loaded, threads, |config, _| {
        dev::run(config, |text| {
            // The terminal or the pipe may be closed already.
            let _ = super::print(text);
        })
    })
}

pub(super) const EXAMPLE: &str = "Example:
  wsproxy dev --port 9000     # then open http://127.0.0.1:9000/";
