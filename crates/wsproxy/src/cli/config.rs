//! `wsproxy config check|show|example`.

use std::process::ExitCode;

use clap::Subcommand;
use serde_json::json;

mod connect;

use self::connect::Finding;
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
        /// Look at this machine and at the servers too: open files, ports, certificate, clock, Redis, database. Exits
        /// with 1 if something does not work.
        #[arg(long)]
        connect: bool,
        /// Print JSON: valid, problems (each with origin, key, value, message), warnings, ignored; with --connect
        /// findings (each with level, part, what, do).
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
        ConfigCommand::Check { connect, json, settings } => return check(settings, connect, json),
        ConfigCommand::Show(settings) => super::print(&render::show(&settings.load()?))?,
        ConfigCommand::Example => super::print(&render::example())?,
    }
    Ok(ExitCode::SUCCESS)
}

fn check(settings: CliSettings<Everything>, connect: bool, json: bool) -> anyhow::Result<ExitCode> {
    let loaded = settings.load();
    let findings = match &loaded {
        Ok(loaded) if connect => Some(connect::examine(&loaded.config)?),
        _ => None,
    };
    if json {
        let mut verdict = verdict(&loaded);
        if let Some(findings) = &findings {
            verdict["findings"] = findings.iter().map(Finding::json).collect();
        }
        super::print(&format!("{verdict:#}\n"))?;
    }
    let loaded = match loaded {
        Err(problems) if json => return Ok(ExitCode::from(exit::code(&problems.into()))),
        loaded => loaded?,
    };
    let findings = findings.unwrap_or_default();
    if !json {
        let mut text = no_problems(&loaded);
        text.extend(findings.iter().map(|finding| format!("{finding}\n")));
        super::print(&text)?;
    }
    Ok(if connect::has_error(&findings) { ExitCode::FAILURE } else { ExitCode::SUCCESS })
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
  wsproxy config check --config /etc/wsproxy/wsproxy.toml --json
  wsproxy config check --config /etc/wsproxy/wsproxy.toml --connect";

const SHOW_EXAMPLE: &str = "Example:
  REDIS_URL=redis://127.0.0.1 wsproxy config show --port 9000";

const EXAMPLE_EXAMPLE: &str = "Example:
  wsproxy config example > wsproxy.toml";
