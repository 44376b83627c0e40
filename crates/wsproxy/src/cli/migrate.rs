//! `wsproxy migrate`: creates absent tables, and adds to tables of an application what the gateway can use.

use anyhow::Context;
use serde_json::json;

use super::{
    exit::Failure,
    settings::{CliSettings, Reads},
};
use crate::{
    config::{Config, keys::Key},
    database::{Database, OpenError, migrate::NotReady, migrate::script},
};

/// The keys of the database, with agents on: these commands are about nothing else.
pub(super) struct DatabaseKeys;

impl Reads for DatabaseKeys {
    fn reads(key: &Key) -> bool {
        key.section == "database" || key.path() == "audit.keep"
    }

    fn defaults() -> Config {
        let mut config = Config::default();
        config.endpoints.agents = true;
        config
    }
}

/// Arguments of the command.
#[derive(clap::Args)]
#[command(after_help = EXAMPLE)]
pub(super) struct MigrateArgs {
    /// Print the SQL, and change nothing.
    #[arg(long)]
    dry_run: bool,
    /// Print JSON: dry_run, changes (each with name, sql).
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    settings: CliSettings<DatabaseKeys>,
}

pub(super) fn run(args: MigrateArgs) -> anyhow::Result<()> {
    let config = load(args.settings)?;
    let with_index = !config.audit.keep.is_zero();
    let changes = block_on(async {
        let database = Database::open_unprepared(&config).map_err(from_open)?;
        let changes = match args.dry_run {
            true => database.plan(with_index).await,
            false => database.migrate(with_index).await,
        };
        database.close().await;
        changes.map_err(from_not_ready)
    })?;
    if args.json {
        let listed: Vec<_> =
            changes.iter().map(|step| json!({ "name": step.name, "sql": step.sql })).collect();
        let answer = json!({ "dry_run": args.dry_run, "changes": listed });
        return super::print(&format!("{answer}\n"));
    }
    let text = match args.dry_run {
        _ if changes.is_empty() => "Nothing to do: the tables are complete.\n".into(),
        true => script(&changes),
        false => changes.iter().map(|step| format!("Added: {}\n", step.name)).collect(),
    };
    super::print(&text)
}

/// Loads the configuration of a command on the database.
pub(super) fn load<R: Reads>(settings: CliSettings<R>) -> anyhow::Result<Config> {
    let config = settings.load()?.config;
    if !config.endpoints.agents {
        let problem = anyhow::anyhow!("endpoints.agents is off, so that no database is used");
        return Err(problem.context(Failure::Config));
    }
    Ok(config)
}

/// Runs the work of a command to its end.
pub(super) fn block_on<T>(work: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.context("cannot start the runtime")?.block_on(work)
}

/// Gives a failure to open the database its exit code.
pub(super) fn from_open(error: OpenError) -> anyhow::Error {
    match error {
        OpenError::Config(why) => anyhow::anyhow!(why).context(Failure::Config),
        OpenError::NotReady(why) => from_not_ready(why),
    }
}

fn from_not_ready(why: NotReady) -> anyhow::Error {
    let failure = match why {
        NotReady::Unavailable(_) => Failure::Unavailable,
        NotReady::Unusable(_) => Failure::Config,
    };
    anyhow::Error::from(why).context(failure)
}

const EXAMPLE: &str = "Example:
  DATABASE_URL=postgres://wsproxy@db.example/app wsproxy migrate --dry-run

A gateway creates absent tables itself at its start, unless database.migrate is off, and changes no table of an \
application. This command also adds the columns outcome and details to an existing tool_execution_logs, and its index \
on created_at where audit.keep is set.";
