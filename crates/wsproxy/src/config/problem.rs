//! The problems of a configuration, and the origins of its values.

use std::fmt;

use serde_json::{Value, json};

/// Origin of a value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ValueOrigin {
    /// The default.
    Default,
    /// A line of the file.
    File {
        /// Path of the file, as given.
        path: String,
        /// Line, from 1.
        line: usize,
    },
    /// An environment variable.
    Env(String),
    /// A flag of the command line, without dashes.
    Flag(&'static str),
}

impl fmt::Display for ValueOrigin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Default => f.write_str("default"),
            Self::File { path, line } => write!(f, "{path}:{line}"),
            Self::Env(name) => write!(f, "env {name}"),
            Self::Flag(name) => write!(f, "flag --{name}"),
        }
    }
}

impl ValueOrigin {
    /// Returns JSON for programs: `kind` and its parts.
    fn json(&self) -> Value {
        match self {
            Self::Default => json!({ "kind": "default" }),
            Self::File { path, line } => json!({ "kind": "file", "path": path, "line": line }),
            Self::Env(name) => json!({ "kind": "environment", "name": name }),
            Self::Flag(name) => json!({ "kind": "flag", "name": format!("--{name}") }),
        }
    }
}

/// A problem of a configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// Origin of the value; `None` if no value is to blame (a file that cannot be read).
    pub origin: Option<ValueOrigin>,
    /// The key, as `section.key`, or the text in its place; empty if the origin names it.
    pub key: String,
    /// The value as it was given; `***` for a secret, `None` if it does not matter.
    pub value: Option<String>,
    /// The allowed values.
    pub message: String,
}

impl Problem {
    /// Returns JSON for programs: `origin`, `key`, `value` and `message`; `null` for an absent one.
    #[must_use]
    pub fn json(&self) -> Value {
        json!({
            "origin": self.origin.as_ref().map(ValueOrigin::json),
            "key": Some(&self.key).filter(|key| !key.is_empty()),
            "value": self.value,
            "message": self.message,
        })
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(origin) = &self.origin {
            write!(f, "{origin}")?;
        }
        if self.origin.is_some() && !self.key.is_empty() {
            f.write_str(": ")?;
        }
        f.write_str(&self.key)?;
        if let Some(value) = &self.value {
            write!(f, " = {value}")?;
        }
        write!(f, ": {}", self.message)
    }
}

/// All problems at once, so that an operator fixes them in one go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problems(pub Vec<Problem>);

impl fmt::Display for Problems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let s = if self.0.len() == 1 { "" } else { "s" };
        write!(f, "{} problem{s} in the configuration:", self.0.len())?;
        self.0.iter().try_for_each(|problem| write!(f, "\n  {problem}"))
    }
}

impl std::error::Error for Problems {}

/// Returns the candidate that is most similar to `name`; `None` if none is similar.
pub(super) fn nearest<'a>(
    name: &str,
    candidates: impl IntoIterator<Item = &'a str>,
) -> Option<&'a str> {
    let scored = candidates.into_iter().map(|known| (strsim::jaro_winkler(name, known), known));
    let best = scored.max_by(|a, b| a.0.total_cmp(&b.0))?;
    (best.0 > ALIKE).then_some(best.1)
}

/// Smallest Jaro-Winkler similarity of a suggestion: less similar ones confuse more than they help.
const ALIKE: f64 = 0.7;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_get_every_part_of_a_problem() {
        let problem = |origin, key: &str| {
            let message = "must be x".into();
            Problem { origin, key: key.into(), value: Some("1".into()), message }.json()
        };
        let file = ValueOrigin::File { path: "w.toml".into(), line: 3 };
        for (origin, json) in [
            (file, json!({ "kind": "file", "path": "w.toml", "line": 3 })),
            (ValueOrigin::Env("PORT".into()), json!({ "kind": "environment", "name": "PORT" })),
            (ValueOrigin::Flag("port"), json!({ "kind": "flag", "name": "--port" })),
            (ValueOrigin::Default, json!({ "kind": "default" })),
        ] {
            let expected =
                json!({ "origin": json, "key": "a.b", "value": "1", "message": "must be x" });
            assert_eq!(problem(Some(origin), "a.b"), expected);
        }
        assert!(problem(None, "")["key"].is_null() && problem(None, "")["origin"].is_null());
    }
}
