//! `wsproxy dev`: the gateway for somebody who tries it out.

use std::{
    net::{IpAddr, Ipv4Addr},
    time::Duration,
};

use super::{serve, settings::Settings};
use crate::{
    config::{Config, NoReceiver},
    dev,
};

pub(super) fn run(settings: Settings) -> anyhow::Result<()> {
    let mut defaults = Config::default();
    // Nothing here is protected, so other machines cannot reach it unless they are meant to.
    defaults.server.bind = IpAddr::V4(Ipv4Addr::LOCALHOST);
    // Who writes a first worker wants to see at once that it is not heard.
    defaults.sessions.no_receiver = NoReceiver::Error;
    // A first `npx wscat` downloads for a while.
    defaults.sessions.token_ttl = Duration::from_mins(10);
    // The page tells what goes on, and the address stays the last line of the terminal.
    defaults.log.level = "warn".into();
    serve::run_with(settings.load_over(defaults)?, |config| {
        dev::run(config, |text| {
            // Who started it may have closed the terminal or the pipe.
            let _ = super::print(text);
        })
    })
}
