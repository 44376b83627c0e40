//! The keys of the worker API while an instance runs: secrets, names and scopes, and the files that are read again.

use std::{
    fmt,
    io::Read,
    path::{Path, PathBuf},
    sync::Arc,
};

use parking_lot::{Mutex, RwLock};
use secrecy::{ExposeSecret, SecretString};
use tracing::{info, warn};

use crate::{
    auth,
    config::{
        ApiConfig,
        api_key::{KeySecret, Scopes},
        read_api_keys,
    },
    telemetry::{
        counter::Counter,
        scrape::{Scrape, Section, Source},
    },
};

/// All keys of the worker API.
#[derive(Debug)]
pub struct ApiKeys {
    /// Guards the keys in force, which a reload of the configuration replaces.
    table: RwLock<Arc<KeyTable>>,
}

/// The keys of one configuration.
#[derive(Debug)]
pub struct KeyTable(Vec<Arc<ApiKeyEntry>>);

/// A key with its name, or all keys without one.
#[derive(Debug)]
pub struct ApiKeyEntry {
    name: Box<str>,
    scopes: Scopes,
    /// The file of the secrets; `None` if they are in the configuration.
    file: Option<SecretsFile>,
    /// Guards the secrets in use.
    secrets: RwLock<Vec<SecretString>>,
    /// Calls with the key. A key keeps them when the table is replaced.
    pub calls: Arc<KeyCalls>,
}

/// Calls with a key.
#[derive(Debug, Default)]
pub struct KeyCalls {
    /// Accepted calls.
    pub accepted: Counter,
    /// Calls that the key's scopes do not allow.
    pub refused: Counter,
}

#[derive(Debug)]
struct SecretsFile {
    path: PathBuf,
    /// Set if the file may hold several keys.
    many: bool,
    /// The present problem of the file, which is logged once.
    trouble: Mutex<Option<String>>,
}

/// The key that a worker has shown.
#[derive(Clone)]
pub struct Found {
    entry: Arc<ApiKeyEntry>,
    /// Number of the secret within the entry, from 1.
    number: usize,
}

impl ApiKeys {
    /// Puts keys in force.
    #[must_use]
    pub fn new(table: KeyTable) -> Self {
        Self { table: RwLock::new(Arc::new(table)) }
    }

    /// Returns the keys in force.
    #[must_use]
    pub fn in_force(&self) -> Arc<KeyTable> {
        Arc::clone(&self.table.read())
    }

    /// Replaces the keys. Keys that keep their name go on counting.
    pub fn replace_all(&self, table: KeyTable) {
        *self.table.write() = Arc::new(table);
    }

    /// Returns the key with this secret. Compares all keys, so that the duration does not reveal a similar key.
    #[must_use]
    pub fn find(&self, secret: &[u8]) -> Option<Found> {
        let mut found = None;
        for entry in &self.in_force().0 {
            for (at, known) in entry.secrets.read().iter().enumerate() {
                if auth::equal(known.expose_secret().as_bytes(), secret) {
                    found = Some(Found { entry: Arc::clone(entry), number: at + 1 });
                }
            }
        }
        found
    }

    /// Returns whether a key is in a file.
    #[must_use]
    pub fn has_files(&self) -> bool {
        self.in_force().0.iter().any(|entry| entry.file.is_some())
    }

    /// Reads the files again. The keys of a file that cannot be used stay in use. Blocks.
    pub fn read_again(&self) {
        for entry in &self.in_force().0 {
            let Some(file) = &entry.file else { continue };
            // A pipe gives its bytes once, and blocks for ever at the next read.
            if std::fs::metadata(&file.path).is_ok_and(|found| !found.is_file()) {
                continue;
            }
            match file.read().and_then(|secrets| self.replace(entry, secrets)) {
                Ok(is_changed) => {
                    let was_in_trouble = file.trouble.lock().take().is_some();
                    if is_changed || was_in_trouble {
                        info!(key = &*entry.name, path = %file.path.display(), "The file of an API key was read again.");
                    }
                }
                Err(problem) => {
                    let before = file.trouble.lock().replace(problem.clone());
                    if before.as_ref() != Some(&problem) {
                        warn!(
                            key = &*entry.name,
                            error = problem,
                            "The file of an API key cannot be used: the key stays as it was."
                        );
                    }
                }
            }
        }
    }

    /// Puts the secrets in use; returns whether they differ from those before.
    fn replace(&self, entry: &ApiKeyEntry, secrets: Vec<SecretString>) -> Result<bool, String> {
        for secret in &secrets {
            let owner = self.find(secret.expose_secret().as_bytes());
            if owner.is_some_and(|owner| !std::ptr::eq(&*owner.entry, entry)) {
                return Err("holds the secret of another key".into());
            }
        }
        let mut known = entry.secrets.write();
        let text = |secret: &SecretString| secret.expose_secret().to_owned();
        let is_changed = !known.iter().map(text).eq(secrets.iter().map(text));
        *known = secrets;
        Ok(is_changed)
    }
}

impl Source for ApiKeys {
    /// Counts calls by the name of the key; the configuration bounds the number of names.
    fn collect(&self, scrape: &mut Scrape) {
        let help = "Calls of the worker API with a known key: accepted, or refused since the key \
            lacks the scope";
        let table = self.in_force();
        let samples = table.0.iter().flat_map(|entry| {
            let KeyCalls { accepted, refused } = &*entry.calls;
            [("accepted", accepted), ("missing_scope", refused)].map(|(outcome, counter)| {
                ([("key", entry.name()), ("outcome", outcome)], counter.value())
            })
        });
        scrape.section(Section::Api).counters("api_calls", help, samples);
    }
}

impl KeyTable {
    /// Reads the keys of a configuration, including those in files. Keys that are in the table `before` too go on
    /// counting. Blocks.
    ///
    /// # Errors
    /// A sentence for the operator: a file cannot be used.
    pub fn read(config: &ApiConfig, before: Option<&Self>) -> Result<Self, String> {
        let plain = ApiKeyEntry {
            file: config.keys_file.clone().map(|path| SecretsFile::new(path, true)),
            secrets: RwLock::new(config.keys.clone()),
            ..ApiKeyEntry::new(NAMELESS, Scopes::all(), before)
        };
        let mut entries = vec![Arc::new(plain)];
        for key in &config.key {
            let (file, secrets) = match &key.secret {
                KeySecret::Text(secret) => (None, vec![secret.clone()]),
                KeySecret::File(path) => {
                    let file = SecretsFile::new(path.clone(), false);
                    let secrets =
                        file.read().map_err(|problem| format!("{} {problem}", key.name))?;
                    (Some(file), secrets)
                }
            };
            let secrets = RwLock::new(secrets);
            let entry = ApiKeyEntry::new(&key.name, key.scopes, before);
            entries.push(Arc::new(ApiKeyEntry { file, secrets, ..entry }));
        }
        Ok(Self(entries))
    }

    /// Returns whether the keys without a name, and those with one, differ from those of `other`.
    #[must_use]
    pub fn differs(&self, other: &Self) -> (bool, bool) {
        let parts = |table: &Self| {
            let entries: Vec<_> = table.0.iter().map(|entry| entry.written()).collect();
            entries.into_iter().partition::<Vec<_>, _>(|(name, ..)| name == NAMELESS)
        };
        let ((plain, named), (other_plain, other_named)) = (parts(self), parts(other));
        (plain != other_plain, named != other_named)
    }
}

impl ApiKeyEntry {
    fn new(name: &str, scopes: Scopes, before: Option<&KeyTable>) -> Self {
        let same = before.and_then(|table| table.0.iter().find(|entry| *entry.name == *name));
        let calls = same.map(|entry| Arc::clone(&entry.calls)).unwrap_or_default();
        Self { name: name.into(), scopes, file: None, secrets: RwLock::default(), calls }
    }

    /// Returns all that makes the key what it is.
    fn written(&self) -> (String, Scopes, Option<PathBuf>, Vec<String>) {
        let secrets = self.secrets.read();
        let secrets = secrets.iter().map(|secret| secret.expose_secret().to_owned()).collect();
        let file = self.file.as_ref().map(|file| file.path.clone());
        (self.name.to_string(), self.scopes, file, secrets)
    }

    /// Returns the name in metrics.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }
}

impl Found {
    /// Returns the calls with the key.
    #[must_use]
    pub fn calls(&self) -> &KeyCalls {
        &self.entry.calls
    }

    /// Returns the scopes of the key.
    #[must_use]
    pub fn scopes(&self) -> Scopes {
        self.entry.scopes
    }
}

/// Writes the name for logs; for a key without a name its place in the list.
impl fmt::Display for Found {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.entry.name)?;
        if &*self.entry.name == NAMELESS { write!(f, "[{}]", self.number) } else { Ok(()) }
    }
}

impl SecretsFile {
    fn new(path: PathBuf, many: bool) -> Self {
        Self { path, many, trouble: Mutex::default() }
    }

    fn read(&self) -> Result<Vec<SecretString>, String> {
        read_file(&self.path, self.many)
    }
}

/// Reads the keys in a file, one unless `many`. The error completes "the key …" and quotes no part of the file.
pub(crate) fn read_file(path: &Path, many: bool) -> Result<Vec<SecretString>, String> {
    let mut text = String::new();
    let opened = std::fs::File::open(path);
    let read = opened.and_then(|file| file.take(FILE_BYTES_MAX).read_to_string(&mut text));
    read.map_err(|error| format!("has a file that cannot be read, {}: {error}", path.display()))?;
    let keys = read_api_keys(&text).filter(|keys| !keys.is_empty() && (many || keys.len() == 1));
    keys.ok_or_else(|| {
        let what = if many { "keys" } else { "one key" };
        format!(
            "has a file, {}, that does not hold {what} of 16 to 256 visible ASCII characters",
            path.display()
        )
    })
}

/// The name that all keys of `api.keys` share. A key in `[[api.key]]` cannot have it too, since the check of the
/// configuration compares names.
pub(crate) const NAMELESS: &str = "api.keys";

/// Upper bound of a file's size: more than any sensible number of keys.
const FILE_BYTES_MAX: u64 = 64 * 1024;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::api_key::{ApiKey, Scope};

    const OLD: &str = "old-secret-0123456789";
    const NEW: &str = "new-secret-0123456789";

    fn keys(path: &Path) -> ApiKeys {
        let key = |name: &str, secret, scope| ApiKey {
            name: name.into(),
            secret,
            scopes: [scope].into_iter().collect(),
        };
        let config = ApiConfig {
            keys: vec!["plain-secret-0123456789".into()],
            keys_file: None,
            key: vec![
                key("file", KeySecret::File(path.into()), Scope::Events),
                key("text", KeySecret::Text("text-secret-0123456789".into()), Scope::Sessions),
            ],
        };
        ApiKeys::new(KeyTable::read(&config, None).unwrap())
    }

    fn name(keys: &ApiKeys, secret: &str) -> Option<String> {
        keys.find(secret.as_bytes()).map(|found| found.to_string())
    }

    #[test]
    fn a_secret_leads_to_its_name_and_scopes() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("key");
        std::fs::write(&path, format!("{OLD}\r\n")).unwrap();
        let keys = keys(&path);
        assert_eq!(name(&keys, "plain-secret-0123456789").as_deref(), Some("api.keys[1]"));
        assert_eq!(name(&keys, OLD).as_deref(), Some("file"));
        assert_eq!(name(&keys, "text-secret-0123456789").as_deref(), Some("text"));
        assert_eq!((name(&keys, ""), name(&keys, "text-secret-012345678")), (None, None));
        let scopes = keys.find(OLD.as_bytes()).unwrap().scopes();
        assert!(scopes.has(Scope::Events) && !scopes.has(Scope::Sessions));
    }

    #[test]
    fn a_changed_file_is_used_and_a_useless_one_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("key");
        std::fs::write(&path, OLD).unwrap();
        let keys = keys(&path);
        for useless in
            ["", "\n", "short", "two-keys-0123456789\nin-one-0123456789", "text-secret-0123456789"]
        {
            std::fs::write(&path, useless).unwrap();
            keys.read_again();
            assert_eq!(name(&keys, OLD).as_deref(), Some("file"), "{useless:?}");
        }
        std::fs::remove_file(&path).unwrap();
        keys.read_again();
        assert_eq!(name(&keys, OLD).as_deref(), Some("file"));
        std::fs::write(&path, NEW).unwrap();
        keys.read_again();
        assert_eq!((name(&keys, OLD), name(&keys, NEW).as_deref()), (None, Some("file")));
    }

    #[test]
    fn a_replaced_table_counts_on_and_tells_its_differences() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("key");
        std::fs::write(&path, OLD).unwrap();
        let keys = keys(&path);
        keys.find(OLD.as_bytes()).unwrap().calls().accepted.add(3);
        let table = |secret: &str| {
            let secret = KeySecret::Text(secret.into());
            let scopes = Scopes::all();
            let key = vec![ApiKey { name: "file".into(), secret, scopes }];
            let plain = vec!["plain-secret-0123456789".into()];
            let config = ApiConfig { keys: plain, keys_file: None, key };
            KeyTable::read(&config, Some(&keys.in_force())).unwrap()
        };
        assert_eq!(table(NEW).differs(&keys.in_force()), (false, true));
        assert_eq!(table(NEW).differs(&table(NEW)), (false, false));
        assert_eq!(table(NEW).differs(&table(OLD)), (false, true));
        keys.replace_all(table(NEW));
        assert!(keys.find(OLD.as_bytes()).is_none() && !keys.has_files());
        assert_eq!(keys.find(NEW.as_bytes()).unwrap().calls().accepted.value(), 3);
    }

    #[test]
    fn a_file_without_a_key_keeps_the_instance_from_starting() {
        let folder = tempfile::tempdir().unwrap();
        let missing = read_file(&folder.path().join("missing"), false).unwrap_err();
        assert!(missing.contains("cannot be read"), "{missing}");
        let path = folder.path().join("key");
        std::fs::write(&path, "secret but short").unwrap();
        let error = read_file(&path, false).unwrap_err();
        assert!(error.contains("16 to 256") && !error.contains("short"), "{error}");
    }
}
