//! `wsproxy agents`: credentials of users' agents, in the database that the gateway uses.

use std::{io::Read, time::Duration};

use anyhow::Context;
use clap::Subcommand;
use secrecy::{ExposeSecret, SecretString};
use serde_json::json;
use uuid::Uuid;
use wsproxy_proto::names::Id;

use self::{
    show::{agent_json, agent_line, agent_text, issued_json, time_text},
    tell::Told,
};
use super::{
    exit::Failure,
    migrate::{DatabaseKeys, block_on, from_open, load},
    settings::{CliSettings, Reads},
};
use crate::{
    config::{Config, keys::Key},
    database::{
        Database,
        agents::{NewSecret, Others, Platform, UserRule},
        error::{DatabaseError, SecretsError},
        secrets::SECRET_CHARACTERS_MIN,
    },
};

mod show;
mod tell;

/// The subcommands.
#[derive(Subcommand)]
pub(super) enum AgentsCommand {
    /// Add a user, and print its secret: this once.
    #[command(after_help = ADD_EXAMPLE)]
    Add {
        /// The user.
        #[arg(value_parser = user)]
        user: Id,
        /// Platform of the agent.
        #[arg(long, value_enum, default_value = "linux")]
        platform: Platform,
        #[command(flatten)]
        new: NewArgs,
    },
    /// List users, with their status.
    List {
        /// Only users whose agent is connected.
        #[arg(long)]
        connected: bool,
        /// Print JSON: agents (each with user_id, platform, status, created_at, last_seen, clear).
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        settings: CliSettings<DatabaseKeys>,
    },
    /// Show a user, and its secrets without their text.
    Show {
        /// The user.
        #[arg(value_parser = user)]
        user: Id,
        /// Print JSON.
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        settings: CliSettings<DatabaseKeys>,
    },
    /// Make a new secret for a user; older ones expire after a while.
    #[command(after_help = ROTATE_EXAMPLE)]
    Rotate {
        /// The user.
        #[arg(value_parser = user)]
        user: Id,
        /// Time for which older secrets stay valid.
        #[arg(long, value_name = "TIME", default_value = "24h", value_parser = overlap)]
        overlap: Duration,
        #[command(flatten)]
        new: NewArgs,
    },
    /// Revoke secrets of a user, and close the connections that they opened.
    #[command(after_help = REVOKE_EXAMPLE)]
    Revoke {
        /// Only the secret with this id, as `show` prints it.
        #[arg(long, value_name = "ID")]
        secret: Option<Uuid>,
        #[command(flatten)]
        known: KnownArgs,
    },
    /// Remove a user with all secrets, and close its connection. The audit log stays.
    Remove {
        #[command(flatten)]
        known: KnownArgs,
    },
    /// Replace secrets that an application stored in clear by hashes. The application can then no longer read them.
    #[command(after_help = ADOPT_EXAMPLE)]
    Adopt {
        /// Tell what would be done, and change nothing.
        #[arg(long)]
        dry_run: bool,
        /// Print JSON: dry_run, adopted, too_short, changed (user ids each).
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        settings: CliSettings<DatabaseKeys>,
    },
}

/// Arguments of a command that stores a secret.
#[derive(clap::Args)]
pub(super) struct NewArgs {
    /// Time after which the secret expires, such as 90d. Default: never.
    #[arg(long, value_name = "TIME", value_parser = lifetime)]
    expires: Option<Duration>,
    /// Read the secret from standard input instead of making one. It must be random: at least 32 characters.
    #[arg(long)]
    secret_stdin: bool,
    /// Print JSON: user_id, secret, secret_id, expires_at.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    settings: CliSettings<DatabaseKeys>,
}

/// The keys of the database, and those of the Redis over which gateways are told.
pub(super) struct ToldKeys;

impl Reads for ToldKeys {
    fn reads(key: &Key) -> bool {
        key.section == "redis" || DatabaseKeys::reads(key)
    }

    fn defaults() -> Config {
        DatabaseKeys::defaults()
    }
}

/// Arguments of a command about a known user, of which running gateways are told.
#[derive(clap::Args)]
pub(super) struct KnownArgs {
    /// The user.
    #[arg(value_parser = user)]
    user: Id,
    /// Print JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    settings: CliSettings<ToldKeys>,
}

pub(super) fn run(command: AgentsCommand) -> anyhow::Result<()> {
    match command {
        AgentsCommand::Add { user, platform, new } => {
            issue(&user, Some(platform), UserRule::New, Others::Keep, new)
        }
        AgentsCommand::Rotate { user, overlap, new } => {
            issue(&user, None, UserRule::Known, Others::Expire(overlap), new)
        }
        AgentsCommand::List { connected, json, settings } => list(connected, json, settings),
        AgentsCommand::Show { user, json, settings } => show(&user, json, settings),
        AgentsCommand::Revoke { secret, known } => revoke(secret, known),
        AgentsCommand::Remove { known } => remove(known),
        AgentsCommand::Adopt { dry_run, json, settings } => adopt(dry_run, json, settings),
    }
}

fn issue(
    user: &Id,
    platform: Option<Platform>,
    rule: UserRule,
    others: Others,
    args: NewArgs,
) -> anyhow::Result<()> {
    let secret = if args.secret_stdin { Some(read_secret()?) } else { None };
    let config = load(args.settings)?;
    let is_given = secret.is_some();
    let wish = NewSecret { platform, expires_in: args.expires, secret, user: rule, others };
    let issued = with_database(&config, rule == UserRule::New, async |database| {
        database.issue(user, wish).await.map_err(|error| failed(user.as_str(), error))
    })?;
    if args.json {
        return super::print(&format!("{}\n", issued_json(user, &issued, is_given)));
    }
    let end = issued
        .expires_at
        .map_or_else(|| "does not expire".into(), |time| format!("expires at {}", time_text(time)));
    // Standard output has the secret alone, for a script.
    eprintln!("The secret {} of {user} is stored in {}; it {end}.", issued.id, place(&config));
    if is_given {
        return Ok(());
    }
    super::print(&format!("{}\n", issued.secret.expose_secret()))
}

fn list(connected: bool, json: bool, settings: CliSettings<DatabaseKeys>) -> anyhow::Result<()> {
    let config = load(settings)?;
    let agents = with_database(&config, false, async |database| {
        let (mut agents, mut after) = (Vec::new(), String::new());
        loop {
            let page = database.list(&after, LIST_PAGE, connected).await;
            let page = page.map_err(|error| failed("", error))?;
            let Some(last) = page.last() else { return Ok(agents) };
            after.clone_from(&last.user_id);
            agents.extend(page);
        }
    })?;
    if json {
        let agents: Vec<_> = agents.iter().map(agent_json).collect();
        return super::print(&format!("{}\n", json!({ "agents": agents })));
    }
    super::print(&agents.iter().map(agent_line).collect::<String>())
}

fn show(user: &Id, json: bool, settings: CliSettings<DatabaseKeys>) -> anyhow::Result<()> {
    let config = load(settings)?;
    let agent = with_database(&config, false, async |database| {
        database.show(user).await.map_err(|error| failed(user.as_str(), error))
    })?;
    let text = if json { format!("{}\n", agent_json(&agent)) } else { agent_text(&agent) };
    super::print(&text)
}

fn revoke(secret: Option<Uuid>, args: KnownArgs) -> anyhow::Result<()> {
    let KnownArgs { user, json, settings } = args;
    let config = load(settings)?;
    let (revoked, told) = with_database(&config, false, async |database| {
        let revoked = database.revoke(&user, secret).await;
        let revoked = revoked.map_err(|error| failed(user.as_str(), error))?;
        let told = tell::revoked(&config, &user, secret).await;
        Ok((revoked, told.context("the secret is revoked, but open connections stay")?))
    })?;
    if json {
        let answer = json!({
            "user_id": user.as_str(), "secret_id": secret, "revoked": revoked.secrets,
            "clear": revoked.clear, "instances": told.instances(),
        });
        return super::print(&format!("{answer}\n"));
    }
    let clear = match revoked.clear {
        true => " The value that an application stored in clear is replaced, and opens nothing.",
        false => "",
    };
    let count = secrets(revoked.secrets);
    super::print(&format!("Revoked: {count} of {user}.{clear}\n{}\n", told.sentence(&user)))
}

fn remove(args: KnownArgs) -> anyhow::Result<()> {
    let KnownArgs { user, json, settings } = args;
    let config = load(settings)?;
    let told: Told = with_database(&config, false, async |database| {
        database.remove(&user).await.map_err(|error| failed(user.as_str(), error))?;
        let told = tell::revoked(&config, &user, None).await;
        told.context("the user is removed, but an open connection stays")
    })?;
    if json {
        let answer =
            json!({ "user_id": user.as_str(), "removed": true, "instances": told.instances() });
        return super::print(&format!("{answer}\n"));
    }
    super::print(&format!("Removed: {user}.\n{}\n", told.sentence(&user)))
}

fn adopt(dry_run: bool, json: bool, settings: CliSettings<DatabaseKeys>) -> anyhow::Result<()> {
    let config = load(settings)?;
    if !dry_run {
        eprintln!(
            "Clear secrets in {} become hashes: the application can no longer read them.",
            place(&config)
        );
    }
    let result = with_database(&config, false, async |database| {
        database.adopt(dry_run).await.map_err(|error| failed("", error))
    })?;
    if json {
        let answer = json!({
            "dry_run": dry_run, "adopted": result.adopted, "too_short": result.too_short,
            "changed": result.changed,
        });
        return super::print(&format!("{answer}\n"));
    }
    let verb = if dry_run { "Would be replaced" } else { "Replaced" };
    let mut text = format!("{verb}: {}.\n", secrets(result.adopted.len() as u64));
    for (users, why) in [
        (&result.too_short, "fewer than 32 characters, too few for a fast hash"),
        (&result.changed, "it changed meanwhile"),
    ] {
        text.extend(users.iter().map(|user| format!("Left as it is: {user} ({why})\n")));
    }
    super::print(&text)
}

fn secrets(count: u64) -> String {
    if count == 1 { "1 secret".into() } else { format!("{count} secrets") }
}

/// Opens the database, does the work and closes it. `creates`: a file may be made.
fn with_database<T>(
    config: &Config,
    creates: bool,
    work: impl AsyncFnOnce(&Database) -> anyhow::Result<T>,
) -> anyhow::Result<T> {
    let file = config.database.file();
    // A command in another folder would make an empty database, and find no user.
    if !creates && config.database.url.is_none() && !file.exists() {
        let problem = anyhow::anyhow!(
            "there is no database {}: set DATABASE_URL, or database.path to the gateway's file",
            file.display()
        );
        return Err(problem.context(Failure::Config));
    }
    block_on(async {
        let database = Database::open(config).await.map_err(from_open)?;
        let result = work(&database).await;
        database.close().await;
        result
    })
}

/// Returns where credentials are, for messages.
fn place(config: &Config) -> String {
    match config.database.url {
        Some(_) => "PostgreSQL".into(),
        None => config.database.file().display().to_string(),
    }
}

/// Gives a failure its exit code, and names the user.
fn failed(user: &str, error: SecretsError) -> anyhow::Error {
    let (failure, advice) = match &error {
        SecretsError::Database(DatabaseError::Unavailable, _) | SecretsError::InDoubt(_) => {
            (Some(Failure::Unavailable), "")
        }
        SecretsError::Database(DatabaseError::Refused, _) => (None, ""),
        SecretsError::NoTable(_) => (Some(Failure::Config), ""),
        SecretsError::UnknownUser => (Some(Failure::NoUser), ""),
        SecretsError::UnknownSecret => (Some(Failure::Data), ""),
        SecretsError::TooMany => (Some(Failure::Data), ""),
        SecretsError::Exists => (Some(Failure::Data), ": `rotate` makes a new secret"),
        SecretsError::Clear => (
            Some(Failure::Data),
            ": let the application change it, or take it over with `adopt`, or `revoke` it",
        ),
    };
    let user = if user.is_empty() { String::new() } else { format!("{user}: ") };
    let problem = anyhow::anyhow!("{user}{error}{advice}");
    match failure {
        Some(failure) => problem.context(failure),
        None => problem,
    }
}

/// Reads a secret from standard input.
fn read_secret() -> anyhow::Result<SecretString> {
    let mut text = String::new();
    let input = std::io::stdin().lock().take(SECRET_BYTES_MAX + 2).read_to_string(&mut text);
    input.context("the secret cannot be read from standard input").context(Failure::Data)?;
    let secret = text.trim_end_matches(['\r', '\n']);
    check_secret(secret).map_err(|why| anyhow::anyhow!(why).context(Failure::Data))?;
    Ok(secret.to_owned().into())
}

fn check_secret(secret: &str) -> Result<(), String> {
    if secret.chars().count() < SECRET_CHARACTERS_MIN {
        return Err(format!(
            "the secret has fewer than {SECRET_CHARACTERS_MIN} characters: it is stored under a fast hash, which is right \
             only for secrets that cannot be guessed"
        ));
    }
    if secret.len() as u64 > SECRET_BYTES_MAX || !secret.bytes().all(|b| b.is_ascii_graphic()) {
        return Err(format!(
            "the secret must be at most {SECRET_BYTES_MAX} visible ASCII characters"
        ));
    }
    Ok(())
}

fn user(text: &str) -> Result<Id, String> {
    Id::parse(text).map_err(|error| format!("a user id {error}"))
}

fn lifetime(text: &str) -> Result<Duration, String> {
    let time = time(text).filter(|time| *time >= Duration::from_secs(1));
    time.ok_or_else(|| "must be a time from 1s to 10 years, such as 90d".into())
}

fn overlap(text: &str) -> Result<Duration, String> {
    time(text).ok_or_else(|| "must be a time from 0 to 10 years, such as 24h".into())
}

fn time(text: &str) -> Option<Duration> {
    let seconds = text.parse().map(Duration::from_secs);
    let time = seconds.or_else(|_| humantime::parse_duration(text)).ok();
    time.filter(|time| *time <= TIME_MAX)
}

/// Users that are read at once.
const LIST_PAGE: u32 = 1000;

/// Most bytes of a given secret.
const SECRET_BYTES_MAX: u64 = 512;

const TIME_MAX: Duration = Duration::from_secs(3650 * 86_400);

/// Help of the group.
pub(super) const DATABASE: &str =
    "The database is that of the gateway: the PostgreSQL of DATABASE_URL, or else the \
file of database.path (default wsproxy.db in $STATE_DIRECTORY or in the working directory).

Examples:
  wsproxy agents add u1                 # prints the secret of the user's agent
  wsproxy agents list --connected       # who is connected
  wsproxy agents rotate u1              # a new secret; the old one is good for a day";

const ADD_EXAMPLE: &str = "Example:
  export DATABASE_URL=postgres://wsproxy@db.example/app
  wsproxy agents add u1 --expires 90d

Standard output is the secret alone. The agent shows it at /?userId=u1, in the header Authorization: Bearer SECRET.";

const ROTATE_EXAMPLE: &str = "Example:
  wsproxy agents rotate u1 --overlap 24h";

const REVOKE_EXAMPLE: &str = "Example:
  wsproxy agents revoke u1

The secret opens nothing from now on. Open connections are closed over Redis (redis.url), on all instances. Without \
redis.url they stay: POST /api/v1/agents/u1/disconnect at the gateway closes them.";

const ADOPT_EXAMPLE: &str = "Example:
  wsproxy agents adopt --dry-run

Agents keep their secrets. A page of the application that shows a stored secret again stops working.";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn given_secrets_are_long_and_visible() {
        assert!(check_secret(&"a".repeat(32)).is_ok());
        assert!(check_secret(&"a".repeat(31)).unwrap_err().contains("fast hash"));
        for bad in ["a b".repeat(20), "\u{e4}".repeat(40), "a".repeat(513)] {
            assert!(check_secret(&bad).unwrap_err().contains("visible"), "{bad}");
        }
    }

    #[test]
    fn times_are_seconds_or_words() {
        assert_eq!(lifetime("90d"), Ok(Duration::from_secs(90 * 86_400)));
        assert_eq!(overlap("0"), Ok(Duration::ZERO));
        assert!(lifetime("0").is_err() && lifetime("20years").is_err() && overlap("x").is_err());
    }
}
