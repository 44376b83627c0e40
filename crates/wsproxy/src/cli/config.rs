//! `wsproxy config check|show|example`.

use std::process::ExitCode;

use clap::Subcommand;
use serde_json::json;

use super::{
    exit,
    settings::{CliSettings, Everything},
};
use crate::config::{
    load::Loaded,
    problem::{Problem, Problems},
    render,
};

/// The subcommands.
#[derive(Subcommand)]
pub(super) enum ConfigCommand {
    /// Report every problem; exits with 78 if there is one.
    #[command(after_help = CHECK_EXAMPLE)]
    Check {
        /// Print JSON: valid, problems (each with origin, key, value, message), warnings, ignored.
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        settings: CliSettings<Everything>,
    },
    /// Print the values in effect and the origin of each; secrets are hidden.
    #[command(after_help = SHOW_EXAMPLE)]
    Show(CliSettings<Everything>),
    /// Print a file with every key and its default.
    #[command(after_help = EXAMPLE_EXAMPLE)]
    Example,
}

pub(super) fn run(command: ConfigCommand) -> anyhow::Result<ExitCode> {
    match command {
        ConfigCommand::Check { json: false, settings } => {
            super::print(&no_problems(&settings.load()?))?;
        }
        ConfigCommand::Check { json: true, settings } => {
            let loaded = settings.load();
            super::print(&format!("{:#}\n", verdict(&loaded)))?;
            if let Err(problems) = loaded {
                return Ok(ExitCode::from(exit::code(&problems.into())));
            }
        }
        ConfigCommand::Show(settings) => super::print(&render::show(&settings.load()?))?,
        ConfigCommand::Example => super::print(&render::example())?,
    }
    Ok(ExitCode::SUCCESS)
}

fn no_problems(loaded: &Loaded) -> String {
    let mut text = String::from("The configuration has no problems.");
    if !loaded.ignored.is_empty() {
        text += &format!(
            " Not read, since no endpoint that is on needs them: {}",
            loaded.ignored.join(", ")
        );
    }
    text.push('\n');
    text.extend(loaded.warnings.iter().map(|warning| format!("Warning: {warning}\n")));
    text
}

fn verdict(loaded: &Result<Loaded, Problems>) -> serde_json::Value {
    match loaded {
        Ok(Loaded { warnings, ignored, .. }) => {
            json!({ "valid": true, "problems": [], "warnings": warnings, "ignored": ignored })
        }
        Err(Problems(problems)) => {
            let problems: Vec<_> = problems.iter().map(Problem::json).collect();
            json!({ "valid": false, "problems": problems, "warnings": [], "ignored": [] })
        }
    }
}

const CHECK_EXAMPLE: &str = "Example:
  wsproxy config check --config /etc/wsproxy/wsproxy.toml --json";

const SHOW_EXAMPLE: &str = "Example:
  REDIS_URL=redis://127.0.0.1 wsproxy config show --port 9000";

const EXAMPLE_EXAMPLE: &str = "Example:
  wsproxy config example > wsproxy.toml";
