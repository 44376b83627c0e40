//! `wsproxy config check|show|example`.

use clap::Subcommand;

use super::settings::Settings;
use crate::config::render;

/// The subcommands.
#[derive(Subcommand)]
pub(super) enum ConfigCommand {
    /// Report every problem; exits with 78 if there is one.
    Check(Settings),
    /// Print the values in effect and where each came from; secrets are hidden.
    Show(Settings),
    /// Print a file with every key and its default.
    Example,
}

pub(super) fn run(command: ConfigCommand) -> anyhow::Result<()> {
    match command {
        ConfigCommand::Check(settings) => {
            let loaded = settings.load()?;
            let ignored = loaded.ignored.join(", ");
            let note = if ignored.is_empty() { "" } else { " Not used by this version: " };
            super::print(&format!("The configuration has no problems.{note}{ignored}\n"))
        }
        ConfigCommand::Show(settings) => super::print(&render::show(&settings.load()?)),
        ConfigCommand::Example => super::print(&render::example()),
    }
}
