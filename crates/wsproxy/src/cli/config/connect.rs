//! `wsproxy config check --connect`: what the configuration meets on this machine and at its servers, as findings.

use std::{fmt, time::Duration};

use serde_json::{Value, json};

use crate::config::Config;

mod cluster;
mod database;
mod host;
mod nodes;
mod port;
mod proxies;
mod redis;
mod rights;
mod tls;

/// Weight of a finding.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Level {
    /// As it should be.
    Ok,
    /// It works, and will not in some case that is named.
    Warning,
    /// It does not work.
    Error,
}

/// One thing that was looked at.
#[derive(Debug, Clone)]
pub(super) struct Finding {
    level: Level,
    /// The part that was looked at, such as `redis`.
    part: &'static str,
    what: String,
    /// The thing to do; empty where there is nothing.
    advice: String,
}

impl Finding {
    fn ok(part: &'static str, what: impl Into<String>) -> Self {
        Self { level: Level::Ok, part, what: what.into(), advice: String::new() }
    }

    fn warning(part: &'static str, what: impl Into<String>, advice: impl Into<String>) -> Self {
        Self { level: Level::Warning, part, what: what.into(), advice: advice.into() }
    }

    fn error(part: &'static str, what: impl Into<String>, advice: impl Into<String>) -> Self {
        Self { level: Level::Error, part, what: what.into(), advice: advice.into() }
    }

    /// Puts the name of the server that was looked at in front.
    fn of(mut self, server: &str) -> Self {
        self.what = format!("{server}: {}", self.what);
        self
    }

    /// Returns JSON for programs.
    pub(super) fn json(&self) -> Value {
        let advice = Some(&self.advice).filter(|advice| !advice.is_empty());
        json!({
            "level": self.level.to_string(), "part": self.part, "what": self.what, "do": advice,
        })
    }
}

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ok => "ok",
            Self::Warning => "warning",
            Self::Error => "error",
        })
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:<8} {}: {}", self.level.to_string(), self.part, self.what)?;
        if self.advice.is_empty() { Ok(()) } else { write!(f, "\n         Do: {}", self.advice) }
    }
}

/// Looks at everything. Each part has a deadline of its own, so that a server that hangs ends the command in seconds.
///
/// # Errors
/// There is no runtime.
pub(super) fn examine(config: &Config) -> std::io::Result<Vec<Finding>> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let mut findings = host::examine(config);
    findings.extend(port::examine(config));
    findings.extend(tls::examine(&config.tls));
    findings.extend(proxies::examine(config));
    let (redis, database) = runtime.block_on(async {
        let redis = within("redis", PART_MAX, async |found| redis::examine(config, found).await);
        let database = within("database", PART_MAX, async |found| {
            found.extend(database::examine(config).await);
        });
        tokio::join!(redis, database)
    });
    findings.extend(redis);
    findings.extend(database);
    // A lookup of a name cannot be cancelled.
    runtime.shutdown_background();
    Ok(findings)
}

/// Returns whether a finding is an error.
pub(super) fn has_error(findings: &[Finding]) -> bool {
    findings.iter().any(|finding| finding.level == Level::Error)
}

/// Looks at one part, or one server, for a bounded time. What was found until then counts.
async fn within(
    part: &'static str,
    time_max: Duration,
    look: impl AsyncFnOnce(&mut Vec<Finding>),
) -> Vec<Finding> {
    let mut findings = Vec::new();
    if tokio::time::timeout(time_max, look(&mut findings)).await.is_err() {
        let advice = "see whether the server hangs, and whether a firewall drops packets";
        findings.push(Finding::error(part, format!("no answer within {time_max:?}"), advice));
    }
    findings
}

/// Upper bound of the time for one part: sentinels, the master and replicas in turn.
const PART_MAX: Duration = Duration::from_secs(15);

/// Upper bound of the time for one connection or answer.
const ANSWER_MAX: Duration = Duration::from_secs(3);
