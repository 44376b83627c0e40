//! `wsproxy dev`: the gateway for somebody who tries it out.

use std::{
    net::{IpAddr, Ipv4Addr},
    time::Duration,
};

use super::{
    serve,
    settings::{Reads, Settings},
};
use crate::{
    config::{Config, NoReceiver, keys::Key},
    dev,
};

/// The keys of a gateway for somebody who tries it out.
pub(super) struct DevKeys;

impl Reads for DevKeys {
    /// Everything is on one port, so that the page reaches it.
    fn reads(key: &Key) -> bool {
        key.section != "admin"
    }

    fn defaults() -> Config {
        let mut defaults = Config::default();
        // Nothing here is protected, so other machines cannot reach it unless they are meant to.
        defaults.server.bind = IpAddr::V4(Ipv4Addr::LOCALHOST);
        // Who writes a first worker wants to see at once that it is not heard.
        defaults.sessions.no_receiver = NoReceiver::Error;
        // A first `npx wscat` downloads for a while.
        defaults.sessions.token_ttl = Duration::from_mins(10);
        // The page tells what goes on, and the address stays the last line of the terminal.
        defaults.log.level = "warn".into();
        defaults
    }
}

pub(super) fn run(settings: Settings<DevKeys>) -> anyhow::Result<()> {
    serve::run_with(settings.load()?, |config| {
        dev::run(config, |text| {
            // Who started it may have closed the terminal or the pipe.
            let _ = super::print(text);
        })
    })
}

pub(super) const EXAMPLE: &str = "Example:
  wsproxy dev --port 9000     # then open http://127.0.0.1:9000/";
