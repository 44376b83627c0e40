//! The program `wsproxy-agent`: the cluster agent without the gateway.

use std::process::ExitCode;

use clap::Parser;
use tracing_subscriber::EnvFilter;
use wsproxy_agent::{agent, settings::Settings};

/// Serves what clients ask of a gateway from a private HTTP service. Tokens come from files, or from the variables
/// WSPROXY_TUNNEL_AGENT__TOKEN and WSPROXY_TUNNEL_AGENT__UPSTREAM_TOKEN.
#[derive(Parser)]
#[command(name = "wsproxy-agent", version, max_term_width = 100, after_help = EXAMPLE)]
struct Cli {
    #[command(flatten)]
    settings: Settings,
    /// Level of the log: error, warn, info, debug, trace, or directives of tracing.
    #[arg(long, value_name = "LEVEL", default_value = "info", env = "WSPROXY_LOG__LEVEL")]
    log_level: String,
}

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // Printing fails only if the pipe is closed, and then no process reads it.
            let _ = error.print();
            return ExitCode::from(if error.use_stderr() { USAGE } else { 0 });
        }
    };
    match run(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err((code, problem)) => {
            eprintln!("wsproxy-agent: {problem}");
            ExitCode::from(code)
        }
    }
}

fn run(cli: Cli) -> Result<(), (u8, String)> {
    let mut settings = cli.settings;
    settings.token = variable("WSPROXY_TUNNEL_AGENT__TOKEN");
    settings.upstream_token = variable("WSPROXY_TUNNEL_AGENT__UPSTREAM_TOKEN");
    let config = settings.config().map_err(|error| (CONFIG, error.to_string()))?;
    let filter = EnvFilter::try_new(&cli.log_level).map_err(|error| (USAGE, error.to_string()))?;
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
    let mut builder = tokio::runtime::Builder::new_multi_thread();
    builder.enable_all();
    if settings.threads > 0 {
        builder.worker_threads(settings.threads);
    }
    let runtime =
        builder.build().map_err(|error| (OS, format!("cannot start the runtime: {error}")))?;
    let ended = runtime.block_on(agent::run_until_signal(config));
    ended.map_err(|error| (OS, format!("cannot listen to signals: {error}")))
}

#[expect(clippy::disallowed_methods, reason = "the one place that reads variables of the process")]
fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

const EXAMPLE: &str = "Example:
  wsproxy-agent --gateway wss://gateway.example --cluster c1 --token-file /run/secrets/token \\
    --upstream https://kubernetes.default.svc --upstream-ca ca.crt --upstream-token-file token";

/// The command line was wrong (sysexits.h).
const USAGE: u8 = 64;
/// The operating system refused.
const OS: u8 = 71;
/// A setting is missing or wrong.
const CONFIG: u8 = 78;
