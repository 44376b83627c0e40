//! The command line: parses it, runs the command, and turns its result into an exit code.

use std::{io::Write, process::ExitCode, sync::mpsc, time::Duration};

use clap::{CommandFactory, Parser, Subcommand, ValueEnum};

mod config;
mod dev;
pub mod exit;
mod health;
mod jwt;
pub mod serve;
mod settings;
pub mod token;
pub(crate) mod version;

/// Holds the long-lived WebSocket connections, so that application workers don't have to.
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
    Serve(settings::Settings<settings::Everything>),
    /// Try it out: the gateway with its embedded bus, on this machine only unless --bind says else.
    #[command(after_help = dev::EXAMPLE)]
    Dev(settings::Settings<dev::DevKeys>),
    /// Check or show the configuration, or print an example.
    #[command(subcommand)]
    Config(config::ConfigCommand),
    /// Make a token that opens a session: once, or event streams until it expires.
    Token(token::TokenArgs),
    /// Sign a JSON Web Token that opens /ws with jwt.secret_key, to try things out.
    Jwt(jwt::JwtArgs),
    /// Ask a running instance whether it is healthy; exits with 0 or 1.
    Health(health::HealthArgs),
    /// Print a completion script for a shell.
    #[command(after_help = COMPLETIONS_EXAMPLE)]
    Completions {
        /// The shell.
        shell: Shell,
    },
    /// Print the version, and which commit of which day it was built from.
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

/// Runs what the arguments of the process ask for.
#[must_use]
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // A closed pipe is the only way in which this fails: then nobody reads it.
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
        Command::Serve(settings) => serve::run(settings.load()?)?,
        Command::Dev(settings) => dev::run(settings)?,
        Command::Config(command) => return config::run(command),
        Command::Token(args) => token::run(args)?,
        Command::Jwt(args) => jwt::run(args)?,
        Command::Health(args) => return health::run(args),
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

const EXAMPLES: &str = "Examples:
  wsproxy dev                                            # try it out: nothing else is needed
  REDIS_URL=redis://127.0.0.1:6379 wsproxy serve         # run it beside a Redis
  REDIS_URL=redis://127.0.0.1:6379 wsproxy token s-1     # what a client opens the session s-1 with";

const COMPLETIONS_EXAMPLE: &str = "Example:
  wsproxy completions bash > ~/.local/share/bash-completion/completions/wsproxy";

const VERSION_EXAMPLE: &str = "Example:
  wsproxy version --json";

/// Writes to standard error, which may be stuck: that must not keep an instance from ending.
fn complain(text: String) {
    let (done, wait) = mpsc::sync_channel(1);
    std::thread::spawn(move || {
        let _ = std::io::stderr().write_all(text.as_bytes());
        let _ = done.send(());
    });
    let _ = wait.recv_timeout(COMPLAINT_TIMEOUT);
}

const COMPLAINT_TIMEOUT: Duration = Duration::from_secs(1);

/// Writes to standard output; a reader that left, such as `head`, is no error.
fn print(text: &str) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => Err(error.into()),
        _ => Ok(()),
    }
}
