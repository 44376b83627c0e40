//! The configuration for people: the example, the effective values, the reference page.

use std::fmt::Write;

use serde::Serialize;

use super::{
    Config,
    environment::PREFIX,
    keys::{self, Key, SECTIONS},
    load::{CONFIG_ENV, Loaded, Origins},
    problem::ValueOrigin,
};

/// A file with every key, each commented out and at its default.
#[must_use]
pub fn example() -> String {
    let mut text = String::from(
        "# wsproxy: every key, with its default. Remove the # before a key to change it.\n\
         # Times are whole seconds or such as \"500ms\", sizes are bytes or such as \"64KiB\".\n",
    );
    for (section, doc) in SECTIONS {
        text += &format!("\n# {doc}\n[{section}]\n");
        for key in keys_of(section) {
            let value = key.write(&Config::default());
            let change = if key.reloads { "" } else { " A change needs a restart." };
            text += &format!("# {}\n# Must be {}.{change}\n", key.doc, key.allowed());
            text += &format!("#{} = {value}\n", key.name);
        }
    }
    text
}

/// The values in effect, each with its origin; secrets as `***`.
#[must_use]
pub fn show(loaded: &Loaded) -> String {
    let mut text = String::new();
    for (section, _) in SECTIONS {
        text += &format!("{}[{section}]\n", if text.is_empty() { "" } else { "\n" });
        for key in keys_of(section) {
            let line = format!("{} = {}", key.name, key.write(&loaded.config));
            text += &format!("{line:<40} # {}\n", loaded.origin(key));
        }
    }
    text
}

/// A key with its value in effect, for programs.
#[derive(Debug, Clone, Serialize)]
pub struct Setting {
    section: &'static str,
    name: &'static str,
    value: String,
    origin: Option<String>,
    is_default: bool,
    doc: &'static str,
}

/// The values in effect, each with its origin where `origins` are known; secrets as `***`.
#[must_use]
pub fn settings(config: &Config, origins: Option<&Origins>) -> Vec<Setting> {
    let setting = |key: &'static Key| {
        let origin = origins.map(|origins| origins.of(key));
        let is_default = match origin {
            Some(origin) => *origin == ValueOrigin::Default,
            None => key.write(config) == key.write(&Config::default()),
        };
        Setting {
            section: key.section,
            name: key.name,
            value: key.write(config),
            origin: origin.map(ToString::to_string),
            is_default,
            doc: key.doc,
        }
    };
    keys::all().map(setting).collect()
}

/// The reference page, `docs/reference/configuration.md`.
#[must_use]
pub fn markdown() -> String {
    let mut text = INTRODUCTION.replace("{CONFIG_ENV}", CONFIG_ENV).replace("{PREFIX}", PREFIX);
    for (section, doc) in SECTIONS {
        text += &format!("\n## `[{section}]`\n\n{doc}\n\n");
        text += "| key | default | what | other names | a change needs |\n|---|---|---|---|---|\n";
        for key in keys_of(section) {
            let value = key.write(&Config::default());
            let (doc, allowed) = (cell(key.doc), cell(&key.allowed()));
            let names = other_names(key);
            let needs = if key.reloads { "reload" } else { "restart" };
            text += &format!(
                "| `{}` | `{value}` | {doc} Must be {allowed}. | {names} | {needs} |\n",
                key.name
            );
        }
    }
    text += "\n## Short names of variables\n\n| variable | key |\n|---|---|\n";
    for key in keys::all() {
        if let Some(alias) = key.alias {
            let unit = if alias.unit.is_empty() { "" } else { ", a bare number in milliseconds" };
            let over = alias.over.map(|over| format!(" (`{over}` wins over it)"));
            let over = over.unwrap_or_default();
            text += &format!("| `{}`{over} | `{}`{unit} |\n", alias.name, key.path());
        }
    }
    text += "\n`DATABASE_URL` and `DATABASE_URL_FILE` are read only where agents are served (`endpoints.agents`), and by \
             the commands `migrate` and `agents`: elsewhere they may belong to other services of a deployment. Where rooms \
             are served, `METRICS_SAMPLE_SIZE` and `LATENCY_TRACKING_ENABLED` of older gateways are accepted and change \
             nothing: the latency of every message is measured. Of the `OTEL_…` variables, only those that switch traces on or \
             off are read while they are off. The log names each of these variables once.\n";
    text
}

fn keys_of(section: &str) -> impl Iterator<Item = &'static Key> {
    keys::all().filter(move |key| key.section == section)
}

fn other_names(key: &Key) -> String {
    let mut names = String::new();
    if let Some(flag) = key.flag {
        let _ = write!(names, "`--{}`", flag.name);
    }
    if let Some(alias) = key.alias {
        let comma = if names.is_empty() { "" } else { ", " };
        let _ = write!(names, "{comma}`{}`", alias.name);
    }
    names
}

/// Text that Markdown shows as it is.
fn cell(text: &str) -> String {
    text.replace('|', "\\|").replace('<', "&lt;").replace('*', "\\*").replace('_', "\\_")
}

const INTRODUCTION: &str = "# Configuration

<!-- Generated from the table of keys. `UPDATE_DOCS=1 cargo test -p wsproxy --test cli` writes it anew. -->

The value of a key comes from the first of these that has it:

1. a flag of the command line,
2. the environment variable `{PREFIX}SECTION__KEY`, such as `{PREFIX}SERVER__PORT` (two underscores between section and key),
3. the key's short variable, such as `PORT`, where it has [one](#short-names-of-variables); empty text means that it is not set,
4. the file that `--config` or `{CONFIG_ENV}` names (no file is read unless one is named),
5. the default.

- **Times** are whole seconds, or text with units: `30`, `\"500ms\"`, `\"1m 30s\"`.
- **Sizes** are bytes, or text with a unit: `65536`, `\"64KiB\"`, `\"10MB\"`.
- **Lists** are TOML arrays; in the environment, text with commas between the values.
- **Lists of tables** (`api.key`) are `[[api.key]]` in the file; in the environment, a JSON array of objects:
  `{PREFIX}API__KEY='[{\"name\":\"chat\",\"secret\":\"…\",\"scopes\":[\"sessions\"]}]'`.
- **Secrets** (`redis.url`, `redis.sentinel_password`, `jwt.secret_key`, `api.keys`, `api.key`, `traces.headers`, `tunnel_agent.token`, `tunnel_agent.upstream_token`) can come from a file: set the variable with `_FILE` at its end, such as
  `REDIS_URL_FILE` or `{PREFIX}API__KEYS_FILE`, to its path. They are never shown. A file that is empty, and a variable beside its own `_FILE`, are problems.
- Variables which Kubernetes sets for a service named `wsproxy` (such as `{PREFIX}SERVICE_HOST`) are not taken for keys.

**A change needs** a reload or a restart: the last column says which. [Reload](../deploy/reload.md) says how. Flags and
variables of a running process cannot change; the files that variables name are read again.

| command | prints |
|---|---|
| `wsproxy config check` | every problem at once: the key, its value, its origin and the allowed values; exits with 78. Unknown sections, keys and `{PREFIX}…` variables are problems. Values that are allowed but probably not meant, such as an empty `REDIS_URL_FILE` or `REDIS_URI` for `REDIS_URL`, are warnings, here and in the log at the start. `--json` is for programs |
| `wsproxy config show` | the values in effect with their origin |
| `wsproxy config example` | a file with every key |
";
