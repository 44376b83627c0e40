//! The reload: reads the configuration again, and puts what may change into force, all of it or nothing.

use std::{
    fmt::Write,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicI64, Ordering::Relaxed},
    },
    time::Duration,
};

use serde_json::{Value, json};
use tokio::{
    sync::{Mutex, OwnedMutexGuard},
    time::timeout,
};
use tracing::{error, info};

use crate::{
    auth::{api_keys::KeyTable, fixed_keys::KeyRing},
    config::{
        Config,
        change::{Change, Changes, merged},
        load::{self, ConfigSources, Origins},
        problem::{Problem, Problems},
    },
    core::Core,
    endpoint::Families,
    telemetry::{
        counter::Counter,
        log,
        scrape::{Scrape, Section, Source},
        time,
    },
    tls::pair::{NewPair, TlsPair},
};

mod api;

pub use api::router;

/// The reload of one instance.
pub struct Reloader {
    /// Sources of the configuration; `None`: it was made, not read, so it cannot be read again.
    sources: Option<ConfigSources>,
    core: Arc<Core>,
    families: Arc<Families>,
    pair: Option<Arc<TlsPair>>,
    /// Guards the configuration in force. A reload holds it to its end, so that reloads run one after the other.
    in_force: Arc<Mutex<Config>>,
    counters: ReloadCounters,
}

/// Numbers of reloads.
#[derive(Debug, Default)]
struct ReloadCounters {
    done: Counter,
    refused: Counter,
    /// Unix time of the last reload that was done, or of the start.
    done_at: AtomicI64,
}

/// Result of a reload that was done.
#[derive(Debug)]
pub struct Reloaded {
    /// Keys whose values differ from those that were in force.
    pub changes: Changes,
    /// Values that are allowed but probably not meant, each a sentence.
    pub warnings: Vec<String>,
}

/// The reason why nothing was reloaded.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ReloadError {
    /// The configuration has problems.
    #[error("{0}")]
    Invalid(Problems),
    /// The instance has no configuration that can be read again.
    #[error("This instance has no configuration to read again.")]
    NothingToRead,
    /// The files are not read yet, or an earlier reload still waits for them.
    #[error("The files could not be read in time. The log tells the result once they are.")]
    Slow,
}

impl Reloader {
    /// Makes the reload of an instance, with the configuration of its start.
    pub(crate) fn new(
        sources: Option<ConfigSources>,
        core: &Arc<Core>,
        families: &Arc<Families>,
        pair: Option<Arc<TlsPair>>,
    ) -> Arc<Self> {
        let counters = ReloadCounters::default();
        counters.done_at.store(now(), Relaxed);
        Arc::new(Self {
            sources: sources.map(|sources| ConfigSources { reads_again: true, ..sources }),
            core: Arc::clone(core),
            families: Arc::clone(families),
            pair,
            in_force: Arc::new(Mutex::new(core.config.clone())),
            counters,
        })
    }

    /// Reloads. `by` names who asked, for the log. A reload that has begun goes on when this future is dropped.
    ///
    /// # Errors
    /// Nothing was changed, or it is not known yet whether something will be: [`ReloadError::Slow`].
    pub async fn reload(self: &Arc<Self>, by: &str) -> Result<Reloaded, ReloadError> {
        if self.sources.is_none() {
            return Err(ReloadError::NothingToRead);
        }
        let in_force = timeout(WAIT_MAX, Arc::clone(&self.in_force).lock_owned()).await;
        let in_force = in_force.map_err(|_| ReloadError::Slow)?;
        let (this, by) = (Arc::clone(self), by.to_owned());
        // A file system may be slow, and connections must not wait for it.
        let work = tokio::task::spawn_blocking(move || this.reload_now(in_force, &by));
        match timeout(WAIT_MAX, work).await {
            Ok(Ok(result)) => result.map_err(ReloadError::Invalid),
            Ok(Err(_)) | Err(_) => Err(ReloadError::Slow),
        }
    }

    /// Reloads, counts and logs. Blocks.
    fn reload_now(
        &self,
        mut in_force: OwnedMutexGuard<Config>,
        by: &str,
    ) -> Result<Reloaded, Problems> {
        let result = self.read(&in_force).map(|(reloaded, next)| {
            *in_force = self.put_in_force(next);
            reloaded
        });
        match &result {
            Ok(Reloaded { changes, warnings }) => {
                self.counters.done.add(1);
                self.counters.done_at.store(now(), Relaxed);
                let changed = listed(&changes.reloaded);
                let needs_restart = listed(&changes.needs_restart);
                let warnings = Some(warnings.join(" ")).filter(|text| !text.is_empty());
                info!(by, changed, needs_restart, warnings, "The configuration was reloaded.");
            }
            Err(Problems(problems)) => {
                self.counters.refused.add(1);
                for problem in problems.iter().take(LOGGED_PROBLEMS_MAX) {
                    error!(by, error = %problem, "The configuration cannot be reloaded.");
                }
                let problems = problems.len();
                error!(by, problems, "Nothing was reloaded: the configuration has problems.");
            }
        }
        result
    }

    /// Reads everything again. Changes nothing.
    fn read(&self, in_force: &Config) -> Result<(Reloaded, Next), Problems> {
        let Some(sources) = self.sources.clone() else { return Err(Problems(Vec::new())) };
        let path = sources.path();
        let before = path.as_deref().map(contents);
        let load::Loaded { config: read, warnings, origins, .. } = load::load(sources)?;
        let config = merged(in_force, &read);
        load::check_again(&config)?;
        let next = self.parts(config, origins).map_err(|message| one_problem("", message))?;
        std::thread::sleep(SETTLE);
        if let Some(path) = path {
            check_settled(&path, before)?;
        }
        // The issuers of a certificate come last: without them, a chain that is being written looks whole.
        if next.pair.as_ref().is_some_and(|pair| !pair.has_settled()) {
            return Err(one_problem("tls.certificate", CHANGING.to_owned()));
        }
        let changes = self.changes(in_force, &read, &next);
        Ok((Reloaded { changes, warnings }, next))
    }

    /// Makes the parts that replace those in use.
    fn parts(&self, config: Config, origins: Origins) -> Result<Next, String> {
        let before = self.core.api_keys.in_force();
        let pair = match (&self.pair, config.tls.files()) {
            (Some(pair), Some((certificate, key))) => Some(pair.read(certificate, key)?),
            _ => None,
        };
        let api_keys = KeyTable::read(&config.api, Some(&before))?;
        let jwt_keys = match config.verifies_jwt() {
            true => KeyRing::read(&config.jwt)?,
            false => KeyRing::default(),
        };
        Ok(Next { config, origins, pair, api_keys, jwt_keys })
    }

    /// Compares values, and the contents of files that are in use.
    fn changes(&self, in_force: &Config, read: &Config, next: &Next) -> Changes {
        let mut changes = Changes::between(in_force, read);
        if let (Some(pair), Some(next)) = (&self.pair, &next.pair)
            && pair.differs(next)
        {
            changes.add_contents("tls.certificate");
        }
        if next.jwt_keys.differs_in_public_key(&self.core.jwt_keys.in_force()) {
            changes.add_contents("jwt.public_key_file");
        }
        // Files of API keys are read every few seconds, so that values of the last reload may be old.
        let (plain, named) = next.api_keys.differs(&self.core.api_keys.in_force());
        for (differs, path) in [(plain, "api.keys"), (named, "api.key")] {
            match differs {
                true => changes.add_contents(path),
                false => changes.take_out(path),
            }
        }
        changes
    }

    /// Replaces the parts in use. Cannot fail, so that all of them are replaced.
    fn put_in_force(&self, next: Next) -> Config {
        let Next { config, origins, pair, api_keys, jwt_keys } = next;
        let Core { attempts, resumes, allowed_origins, .. } = &*self.core;
        if let (Some(pair), Some(next)) = (&self.pair, pair) {
            pair.replace(next);
        }
        self.core.api_keys.replace_all(api_keys);
        self.core.jwt_keys.replace(jwt_keys);
        allowed_origins.replace(&config.server.allowed_origins);
        attempts.allow(config.rate_limit.max_requests, config.rate_limit.window);
        resumes.allow(config.limits.resumes_per_second);
        self.families.reload(&config);
        if let Err(error) = log::set_level(&config.log.level) {
            // The level was parsed by the same rule when the configuration was read.
            error!(error, "The level of the log stays as it was.");
        }
        *self.core.in_force.lock() = Some(Arc::new((config.clone(), origins)));
        config
    }
}

impl Source for Reloader {
    fn collect(&self, scrape: &mut Scrape) {
        let ReloadCounters { done, refused, done_at } = &self.counters;
        let scrape = scrape.section(Section::Process);
        let help = "Reloads of the configuration: done, or refused since it has problems";
        let samples = [("done", done), ("refused", refused)];
        let samples = samples.map(|(outcome, counter)| ([("outcome", outcome)], counter.value()));
        scrape.counters("reloads", help, samples);
        let help = "Unix time of the last reload that was done, or of the start";
        scrape.gauge("reload_done_timestamp_seconds", help, done_at.load(Relaxed));
    }
}

impl Reloaded {
    /// Returns the answer for programs.
    #[must_use]
    pub fn json(&self) -> Value {
        let list = |changes: &[Change]| changes.iter().map(Change::json).collect::<Vec<_>>();
        json!({
            "changed": list(&self.changes.reloaded),
            "needs_restart": list(&self.changes.needs_restart),
            "warnings": self.warnings,
        })
    }
}

/// Parts that are ready to replace those in use.
struct Next {
    config: Config,
    origins: Origins,
    pair: Option<NewPair>,
    api_keys: KeyTable,
    jwt_keys: KeyRing,
}

/// Checks that the file did not change while it was read: a part of it may be valid, and would reset all other keys.
fn check_settled(path: &Path, before: Option<Option<Vec<u8>>>) -> Result<(), Problems> {
    let is_settled = match (before, contents(path)) {
        (Some(Some(before)), Some(after)) => before == after,
        _ => false,
    };
    match is_settled {
        true => Ok(()),
        false => Err(one_problem(&path.display().to_string(), CHANGING.to_owned())),
    }
}

fn contents(path: &Path) -> Option<Vec<u8>> {
    path.is_file().then(|| std::fs::read(path).ok()).flatten()
}

fn one_problem(key: &str, message: String) -> Problems {
    Problems(vec![Problem { origin: None, key: key.to_owned(), value: None, message }])
}

/// Returns the names of keys, with their new values where these are not secret.
fn listed(changes: &[Change]) -> String {
    let mut text = String::new();
    for change in changes {
        let comma = if text.is_empty() { "" } else { ", " };
        let _ = write!(text, "{comma}{}", change.key.path());
        if let Some((_, to)) = change.values.as_ref().filter(|_| !change.key.secret) {
            let _ = write!(text, " = {to}");
        }
    }
    text
}

fn now() -> i64 {
    time::since_epoch().as_secs().cast_signed()
}

/// Upper bound of the time that one answer waits for earlier reloads, and again for the files.
const WAIT_MAX: Duration = Duration::from_secs(10);

/// Problem of a file that is being written.
const CHANGING: &str = "has changed while it was read: reload again once it is written";

/// Time for which the files must stay as they were read.
const SETTLE: Duration = Duration::from_millis(100);

/// Problems of one reload that are logged, each on a line.
const LOGGED_PROBLEMS_MAX: usize = 20;
