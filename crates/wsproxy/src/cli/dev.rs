//! `wsproxy dev`: the gateway for somebody who tries it out.

use std::net::{IpAddr, Ipv4Addr};

use super::{serve, settings::Settings};
use crate::config::Config;

pub(super) fn run(settings: Settings) -> anyhow::Result<()> {
    let mut defaults = Config::default();
    // Nothing here is protected, so other machines cannot reach it unless they are meant to.
    defaults.server.bind = IpAddr::V4(Ipv4Addr::LOCALHOST);
    serve::run(settings.load_over(defaults)?)
}
