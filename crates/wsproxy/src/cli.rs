//! The command line: parses it, runs the command, and turns its result into an exit code.

use std::{io::Write, process::ExitCode, sync::mpsc, time::Duration};

use clap::{CommandFactory, Parser, Subcommand, ValueEnum};

mod agent;
mod agents;
mod config;
mod dev;
pub mod exit;
mod health;
mod http;
mod jwt;
mod migrate;
mod reload;
pub mod serve;
mod settings;
pub mod token;
pub(crate) mod version;

/// Holds the long-lived WebSockets and event streams of an application.
#[derive(Parser)]
#[command(name = "wsproxy", version, max_term_width = 100, after_help = EXAMPLES)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Subcommand)]
enum Command {
    /// Run the gateway.
    #[command(after_help = serve::EXAMPLE)]
    Serve(settings::CliSettings<settings::Everything>),
    /// Try it out: the gateway with its embedded bus and a demo worker, for this machine only unless --bind is given.
    #[command(after_help = dev::EXAMPLE)]
    Dev(settings::CliSettings<dev::DevKeys>),
    /// Check or show the configuration, or print an example.
    #[command(subcommand)]
    Config(config::ConfigCommand),
    /// Make a token that opens a session: once, or event streams until it expires.
    Token(token::TokenArgs),
    /// Sign a JSON Web Token with jwt.secret_key, to try out events (/ws) and rooms (/ws/ROOM).
    Jwt(jwt::JwtArgs),
    /// Run a cluster agent: serve what clients ask of a gateway from a private HTTP service beside the agent.
    #[command(after_help = agent::EXAMPLE)]
    Agent(settings::CliSettings<agent::AgentKeys>),
    /// Credentials of users' agents: add, list, show, rotate, revoke, remove, adopt.
    #[command(subcommand, after_help = agents::DATABASE)]
    Agents(agents::AgentsCommand),
    /// Create absent tables, and prepare those of an application.
    Migrate(migrate::MigrateArgs),
    /// Ask a running instance whether it is healthy; exits with 0 or 1.
    Health(health::HealthArgs),
    /// Let a running instance read its configuration again; the answer says what changed and what needs a restart.
    Reload(reload::ReloadArgs),
    /// Print a completion script for a shell.
    #[command(after_help = COMPLETIONS_EXAMPLE)]
    Completions {
        /// The shell.
        shell: Shell,
    },
    /// Print the version, and the commit and day of the build.
    #[command(after_help = VERSION_EXAMPLE)]
    Version {
        /// As JSON.
        #[arg(long)]
        json: bool,
    },
}

/// Shells that completions are made for.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum Shell {
    Bash,
    Elvish,
    Fish,
    Powershell,
    Zsh,
}

/// Runs the command that the arguments of the process name.
#[must_use]
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // Printing fails only if the pipe is closed, and then no process reads it.
            let _ = error.print();
            let code = if error.use_stderr() { exit::USAGE } else { 0 };
            return ExitCode::from(code);
        }
    };
    let Some(command) = cli.command else {
        complain(format!("{}", Cli::command().render_help()));
        return ExitCode::from(exit::USAGE);
    };
    match run(command) {
        Ok(code) => code,
        Err(error) => {
            complain(format!("wsproxy: {error:#}\n"));
            ExitCode::from(exit::code(&error))
        }
    }
}

fn run(command: Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::Serve(settings) => serve::run(settings.sources())?,
        Command::Dev(settings) => dev::run(settings)?,
        Command::Config(command) => return config::run(command),
        Command::Token(args) => token::run(args)?,
        Command::Jwt(args) => jwt::run(args)?,
        Command::Agent(settings) => agent::run(settings)?,
        Command::Agents(command) => agents::run(command)?,
        Command::Migrate(args) => migrate::run(args)?,
        Command::Health(args) => return health::run(args),
        Command::Reload(args) => reload::run(args)?,
        Command::Completions { shell } => print(&completions(shell))?,
        Command::Version { json } => print(&version::text(json))?,
    }
    Ok(ExitCode::SUCCESS)
}

fn completions(shell: Shell) -> String {
    use clap_complete::{aot, generate};
    let mut script = Vec::new();
    let (mut command, name) = (Cli::command(), "wsproxy");
    match shell {
        Shell::Bash => generate(aot::Bash, &mut command, name, &mut script),
        Shell::Elvish => generate(aot::Elvish, &mut command, name, &mut script),
        Shell::Fish => generate(aot::Fish, &mut command, name, &mut script),
        Shell::Powershell => generate(aot::PowerShell, &mut command, name, &mut script),
        Shell::Zsh => generate(aot::Zsh, &mut command, name, &mut script),
    }
    String::from_utf8_lossy(&script).into_owned()
}

/// Writes to standard error with a time limit: a stuck pipe must not keep an instance from ending.
fn complain(text: String) {
    let (done, wait) = mpsc::sync_channel(1);
    std::thread::spawn(move || {
        let _ = std::io::stderr().write_all(text.as_bytes());
        let _ = done.send(());
    });
    let _ = wait.recv_timeout(COMPLAINT_TIMEOUT);
}

/// Writes to standard output; a reader that left, such as `head`, is no error.
fn print(text: &str) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => Err(error.into()),
        _ => Ok(()),
    }
}

const EXAMPLES: &str = "Examples:
  wsproxy dev                                            # try it out: nothing else is needed
  REDIS_URL=redis://127.0.0.1:6379 wsproxy serve         # run it beside a Redis
  REDIS_URL=redis://127.0.0.1:6379 wsproxy token s-1     # a token that opens the session s-1";

const COMPLETIONS_EXAMPLE: &str = "Example:
  wsproxy completions bash > ~/.local/share/bash-completion/completions/wsproxy";

const VERSION_EXAMPLE: &str = "Example:
  wsproxy version --json";

const COMPLAINT_TIMEOUT: Duration = Duration::from_secs(1);
