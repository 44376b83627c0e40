//! `wsproxy reload`: asks a running instance to read its configuration again.

use std::{
    io::{self, ErrorKind},
    path::PathBuf,
    time::Duration,
};

use anyhow::{Context, anyhow};
use secrecy::{ExposeSecret, SecretString};
use serde_json::Value;

use super::{
    exit::Failure,
    http::{self, HttpPlace, Question},
    settings::{CliSettings, Everything},
};
use crate::{
    auth::api_keys,
    config::{
        ApiConfig, Config,
        api_key::{KeySecret, Scope},
    },
    tls,
};

/// Arguments of the command.
#[derive(clap::Args)]
#[command(after_help = EXAMPLE)]
pub(super) struct ReloadArgs {
    /// URL of the instance, such as http://127.0.0.1:9090, or http://unix:/file.sock over a unix socket. Default: the
    /// configured port or unix socket on this machine.
    #[arg(long, value_name = "URL", requires = "key_file")]
    url: Option<String>,
    /// File with an API key of the scope admin. Default: the first such key of the configuration.
    #[arg(long, value_name = "FILE")]
    key_file: Option<PathBuf>,
    /// Print the answer as JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    settings: CliSettings<Everything>,
}

/// Prints the answer of the instance.
pub(super) fn run(args: ReloadArgs) -> anyhow::Result<()> {
    let ReloadArgs { url, key_file, json, settings } = args;
    let key = key_file.map(|path| {
        let keys = api_keys::read_file(&path, false);
        keys.map_err(|problem| anyhow!("the key {problem}").context(Failure::Data))
    });
    let key = key.transpose()?.and_then(|keys| keys.into_iter().next());
    let (place, key, certificate) = match (url, key) {
        (Some(url), Some(key)) => (HttpPlace::read(&url).context(Failure::Data)?, key, None),
        (_, key) => {
            let config: Config = settings.load()?.config;
            let key = match key {
                Some(key) => key,
                None => admin_key(&config.api)?,
            };
            (HttpPlace::own(&config), key, config.tls.certificate)
        }
    };
    let place = place.route("/api/v1/reload");
    let trust = || {
        // An own certificate names hosts, and not the address of this machine: the certificate itself is compared.
        let config = match &certificate {
            Some(certificate) => tls::pinned_client_config(certificate),
            None => tls::client_config(None),
        };
        config.map_err(anyhow::Error::msg)
    };
    let key = key.expose_secret();
    let headers = &format!("Authorization: Bearer {key}\r\nContent-Length: 0\r\n");
    let question = Question { method: "POST", headers, time_max: TIME_MAX };
    let answer = place.ask(&question, trust, http::read_answer);
    let (status, body) = answer.with_context(|| format!("{place} does not answer"))?;
    let body: Value = serde_json::from_slice(&body).unwrap_or_default();
    if json {
        super::print(&format!("{body:#}\n"))?;
    }
    if status != 200 {
        return Err(failure(status, &body));
    }
    if json { Ok(()) } else { super::print(&text(&body)) }
}

/// Returns a key with the scope `admin`.
fn admin_key(api: &ApiConfig) -> anyhow::Result<SecretString> {
    if let Some(key) = api.keys.first() {
        return Ok(key.clone());
    }
    let key = api.key.iter().find(|key| key.scopes.has(Scope::Admin));
    let key = key
        .context("no API key with the scope admin is configured: give --key-file, or send SIGHUP");
    match &key.context(Failure::Config)?.secret {
        KeySecret::Text(secret) => Ok(secret.clone()),
        KeySecret::File(path) => {
            let keys = api_keys::read_file(path, false).map_err(anyhow::Error::msg)?;
            keys.into_iter().next().context("the file of the API key is empty")
        }
    }
}

fn failure(status: u16, body: &Value) -> anyhow::Error {
    let told = body["error"]["message"].as_str().unwrap_or("the answer tells no reason");
    let mut message = format!("status {status}: {told}");
    for problem in body["problems"].as_array().into_iter().flatten() {
        let part = |name: &str| problem[name].as_str().unwrap_or_default();
        let value = problem["value"].as_str().map(|value| format!(" = {value}"));
        let (key, value) = (part("key"), value.unwrap_or_default());
        message += &format!("\n  {key}{value}: {}", part("message"));
    }
    match status {
        401 | 403 => io::Error::new(ErrorKind::PermissionDenied, message).into(),
        409 => anyhow!(message).context(Failure::Config),
        503 | 504 => anyhow!(message).context(Failure::Unavailable),
        _ => anyhow!(message),
    }
}

/// Returns the answer for people.
fn text(body: &Value) -> String {
    let list = |name: &str| {
        let changes = body[name].as_array().into_iter().flatten();
        let lines = changes.map(|change| {
            let key = change["key"].as_str().unwrap_or_default();
            match (change["from"].as_str(), change["to"].as_str()) {
                (Some(from), Some(to)) => format!("  {key} = {to} (was {from})\n"),
                _ => format!("  {key}\n"),
            }
        });
        lines.collect::<String>()
    };
    let (changed, waits) = (list("changed"), list("needs_restart"));
    let mut text = match changed.is_empty() {
        true => "Reloaded: nothing has changed.\n".to_owned(),
        false => format!("Reloaded. Changed:\n{changed}"),
    };
    if !waits.is_empty() {
        text += &format!("Needs a restart:\n{waits}");
    }
    let warnings = body["warnings"].as_array().into_iter().flatten();
    text.extend(warnings.filter_map(Value::as_str).map(|warning| format!("Warning: {warning}\n")));
    text
}

/// Above the time that an instance takes for its answer.
const TIME_MAX: Duration = Duration::from_secs(25);

const EXAMPLE: &str = "Example:
  wsproxy reload --config /etc/wsproxy/wsproxy.toml

The configuration is read for the address and the API key: use the file, variables or flags of serve. Where the file \
has a new key that the instance does not know yet, give the old one in --key-file, or send SIGHUP.";
