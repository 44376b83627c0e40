//! The differences between two configurations, and the part of them that a reload puts into force; reads no file.

use serde_json::{Value, json};

use super::{
    Config,
    keys::{self, Key},
};

/// A key whose value differs.
#[derive(Debug, Clone)]
pub struct Change {
    /// The key.
    pub key: &'static Key,
    /// The values before and after, as TOML; `None` where the key names a file, and the file has other contents.
    pub values: Option<(String, String)>,
}

/// The keys whose values differ between the configuration in force and another one.
#[derive(Debug, Clone, Default)]
pub struct Changes {
    /// Those that a reload puts into force.
    pub reloaded: Vec<Change>,
    /// All others.
    pub needs_restart: Vec<Change>,
}

impl Changes {
    /// Compares the configuration in force with another one.
    #[must_use]
    pub fn between(in_force: &Config, other: &Config) -> Self {
        let mut changes = Self::default();
        for key in keys::all().filter(|key| !(key.is_same)(in_force, other)) {
            let values = Some((key.write(in_force), key.write(other)));
            let list = match reloads(key, in_force, other) {
                true => &mut changes.reloaded,
                false => &mut changes.needs_restart,
            };
            list.push(Change { key, values });
        }
        changes
    }

    /// Adds the key of a file whose contents have changed, unless its value has changed too.
    pub fn add_contents(&mut self, path: &str) {
        let key = keys::all().find(|key| key.path() == path);
        let is_there =
            |key: &Key| self.reloaded.iter().any(|change| change.key.path() == key.path());
        if let Some(key) = key.filter(|key| !is_there(key)) {
            self.reloaded.push(Change { key, values: None });
        }
    }

    /// Takes out a key that turned out to have its new value already.
    pub fn take_out(&mut self, path: &str) {
        self.reloaded.retain(|change| change.key.path() != path);
    }
}

impl Change {
    /// Returns JSON for programs: the key, and the values before and after unless they are secret.
    #[must_use]
    pub fn json(&self) -> Value {
        let key = self.key.path();
        match &self.values {
            Some((from, to)) if !self.key.secret => json!({ "key": key, "from": from, "to": to }),
            _ => json!({ "key": key }),
        }
    }
}

/// Returns the configuration in force after a reload: values of `other` where a reload replaces them.
#[must_use]
pub fn merged(in_force: &Config, other: &Config) -> Config {
    let mut merged = in_force.clone();
    for key in keys::all().filter(|key| reloads(key, in_force, other)) {
        (key.copy)(&mut merged, other);
    }
    merged
}

/// Returns whether a reload puts the change of a key into force. TLS is switched on and off by a restart only: a
/// listener speaks it or does not.
fn reloads(key: &Key, in_force: &Config, other: &Config) -> bool {
    let is_switched = || in_force.tls.files().is_some() != other.tls.files().is_some();
    key.reloads && !(key.section == "tls" && is_switched())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_reloads_is_merged() {
        let (in_force, mut other) = (Config::default(), Config::default());
        other.server.port = 1;
        other.log.level = "debug".into();
        other.api.keys = vec!["secret-0123456789".into()];
        other.tls.certificate = Some("cert.pem".into());
        other.tls.key = Some("key.pem".into());
        let changes = Changes::between(&in_force, &other);
        let paths = |list: &[Change]| list.iter().map(|c| c.key.path()).collect::<Vec<_>>();
        assert_eq!(paths(&changes.reloaded), ["log.level", "api.keys"]);
        assert_eq!(paths(&changes.needs_restart), ["server.port", "tls.certificate", "tls.key"]);
        assert_eq!(
            changes.reloaded[0].json(),
            json!({ "key": "log.level", "from": "\"info\"", "to": "\"debug\"" })
        );
        assert_eq!(changes.reloaded[1].json(), json!({ "key": "api.keys" }));
        let merged = merged(&in_force, &other);
        assert_eq!((merged.server.port, &*merged.log.level), (8080, "debug"));
        assert!(merged.tls.files().is_none() && merged.api.keys.len() == 1);
    }

    #[test]
    fn a_changed_file_is_told_once_and_without_values() {
        let (in_force, mut other) = (Config::default(), Config::default());
        other.tls.certificate = Some("cert.pem".into());
        other.tls.key = Some("key.pem".into());
        let mut later = other.clone();
        later.tls.certificate = Some("new.pem".into());
        let mut changes = Changes::between(&other, &later);
        changes.add_contents("tls.certificate");
        changes.add_contents("tls.key");
        let told: Vec<_> = changes.reloaded.iter().map(Change::json).collect();
        let moved =
            json!({ "key": "tls.certificate", "from": "\"cert.pem\"", "to": "\"new.pem\"" });
        assert_eq!(told, [moved, json!({ "key": "tls.key" })]);
        assert!(Changes::between(&in_force, &in_force).reloaded.is_empty());
    }
}
