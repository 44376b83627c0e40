//! Reads file, environment and flags into a [`Config`], and reports all problems together.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    time::Duration,
};

use toml::{
    Spanned,
    de::{DeTable, DeValue},
};

use super::{
    Config,
    check::{NO_FILE, check, check_files, not_files},
    environment::{Environment, PREFIX},
    keys::{self, Key, REMOVED, SECTIONS},
    kind::{Raw, quoted},
    problem::{Problem, Problems, ValueOrigin, nearest},
};

mod doubt;

/// The sources of values; each later field wins over the earlier ones. Not `Debug`, since it holds secrets.
#[derive(Default, Clone)]
pub struct ConfigSources {
    /// Default values of keys that are not set.
    pub defaults: Config,
    /// The TOML file.
    pub file: Option<PathBuf>,
    /// Environment variables.
    pub environment: Environment,
    /// Keys set by flags.
    pub flags: Vec<(&'static Key, String)>,
    /// Whether files that an instance reads again while it runs, or only checks, stay closed: a command that needs none
    /// of them must not fail while one is replaced.
    pub skips_files: bool,
    /// Whether an instance that runs reads its files again. A pipe is then a problem: it gives its bytes only once, and
    /// a second read waits for ever.
    pub reads_again: bool,
}

impl ConfigSources {
    /// Returns the path of the file; `None` if no file is read.
    #[must_use]
    pub fn path(&self) -> Option<PathBuf> {
        self.file.clone().or_else(|| self.environment.path(CONFIG_ENV))
    }
}

/// A configuration without problems.
#[derive(Debug)]
pub struct Loaded {
    /// The values.
    pub config: Config,
    /// Variables that were set, and are not read: what needs them is off, or there is no need for them any more.
    pub ignored: Vec<&'static str>,
    /// Variables that are allowed but probably not meant, each a sentence.
    pub warnings: Vec<String>,
    /// Origins of the values.
    pub origins: Origins,
}

impl Loaded {
    /// Returns the origin of a key's value.
    #[must_use]
    pub fn origin(&self, key: &Key) -> &ValueOrigin {
        self.origins.of(key)
    }
}

/// Origins of the values that are not defaults, by `section.key`.
#[derive(Debug, Clone, Default)]
pub struct Origins(BTreeMap<String, ValueOrigin>);

impl Origins {
    /// Returns the origin of a key's value.
    #[must_use]
    pub fn of(&self, key: &Key) -> &ValueOrigin {
        self.0.get(&key.path()).unwrap_or(&ValueOrigin::Default)
    }
}

/// Reads all sources.
///
/// # Errors
/// [`Problems`]: all problems of all sources.
pub fn load(sources: ConfigSources) -> Result<Loaded, Problems> {
    let file = sources.path();
    let ConfigSources { defaults, environment, flags, skips_files, reads_again, .. } = sources;
    let mut loader = Loader { config: defaults, skips_files, reads_again, ..Loader::default() };
    if file.is_none() && environment.is_empty(CONFIG_ENV) {
        loader.warnings.push(format!("{CONFIG_ENV} is empty, so no file is read."));
    }
    if let Some(path) = file {
        match loader.read(&path) {
            Ok(text) => {
                TomlFile { path: path.display().to_string(), text: &text }.load(&mut loader)
            }
            Err(error) => {
                loader.bad = keys::all().map(Key::path).collect();
                loader.problems.push(Problem {
                    origin: None,
                    key: path.display().to_string(),
                    value: None,
                    message: format!("cannot be read: {error}"),
                });
            }
        }
    }
    loader.environment(&environment);
    for (key, text) in flags {
        let origin = ValueOrigin::Flag(key.flag.map_or("", |flag| flag.name));
        loader.set(key, &Raw::Text(text.clone()), quoted(&text), origin);
    }
    loader.check();
    loader.problems.sort_by_key(|problem| match problem.origin {
        None => 0,
        Some(ValueOrigin::File { line, .. }) => line,
        Some(_) => usize::MAX,
    });
    if !loader.problems.is_empty() {
        return Err(Problems(loader.problems));
    }
    let Loader { config, origins, mut warnings, .. } = loader;
    let unread = |key: &Key| key.alias.filter(|alias| !(alias.is_read)(&config));
    let set = |name: &str| environment.names().any(|given| given == name);
    let ignored = keys::all().filter_map(unread).flat_map(keys::Alias::names);
    let ignored = ignored.filter(|name| set(name) || set(&format!("{name}_FILE")));
    let of_rooms =
        OF_OLDER_ROOMS.iter().copied().filter(|name| config.endpoints.rooms && set(name));
    let ignored = ignored.chain(of_rooms).collect();
    let is_settled = |key: &Key| origins.contains_key(&key.path()) || unread(key).is_some();
    warnings.extend(doubt::doubtful(&environment, is_settled));
    warnings.extend(doubt::shared_address(&config, is_settled));
    warnings.extend(doubt::open_secrets(&config));
    Ok(Loaded { config, ignored, warnings, origins: Origins(origins) })
}

/// Checks a configuration in which a reload has replaced some values, while the others stay as they were.
///
/// # Errors
/// [`Problems`]: all broken rules.
pub fn check_again(config: &Config) -> Result<(), Problems> {
    let mut loader = Loader { config: config.clone(), reads_again: true, ..Loader::default() };
    loader.check();
    for problem in &mut loader.problems {
        problem.origin = None;
        problem.message += ", while the keys that need a restart keep their values";
    }
    if loader.problems.is_empty() { Ok(()) } else { Err(Problems(loader.problems)) }
}

#[derive(Default)]
struct Loader {
    config: Config,
    origins: BTreeMap<String, ValueOrigin>,
    /// Keys whose value was not allowed: problems that follow from their default would mislead.
    bad: BTreeSet<String>,
    problems: Vec<Problem>,
    warnings: Vec<String>,
    skips_files: bool,
    reads_again: bool,
}

impl Loader {
    fn read(&self, path: &Path) -> std::io::Result<String> {
        if self.reads_again && !std::fs::metadata(path)?.is_file() {
            return Err(std::io::Error::other(NO_FILE));
        }
        std::fs::read_to_string(path)
    }

    fn set(&mut self, key: &Key, raw: &Raw, shown: String, origin: ValueOrigin) {
        self.set_in_unit(key, raw, shown, origin, None);
    }

    /// Sets a key from a text. A bare number is in `unit` if that is given, else in the unit of the key.
    fn set_in_unit(
        &mut self,
        key: &Key,
        raw: &Raw,
        shown: String,
        origin: ValueOrigin,
        unit: Option<&str>,
    ) {
        if !(key.read)(&mut self.config, raw) {
            let value = if key.secret { "***".into() } else { shown };
            let why = (key.explain)(raw).unwrap_or_else(|| match unit {
                // "such as 30 (seconds)" would be wrong here.
                Some(unit) => format!(
                    "a bare number in this variable is {unit}; it must be {}",
                    key.allowed().split(", such as").next().unwrap_or_default()
                ),
                None => format!("must be {}", key.allowed()),
            });
            self.problems.push(Problem {
                origin: Some(origin.clone()),
                key: key.path(),
                value: Some(printable(&value)),
                message: why,
            });
            self.bad.insert(key.path());
        }
        self.origins.insert(key.path(), origin);
    }

    fn complain(&mut self, origin: ValueOrigin, key: String, message: String) {
        self.problems.push(Problem { origin: Some(origin), key, value: None, message });
    }

    fn environment(&mut self, environment: &Environment) {
        let mut known = BTreeSet::from([CONFIG_ENV.to_owned()]);
        // systemd names several directories with colons between them.
        let state = environment
            .path(STATE_DIRECTORY)
            .and_then(|path| path.into_os_string().into_string().ok());
        let state = state.as_deref().and_then(|paths| paths.split(':').next()).map(PathBuf::from);
        self.config.database.state_directory = state;
        for key in keys::all() {
            known.insert(key.env());
            known.extend(key.secret.then(|| key.file_env()));
            self.variable(key, environment);
        }
        for given in environment.ours().filter(|name| !known.contains(*name)) {
            let name = &given.to_ascii_uppercase();
            let own =
                |path: &str| format!("{PREFIX}{}", path.replace('.', "__")).to_ascii_uppercase();
            let message = removed(|path| own(path) == *name).unwrap_or_else(|| {
                let near = nearest(name, known.iter().map(String::as_str));
                near.map_or_else(
                    || format!("unknown variable; keys are {PREFIX}SECTION__KEY"),
                    |near| format!("unknown variable; did you mean {near}?"),
                )
            });
            self.complain(ValueOrigin::Env(printable(given)), String::new(), message);
        }
    }

    /// Returns the value of the first of these that is set: the key's variable, its file, its alias, the alias's file.
    fn variable(&mut self, key: &Key, environment: &Environment) {
        let own = (key.env(), "", false);
        // Compose files pass `PORT: ${PORT}` on as empty text: not set.
        let alias = key.alias.filter(|alias| (alias.is_read)(&self.config));
        let aliases = alias
            .into_iter()
            .flat_map(|alias| alias.names().map(move |name| (name.to_owned(), alias.unit, true)));
        for (name, unit, skip_empty) in std::iter::once(own).chain(aliases) {
            let set = environment.value(&name).filter(|v| !(skip_empty && *v == Ok("")));
            let file = format!("{name}_FILE");
            let path = environment.path(&file).filter(|_| key.secret && !keys::is_env(&file));
            if let (Some(_), Some(_)) = (&set, &path) {
                let message = format!("cannot be set together with {name}: remove one of them");
                self.bad.insert(key.path());
                return self.complain(ValueOrigin::Env(file), key.path(), message);
            }
            if let Some(value) = set {
                let origin = ValueOrigin::Env(name);
                let Ok(text) = value else {
                    return self.complain(origin, key.path(), "must be UTF-8".into());
                };
                let bare = !unit.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
                let raw = if bare { format!("{text}{unit}") } else { text.to_owned() };
                let unit = bare.then_some(MILLISECONDS);
                return self.set_in_unit(key, &Raw::Text(raw), quoted(text), origin, unit);
            }
            if let Some(path) = path {
                return self.secret_file(key, path, ValueOrigin::Env(file));
            }
        }
    }

    /// Reads a secret from a file. A file without a secret is a problem: no other source takes its place.
    fn secret_file(&mut self, key: &Key, path: PathBuf, origin: ValueOrigin) {
        if self.skips_files && key.path() == API_KEYS {
            return;
        }
        let message = match self.read(&path) {
            Ok(text) if text.trim().is_empty() => format!("the file {} is empty", path.display()),
            Ok(text) => {
                if key.path() == API_KEYS {
                    self.config.api.keys_file = Some(path);
                }
                return self.set(key, &Raw::Text(text), String::new(), origin);
            }
            Err(error) => format!("cannot read {}: {error}", path.display()),
        };
        self.bad.insert(key.path());
        self.complain(origin, key.path(), message);
    }

    fn check(&mut self) {
        let server = &mut self.config.server;
        // While two processes share a port, a balancer cannot tell whose /ready says 503.
        if server.reuse_port && !self.origins.contains_key("server.drain_delay") {
            server.drain_delay = Duration::ZERO;
        }
        let mut broken_rules = check(&self.config);
        let pipes = if self.reads_again { not_files(&self.config) } else { Vec::new() };
        if !self.skips_files && pipes.is_empty() {
            broken_rules.extend(check_files(&self.config));
        }
        broken_rules.extend(pipes);
        if self.config.server.unix.is_some() {
            self.check_unix_only();
        }
        for broken in broken_rules {
            let involved = [Some(broken.key), broken.other];
            if involved.into_iter().flatten().any(|key| self.bad.contains(key)) {
                continue;
            }
            let other = broken.other.map(|path| {
                let origin = self.origins.get(path).unwrap_or(&ValueOrigin::Default);
                format!(" {path} = {} ({origin})", self.written(path))
            });
            self.problems.push(Problem {
                origin: Some(self.origins.get(broken.key).unwrap_or(&ValueOrigin::Default).clone()),
                key: broken.key.into(),
                value: Some(self.written(broken.key)),
                message: broken.message + &other.unwrap_or_default(),
            });
        }
    }

    /// Finds an address that is set beside the unix socket: the gateway listens on one of both.
    fn check_unix_only(&mut self) {
        for key in ["server.bind", "server.port"].into_iter().filter(|key| !self.bad.contains(*key))
        {
            if let Some(origin) = self.origins.get(key).cloned() {
                let unix = format!("server.unix = {}", self.written("server.unix"));
                self.problems.push(Problem {
                    origin: Some(origin),
                    key: key.into(),
                    value: Some(self.written(key)),
                    message: format!("must not be set beside {unix}: remove one of them"),
                });
            }
        }
    }

    fn written(&self, path: &str) -> String {
        let key = keys::all().find(|key| key.path() == path);
        key.map(|key| key.write(&self.config)).unwrap_or_default()
    }
}

/// Reads the TOML file.
struct TomlFile<'a> {
    path: String,
    text: &'a str,
}

impl TomlFile<'_> {
    fn load(&self, loader: &mut Loader) {
        let (table, errors) = DeTable::parse_recoverable(self.text);
        for error in &errors {
            // The line itself is not quoted: it may hold a secret.
            let origin = self.origin(error.span().unwrap_or_default());
            let message = error.message().lines().next().unwrap_or("cannot be parsed");
            loader.complain(origin, "TOML".into(), message.into());
        }
        if !errors.is_empty() {
            // The parser goes on with guesses, whose problems would mislead.
            loader.bad = keys::all().map(Key::path).collect();
            return;
        }
        for (section, content) in table.get_ref() {
            self.section(section, content, loader);
        }
    }

    fn section(
        &self,
        section: &Spanned<toml::de::DeString<'_>>,
        content: &Spanned<DeValue<'_>>,
        loader: &mut Loader,
    ) {
        let (name, origin) = (section.get_ref().as_ref(), self.origin(section.span()));
        if !SECTIONS.iter().any(|(known, _)| *known == name) {
            let near = || nearest(name, SECTIONS.iter().map(|(known, _)| *known));
            let hint = match keys::all().find(|key| key.name == name) {
                Some(key) => format!("; did you mean {}?", key.path()),
                None => near().map(|n| format!("; did you mean [{n}]?")).unwrap_or_default(),
            };
            return loader.complain(origin, printable(name), format!("unknown section{hint}"));
        }
        let DeValue::Table(keys) = content.get_ref() else {
            return loader.complain(origin, name.into(), format!("must be a section: [{name}]"));
        };
        for (key, value) in keys {
            let (key, origin) = (key.get_ref().as_ref(), self.origin(key.span()));
            match keys::all().find(|known| known.section == name && known.name == key) {
                Some(known) => {
                    let shown = self.text.get(value.span()).unwrap_or_default();
                    loader.set(known, &raw(value.get_ref()), shown.to_owned(), origin);
                }
                None => {
                    let path = format!("{name}.{key}");
                    let message = removed(|removed| removed == path)
                        .unwrap_or_else(|| format!("unknown key{}", hint(name, key)));
                    loader.complain(origin, printable(&path), message);
                }
            }
        }
    }

    fn origin(&self, span: std::ops::Range<usize>) -> ValueOrigin {
        let before = self.text.get(..span.start).unwrap_or(self.text);
        ValueOrigin::File { path: self.path.clone(), line: before.matches('\n').count() + 1 }
    }
}

/// Returns advice for a key of an earlier version.
fn removed(fits: impl Fn(&str) -> bool) -> Option<String> {
    REMOVED.iter().find(|(path, _)| fits(path)).map(|(_, instead)| (*instead).into())
}

/// Returns the key with the same name in another section, else the most similar one, in its own section first.
fn hint(section: &str, name: &str) -> String {
    let here = || keys::all().filter(|key| key.section == section).map(|key| key.name);
    let elsewhere = keys::all().find(|key| key.name == name).map(Key::path);
    let near = elsewhere.or_else(|| nearest(name, here()).map(|near| format!("{section}.{near}")));
    let near = near.or_else(|| nearest(name, keys::all().map(|k| k.name)).and_then(whole_path));
    near.map(|near| format!("; did you mean {near}?")).unwrap_or_default()
}

fn whole_path(name: &str) -> Option<String> {
    keys::all().find(|key| key.name == name).map(Key::path)
}

fn raw(value: &DeValue<'_>) -> Raw {
    let scalar = |value: &DeValue<'_>| match value {
        DeValue::String(text) => Some(text.to_string()),
        DeValue::Integer(number) => i128::from_str_radix(number.as_str(), number.radix())
            .map_or_else(|_| Some(number.to_string()), |number| Some(number.to_string())),
        DeValue::Float(number) => Some(number.to_string()),
        DeValue::Boolean(switch) => Some(switch.to_string()),
        DeValue::Datetime(time) => Some(time.to_string()),
        DeValue::Array(_) | DeValue::Table(_) => None,
    };
    match value {
        DeValue::Array(values) => {
            let list: Option<_> = values.iter().map(|value| scalar(value.get_ref())).collect();
            let tables =
                || values.iter().map(|value| table(value.get_ref())).collect::<Option<_>>();
            list.map(Raw::List).or_else(|| tables().map(Raw::Tables)).unwrap_or(Raw::Nested)
        }
        value => scalar(value).map_or(Raw::Nested, Raw::Text),
    }
}

fn table(value: &DeValue<'_>) -> Option<Vec<(String, Raw)>> {
    let DeValue::Table(fields) = value else { return None };
    let field = |(name, value): (&Spanned<_>, &Spanned<_>)| {
        let name: &toml::de::DeString<'_> = name.get_ref();
        (name.to_string(), raw(value.get_ref()))
    };
    Some(fields.iter().map(field).collect())
}

/// Returns the value as one short line.
fn printable(text: &str) -> String {
    text.chars().take(120).map(|c| if c.is_control() { ' ' } else { c }).collect()
}

/// The variable that names the file if no flag does.
pub const CONFIG_ENV: &str = "WSPROXY_CONFIG";

/// Variable of systemd: the directories for the state of a service.
const STATE_DIRECTORY: &str = "STATE_DIRECTORY";

/// Variables of older gateways of rooms. Latency is always measured, and of every message.
const OF_OLDER_ROOMS: &[&str] = &["METRICS_SAMPLE_SIZE", "LATENCY_TRACKING_ENABLED"];

/// The unit of bare numbers in variables with another unit than their key.
const MILLISECONDS: &str = "milliseconds";

/// The key whose file is read again while the instance runs.
const API_KEYS: &str = "api.keys";

#[cfg(test)]
mod tests;
