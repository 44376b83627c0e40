//! Reloads of the configuration: what they answer, for every key, and that an instance without a file refuses them.

use std::{collections::BTreeMap, fmt::Write, fs, path::PathBuf};

use serde_json::{Value, json};
use tempfile::TempDir;
use wsproxy::config::{
    Config,
    keys::{self, Key},
    load::{ConfigSources, load},
};

use crate::support::{
    gateway::{API_KEY, TestInstance},
    http::Response,
    redis_server::RedisServer,
    sentinel::lone_sentinel,
    tls::Made,
};

mod behaviour;
mod faults;
mod program;
mod tunnel;

/// A configuration file of a test, with the values of its keys as TOML.
#[derive(Clone)]
struct Values(BTreeMap<(String, String), String>);

impl Values {
    /// An instance of a test: free ports of this machine, an API key, the echo.
    fn new() -> Self {
        let mut values = Self(BTreeMap::new());
        for (path, value) in [
            ("server.bind", "\"127.0.0.1\""),
            ("server.port", "0"),
            ("server.drain_delay", "0"),
            ("server.drain_spread", "0"),
            ("endpoints.echo", "true"),
            ("limits.max_connections", "1000"),
        ] {
            values.set(path, value);
        }
        values.set("api.keys", &format!("[\"{API_KEY}\"]"));
        values
    }

    fn set(&mut self, path: &str, value: &str) {
        let (section, name) = path.split_once('.').unwrap();
        self.0.insert((section.into(), name.into()), value.into());
    }

    fn unset(&mut self, path: &str) {
        self.0.retain(|(section, name), _| format!("{section}.{name}") != path);
    }

    fn with(&self, path: &str, value: &str) -> Self {
        let mut values = self.clone();
        values.set(path, value);
        values
    }

    fn text(&self) -> String {
        let mut text = String::new();
        let mut before = "";
        for ((section, name), value) in &self.0 {
            if section != before {
                let _ = writeln!(text, "[{section}]");
                before = section;
            }
            let _ = writeln!(text, "{name} = {value}");
        }
        text
    }
}

/// An instance with a configuration file in a folder of its own.
struct Reloading {
    folder: TempDir,
    instance: TestInstance,
}

impl Reloading {
    async fn start(values: &Values) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("wsproxy.toml");
        fs::write(&file, values.text()).unwrap();
        let sources = ConfigSources { file: Some(file), ..ConfigSources::default() };
        Self { folder, instance: TestInstance::from_sources(sources).await }
    }

    fn file(&self) -> PathBuf {
        self.folder.path().join("wsproxy.toml")
    }

    /// Writes a new file beside the old one and renames it, as operators should.
    fn write(&self, text: &str) {
        let new = self.folder.path().join("new");
        fs::write(&new, text).unwrap();
        fs::rename(&new, self.file()).unwrap();
    }

    async fn reload(&self) -> Response {
        self.instance.api("POST", "/api/v1/reload", "").await
    }

    /// Writes values and reloads them; answers the JSON.
    async fn to(&self, values: &Values) -> Value {
        self.write(&values.text());
        let response = self.reload().await;
        assert_eq!(response.status, 200, "{response:?}");
        response.json()
    }

    fn count(&self, outcome: &str) -> f64 {
        self.instance.metric(&format!("wsproxy_reloads_total{{outcome=\"{outcome}\"}}"))
    }
}

/// Names of the keys in a list of the answer.
fn names(answer: &Value, list: &str) -> Vec<String> {
    let changes = answer[list].as_array().unwrap_or_else(|| panic!("no {list}: {answer}"));
    changes.iter().map(|change| change["key"].as_str().unwrap().to_owned()).collect()
}

/// Loads values as an instance does.
fn loaded(folder: &TempDir, values: &Values) -> Option<Config> {
    let file = folder.path().join("tried.toml");
    fs::write(&file, values.text()).unwrap();
    let sources = ConfigSources { file: Some(file), ..ConfigSources::default() };
    load(sources).ok().map(|loaded| loaded.config)
}

/// Other values that may be allowed for a key, the likeliest first.
fn candidates(key: &Key, file: impl Fn(&str) -> String) -> Vec<String> {
    let given = match key.path().as_str() {
        "server.bind" => "\"127.0.0.2\"".into(),
        "admin.bind" => "\"127.0.0.3\"".into(),
        "server.trusted_proxies" => "[\"10.0.0.0/8\"]".into(),
        "server.allowed_origins" => "[\"https://app.example\"]".into(),
        "tls.certificate" => file("same-certificate.pem"),
        "tls.key" => file("same-key.pem"),
        "redis.ca_file" | "jwt.ca_file" | "traces.ca_file" | "tunnel.peer_ca_file" => {
            file("certificate.pem")
        }
        "tunnel.agents" => {
            format!("[{{ cluster = \"c\", token_sha256 = \"{}\" }}]", "a1".repeat(32))
        }
        "tunnel.clients" => {
            format!("[{{ token_sha256 = \"{}\", clusters = [\"c*\"] }}]", "a1".repeat(32))
        }
        "tunnel.patterns" => "[{ pattern = \"/a/{}\" }]".into(),
        "tunnel.cache" => "[{ pattern = \"/a/{}\", ttl = \"1s\" }]".into(),
        "tunnel.peer_bind" => "\"127.0.0.1:1\"".into(),
        "tunnel.peer_url" => "\"http://127.0.0.1:1\"".into(),
        "tunnel.peer_secret" => "\"peer-secret-0123456789\"".into(),
        // The login at sentinels needs sentinels.
        "redis.url" => "\"redis+sentinel://127.0.0.1:1/mymaster\"".into(),
        "database.url" => "\"postgres://u@h/d\"".into(),
        "log.level" => "\"debug\"".into(),
        "traces.endpoint" | "traces.url" => "\"http://127.0.0.1:1\"".into(),
        "traces.headers" | "traces.resource_attributes" => "\"a=b\"".into(),
        "agents.path" => "\"/agents\"".into(),
        "jwt.secret_key" => format!("\"{}\"", "s".repeat(64)),
        "jwt.algorithms" => "[\"HS256\", \"HS384\", \"ES256\"]".into(),
        "jwt.public_key_file" => file("other-public.pem"),
        "jwt.audience" | "audit.redact" => "[\"pin_code\"]".into(),
        "api.keys" => format!("[\"{API_KEY}\", \"another-key-0123456789\"]"),
        "api.key" => {
            "[{ name = \"a\", secret = \"named-key-0123456789\", scopes = [\"events\"] }]".into()
        }
        _ => String::new(),
    };
    let allowed = key.allowed();
    let words = allowed.strip_prefix("one of ").into_iter().flat_map(|words| words.split(", "));
    let guesses =
        ["true", "false", "1", "2", "7", "70", "0.5", "3000", "100000", "2000000", "64000000"];
    let times = ["\"20s\"", "\"1h\"", "\"another\""];
    let guesses = guesses.iter().chain(&times).map(|guess| (*guess).to_owned());
    [given]
        .into_iter()
        .chain(words.map(str::to_owned))
        .chain(guesses)
        .filter(|v| !v.is_empty())
        .collect()
}

/// Every key, changed: the answer lists it where the table of keys says. A new key needs a candidate above where none fits.
#[tokio::test]
async fn every_key_is_reloaded_or_needs_a_restart_as_marked() {
    let files = tempfile::tempdir().unwrap();
    let made = Made::new();
    let [one, other] = ["one", "other"]
        .map(|_| rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).unwrap());
    for (name, text) in [
        ("certificate.pem", &made.certificate),
        ("same-certificate.pem", &made.certificate),
        ("key.pem", &made.key),
        ("same-key.pem", &made.key),
        ("public.pem", &one.public_key_pem()),
        ("other-public.pem", &other.public_key_pem()),
    ] {
        fs::write(files.path().join(name), text).unwrap();
    }
    let file = |name: &str| format!("\"{}\"", files.path().join(name).display());
    let mut base = Values::new();
    let (redis, folder) = (RedisServer::start(), tempfile::tempdir().unwrap());
    let sentinel = lone_sentinel(redis.port(), folder.path());
    let url = format!("\"redis+sentinel://127.0.0.1:{}/mymaster\"", sentinel.port());
    base.set("redis.url", &url);
    base.set("redis.sentinel_password", "\"a sentinel without passwords takes any\"");
    base.set("admin.port", "0");
    base.set("server.trusted_proxies", "[\"192.0.2.0/24\"]");
    base.set("tls.certificate", &file("certificate.pem"));
    base.set("tls.key", &file("key.pem"));
    base.set("endpoints.events", "true");
    base.set("jwt.algorithms", "[\"HS256\", \"ES256\"]");
    base.set("jwt.secret_key", &format!("\"{}\"", "k".repeat(64)));
    base.set("jwt.public_key_file", &file("public.pem"));
    let running = Reloading::start(&base).await;
    let before = loaded(&files, &base).unwrap();
    let mut previous = String::new();
    // A gateway reads no key of the cluster agent.
    let of_gateway = keys::all().filter(|key| key.section != "tunnel_agent");
    for key in of_gateway.filter(|key| !HAVE_TESTS_OF_THEIR_OWN.contains(&key.path().as_str())) {
        let path = key.path();
        let tried = candidates(key, file);
        let fitting = tried.iter().map(|value| base.with(&path, value)).find(|values| {
            loaded(&files, values)
                .is_some_and(|config| key.write(&config) != key.write(&before) || key.secret)
        });
        let Some(values) = fitting else {
            let is_expected = HAVE_ONE_VALUE.contains(&path.as_str());
            assert!(is_expected, "{path}: none of {tried:?} is allowed");
            continue;
        };
        let answer = running.to(&values).await;
        let (changed, waits) = (names(&answer, "changed"), names(&answer, "needs_restart"));
        let (list, others) = if key.reloads { (&changed, &waits) } else { (&waits, &changed) };
        assert!(list.contains(&path), "{path} is missing: {answer}");
        assert!(!others.contains(&path), "{path} is in both: {answer}");
        let foreign =
            changed.iter().chain(&waits).find(|name| **name != path && **name != previous);
        assert_eq!(foreign, None, "{path}: {answer}");
        previous = path;
    }
    assert_eq!(running.count("refused"), 0.0);
}

#[tokio::test]
async fn keys_of_an_issuer_need_a_restart() {
    let mut base = Values::new();
    base.set("endpoints.events", "true");
    base.set("jwt.secret_key", &format!("\"{}\"", "k".repeat(64)));
    let running = Reloading::start(&base).await;
    let mut values = base.with("jwt.jwks_url", "\"https://issuer.example/jwks\"");
    values.set("jwt.algorithms", "[\"HS256\", \"ES256\"]");
    let answer = running.to(&values).await;
    assert_eq!(names(&answer, "changed"), [""; 0]);
    assert_eq!(names(&answer, "needs_restart"), ["jwt.algorithms", "jwt.jwks_url"]);
}

#[tokio::test]
async fn another_unix_socket_needs_a_restart() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| format!("\"{}\"", folder.path().join(name).display());
    let mut base = Values::new();
    for key in ["server.bind", "server.port"] {
        base.unset(key);
    }
    base.set("server.unix", &path("a.sock"));
    base.set("admin.bind", "\"127.0.0.1\"");
    base.set("admin.port", "0");
    let running = Reloading::start(&base).await;
    for (key, value) in [("server.unix", path("b.sock")), ("server.unix_mode", "\"0600\"".into())] {
        let answer = running.to(&base.with(key, &value)).await;
        assert_eq!(
            (names(&answer, "changed"), names(&answer, "needs_restart")),
            (vec![], vec![key.into()])
        );
    }
    assert!(folder.path().join("a.sock").exists() && !folder.path().join("b.sock").exists());
}

#[tokio::test]
async fn the_answer_shows_values_but_no_secret() {
    let running = Reloading::start(&Values::new()).await;
    let mut values = Values::new();
    values.set("log.level", "\"warn\"");
    values.set("server.port", "1");
    values.set("redis.url", "\"redis://:hunter2hunter2@127.0.0.1:1\"");
    values.set("jwt.secret_key", "\"hunter2hunter2hunter2hunter2hunter2\"");
    values.set("api.keys", &format!("[\"{API_KEY}\", \"hunter2hunter2hunter2\"]"));
    let answer = running.to(&values).await;
    assert_eq!(
        answer["changed"],
        json!([
            { "key": "log.level", "from": "\"info\"", "to": "\"warn\"" },
            { "key": "jwt.secret_key" },
            { "key": "api.keys" },
        ])
    );
    assert_eq!(
        answer["needs_restart"],
        json!([{ "key": "server.port", "from": "0", "to": "1" }, { "key": "redis.url" }])
    );
    assert!(!answer.to_string().contains("hunter2"));
    // The console shows the values in force.
    let shown = running.instance.api("GET", "/api/v1/console/config", "").await;
    let settings = shown.json()["settings"].as_array().unwrap().clone();
    let value = |section: &str, name: &str| {
        let found = settings.iter().find(|one| one["section"] == section && one["name"] == name);
        found.unwrap()["value"].clone()
    };
    assert_eq!((value("log", "level"), value("server", "port")), (json!("\"warn\""), json!("0")));
    assert!(!shown.body.contains("hunter2"));
    // A second reload tells again what still waits, and nothing that is in force.
    let answer = running.to(&values).await;
    assert_eq!(names(&answer, "changed"), [""; 0]);
    assert_eq!(names(&answer, "needs_restart"), ["server.port", "redis.url"]);
    assert_eq!(running.count("done"), 2.0);
    assert!(running.instance.metric("wsproxy_reload_done_timestamp_seconds") > 1.7e9);
}

#[tokio::test]
async fn an_instance_without_sources_reloads_nothing() {
    let instance = TestInstance::with(|_| ()).await;
    instance.api("POST", "/api/v1/reload", "").await.assert_refused(409, "conflict");
    instance.get("/api/v1/reload").await.assert_refused(405, "method_not_allowed");
}

#[tokio::test]
async fn a_reload_needs_the_scope_admin() {
    let mut values = Values::new();
    values.set(
        "api.key",
        "[{ name = \"events\", secret = \"events-key-0123456789\", scopes = [\"events\"] }]",
    );
    let running = Reloading::start(&values).await;
    let ask = async |headers: &[(&str, &str)]| {
        let address = running.instance.admin_address();
        crate::support::http::request(address, "POST", "/api/v1/reload", headers, b"").await
    };
    ask(&[]).await.assert_refused(401, "missing_credentials");
    let events = ask(&[("authorization", "Bearer events-key-0123456789")]).await;
    events.assert_refused(403, "missing_scope_admin");
    assert_eq!((running.count("done"), running.count("refused")), (0.0, 0.0));
}

/// Keys that allow one value only, for now.
const HAVE_ONE_VALUE: [&str; 1] = ["traces.protocol"];

/// Keys that are not allowed beside the others: a URL of an issuer stands in place of a file, and a unix socket in that of
/// a port.
const HAVE_TESTS_OF_THEIR_OWN: [&str; 3] = ["jwt.jwks_url", "server.unix", "server.unix_mode"];
