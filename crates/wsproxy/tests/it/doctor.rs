//! `wsproxy config check --connect` against servers and a machine that are right, and wrong in several ways.

use std::{
    net::TcpListener,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use serde_json::Value;

use crate::support::{
    binary::Binary,
    gateway::API_KEY,
    redis_server::{Options, RedisServer},
    sentinel::{Deployment, REDIS_PASSWORD, SENTINEL_PASSWORD},
    tls::{Files, Made},
};

mod cluster;

/// Findings of the command, and its exit code.
struct Examined {
    code: Option<i32>,
    output: String,
    findings: Vec<Value>,
}

fn run(arguments: &[&str], environment: &[(&str, &str)]) -> (Option<i32>, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_wsproxy"));
    command.args(["config", "check", "--connect"]).args(arguments).env_clear();
    command.envs([
        ("PORT", "0"),
        ("WSPROXY_SERVER__BIND", "127.0.0.1"),
        ("WSPROXY_SERVER__TRUSTED_PROXIES", "127.0.0.1"),
        ("WSPROXY_API__KEYS", API_KEY),
        ("SECRET_KEY", SECRET),
        ("WSPROXY_ENDPOINTS__EVENTS", "true"),
        ("WSPROXY_ENDPOINTS__ROOMS", "true"),
    ]);
    for (name, value) in environment {
        match *value {
            "" => command.env_remove(name),
            value => command.env(name, value),
        };
    }
    command.stdin(Stdio::null());
    let output = command.output().unwrap();
    let text = [output.stdout, output.stderr].concat();
    (output.status.code(), String::from_utf8(text).unwrap())
}

impl Examined {
    fn with(environment: &[(&str, &str)]) -> Self {
        let (code, output) = run(&["--json"], environment);
        let answer: Value = serde_json::from_str(&output).unwrap_or_else(|_| panic!("{output}"));
        assert_eq!(answer["valid"], true);
        assert!(!output.contains(API_KEY) && !output.contains(SECRET), "{output}");
        Self { code, findings: answer["findings"].as_array().unwrap().clone(), output }
    }

    fn of_redis(url: &str) -> Self {
        Self::with(&[("REDIS_URL", url)])
    }

    /// Asserts that there is a finding with this level, whose text has all of `parts`, and that it says what to do.
    #[track_caller]
    fn has(&self, level: &str, part: &str, parts: &[&str]) {
        let fits = |finding: &&Value| {
            let text = finding["what"].as_str().unwrap();
            finding["level"] == level
                && finding["part"] == part
                && parts.iter().all(|part| text.contains(part))
        };
        let found = self.findings.iter().find(fits);
        let found = found.unwrap_or_else(|| panic!("{level} {part} {parts:?}:\n{}", self.output));
        assert!(level == "ok" || found["do"].is_string(), "{found}");
    }

    fn errors(&self) -> usize {
        self.findings.iter().filter(|finding| finding["level"] == "error").count()
    }
}

#[test]
fn a_good_redis_has_no_errors() {
    let redis = RedisServer::start();
    let examined = Examined::of_redis(&redis.url());
    assert_eq!((examined.code, examined.errors()), (Some(0), 0), "{}", examined.output);
    examined.has("ok", "redis", &["connected, version 7"]);
    examined.has("ok", "redis", &["maxmemory-policy noeviction"]);
    examined.has("ok", "redis", &["append-only file is off"]);
    examined.has("ok", "redis", &["has all rights"]);
    examined.has("ok", "clock", &["agrees"]);
    examined.has("ok", "port", &["is free"]);
    examined.has("ok", "tls", &["plain HTTP"]);
    examined.has("ok", "trusted_proxies", &["trusted: 127.0.0.1/32"]);
    assert!(examined.findings.iter().any(|finding| finding["part"] == "descriptors"));
    assert!(examined.findings.iter().any(|finding| finding["part"] == "somaxconn"));
    // The check leaves nothing behind.
    assert_eq!(redis.call(&["DBSIZE"]), crate::support::redis_server::Answer::Integer(0));
    let (code, text) = run(&[], &[("REDIS_URL", &redis.url())]);
    assert_eq!(code, Some(0));
    assert!(text.contains("ok       redis: connected, version 7"), "{text}");
}

#[test]
fn every_server_of_sentinel_is_examined() {
    let mut deployment = Deployment::start();
    let url = deployment.url();
    let environment =
        [("REDIS_URL", url.as_str()), ("WSPROXY_REDIS__SENTINEL_PASSWORD", SENTINEL_PASSWORD)];
    let examined = Examined::with(&environment);
    assert_eq!((examined.code, examined.errors()), (Some(0), 0), "{}", examined.output);
    let master = format!("names the master 127.0.0.1:{}", deployment.servers[0].port());
    for sentinel in &deployment.sentinels {
        let sentinel = format!("sentinel 127.0.0.1:{}: version 7", sentinel.port());
        examined.has("ok", "redis", &[&sentinel, &master]);
    }
    examined.has("ok", "redis", &["output buffer for subscribers: 268435456 bytes"]);
    for replica in &deployment.servers[1..] {
        let replica = format!("replica 127.0.0.1:{}: ", replica.port());
        for told in ["connected, version 7", "maxmemory-policy noeviction", "has all rights"] {
            examined.has("ok", "redis", &[&replica, told]);
        }
        examined.has("ok", "clock", &[&replica, "agrees"]);
    }
    for secret in [REDIS_PASSWORD, SENTINEL_PASSWORD] {
        assert!(!examined.output.contains(secret), "{}", examined.output);
    }
    // A replica that would evict, and a sentinel that is away.
    deployment.servers[1].call(&["CONFIG", "SET", "maxmemory-policy", "allkeys-lru"]);
    deployment.sentinels[2].kill();
    let examined = Examined::with(&environment);
    assert_eq!((examined.code, examined.errors()), (Some(1), 1), "{}", examined.output);
    let replica = format!("replica 127.0.0.1:{}: ", deployment.servers[1].port());
    examined.has("error", "redis", &[&replica, "allkeys-lru"]);
    let sentinel = format!("sentinel 127.0.0.1:{} cannot be used", deployment.sentinels[2].port());
    examined.has("warning", "redis", &[&sentinel]);
    // A machine that hangs, with a sentinel and a replica, hides nothing of the others.
    deployment.sentinels[0].stop();
    deployment.servers[2].stop();
    let examined = Examined::with(&environment);
    deployment.sentinels[0].cont();
    deployment.servers[2].cont();
    examined.has(
        "ok",
        "redis",
        &[&format!("sentinel 127.0.0.1:{}: version", deployment.sentinels[1].port())],
    );
    examined.has("error", "redis", &[&replica, "allkeys-lru"]);
    let hangs = format!("replica 127.0.0.1:{} cannot be used", deployment.servers[2].port());
    examined.has("error", "redis", &[&hangs]);
    let hangs = format!("sentinel 127.0.0.1:{} cannot be used", deployment.sentinels[0].port());
    examined.has("warning", "redis", &[&hangs]);
    let wrong = url.replace("mymaster", "other");
    let examined = Examined::with(&[("REDIS_URL", &wrong), environment[1]]);
    examined.has("error", "redis", &["knows no master with the name other"]);
}

#[test]
fn a_wrong_password_is_told_without_it() {
    let redis = RedisServer::start_with(Options {
        password: Some("right-password".into()),
        ..Options::default()
    });
    let url = redis.url().replace("right-password", "hunter2hunter2");
    let examined = Examined::of_redis(&url);
    examined.has("error", "redis", &["refused user or password"]);
    assert_eq!((examined.code, examined.errors()), (Some(1), 1));
    assert!(!examined.output.contains("hunter2"), "{}", examined.output);
}

#[test]
fn a_password_that_redis_does_not_ask_for_is_told() {
    let redis = RedisServer::start();
    let url = redis.url().replace("redis://", "redis://:hunter2hunter2@");
    let examined = Examined::of_redis(&url);
    examined.has("error", "redis", &["has a password, but Redis has none"]);
    assert_eq!((examined.code, examined.errors()), (Some(1), 1), "{}", examined.output);
    assert!(!examined.output.contains("hunter2"), "{}", examined.output);
}

#[test]
fn missing_rights_for_the_tunnel_are_named() {
    let redis = RedisServer::start();
    let user = ["ACL", "SETUSER", "app", "on", ">app-password-1", "+@all", "resetchannels"];
    let others = ["~ws:*", "&ws:*", "&wsproxy:probe:*"];
    redis.call(&[&user[..], &others].concat());
    let url = redis.url().replace("redis://", "redis://app:app-password-1@");
    let variables = [
        ("REDIS_URL", url.as_str()),
        ("WSPROXY_ENDPOINTS__TUNNEL", "true"),
        ("WSPROXY_ENDPOINTS__SESSIONS", "false"),
        ("WSPROXY_ENDPOINTS__EVENTS", "false"),
        ("WSPROXY_ENDPOINTS__ROOMS", "false"),
    ];
    let examined = Examined::with(&variables);
    examined.has("error", "redis", &["SUBSCRIBE tunnels:events", "PUBLISH tunnels:events"]);
    examined.has("error", "redis", &["HSET tunnel:wsproxy-check"]);
    redis.call(&["ACL", "SETUSER", "app", "&tunnels:events", "~tunnel:*"]);
    let examined = Examined::with(&variables);
    assert_eq!(examined.errors(), 0, "{}", examined.output);
    // The lease of an instance is needed for the tunnel alone, too.
    redis.call(&["ACL", "SETUSER", "app", "resetkeys", "~tunnel:*"]);
    Examined::with(&variables).has("error", "redis", &["HSET ws:server:wsproxy-check:tunnels"]);
}

#[test]
fn missing_rights_are_named() {
    let redis = RedisServer::start();
    let user = ["ACL", "SETUSER", "app", "on", ">app-password-1", "resetchannels"];
    let rules = ["~session:*", "&session:*", "&ws:*", "&room:*", "&wsproxy:probe:*", "+@all"];
    let words: Vec<_> = user.iter().chain(&rules).chain(&["-xadd", "-info"]).copied().collect();
    redis.call(&words);
    let url = redis.url().replace("redis://", "redis://app:app-password-1@");
    let variables = [("REDIS_URL", url.as_str()), ("WSPROXY_SESSIONS__HISTORY", "true")];
    let examined = Examined::with(&variables);
    assert_eq!(examined.code, Some(1));
    examined.has("warning", "redis", &["may not ask INFO"]);
    let log = "XADD {session:wsproxy-check:down}:log";
    examined.has("error", "redis", &["may not", log, "PUBLISH agent:wsproxy-check:sessions"]);
    let text = &examined.output;
    assert!(!text.contains("SUBSCRIBE session:") && !text.contains("app-password"), "{text}");
    redis.call(&["ACL", "SETUSER", "app", "~*", "&*", "+@all"]);
    let examined = Examined::with(&variables);
    assert_eq!(examined.errors(), 0, "{}", examined.output);
    redis.call(&["ACL", "SETUSER", "app", "-multi"]);
    Examined::with(&variables).has("warning", "redis", &["cannot be checked"]);
}

#[test]
fn a_redis_that_evicts_or_is_full_is_an_error() {
    let redis = RedisServer::start();
    redis.call(&["CONFIG", "SET", "maxmemory-policy", "allkeys-lru"]);
    let examined = Examined::of_redis(&redis.url());
    examined.has("error", "redis", &["allkeys-lru", "histories"]);
    assert_eq!(examined.code, Some(1));
    redis.call(&["CONFIG", "SET", "maxmemory-policy", "noeviction"]);
    redis.call(&["CONFIG", "SET", "maxmemory", "1"]);
    let examined = Examined::of_redis(&redis.url());
    examined.has("error", "redis", &["takes no writes"]);
    examined.has("error", "redis", &["Redis refuses", "OOM"]);
}

#[test]
fn a_frozen_or_absent_redis_ends_the_check_in_seconds() {
    let mut redis = RedisServer::start();
    redis.stop();
    let began = Instant::now();
    let examined = Examined::of_redis(&redis.url());
    redis.cont();
    assert!(began.elapsed() < Duration::from_secs(20), "{:?}", began.elapsed());
    examined.has("error", "redis", &["did not answer in time"]);
    assert_eq!(examined.code, Some(1));
    redis.kill();
    let examined = Examined::of_redis(&redis.url());
    examined.has("error", "redis", &["cannot be used"]);
}

#[test]
fn a_database_that_is_away_and_a_held_port_are_told() {
    let held = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = held.local_addr().unwrap().port().to_string();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("agents.db").display().to_string();
    let agents = ("WSPROXY_ENDPOINTS__AGENTS", "true");
    let examined = Examined::with(&[agents, ("PORT", &port), ("WSPROXY_DATABASE__PATH", &file)]);
    examined.has("ok", "database", &["does not exist yet"]);
    examined.has("ok", "redis", &["not configured"]);
    let findings = examined.findings.iter().filter(|finding| finding["part"] == "port");
    let told: Vec<_> = findings.map(|finding| finding["what"].as_str().unwrap()).collect();
    assert!(told.len() == 1 && told[0].contains("is in use"), "{told:?}");
    assert!(!std::path::Path::new(&file).exists(), "the check makes nothing");
    let url = "postgres://u:hunter2hunter2@127.0.0.1:1/d";
    let examined = Examined::with(&[agents, ("DATABASE_URL", url)]);
    examined.has("error", "database", &["not available"]);
    assert!(examined.code == Some(1) && !examined.output.contains("hunter2"));
}

#[tokio::test]
async fn the_place_of_a_unix_socket_is_judged() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.sock");
    let text = path.display().to_string();
    let place = [
        ("WSPROXY_SERVER__UNIX", text.as_str()),
        ("WSPROXY_SERVER__TRUSTED_PROXIES", "unix:"),
        ("WSPROXY_SERVER__PROXY_PROTOCOL", "true"),
        ("WSPROXY_SERVER__BIND", ""),
        ("PORT", ""),
    ];
    let judged = || Examined::with(&place);
    judged().has("ok", "unix", &["is free"]);
    std::fs::write(&path, "data").unwrap();
    judged().has("error", "unix", &["no socket"]);
    std::fs::remove_file(&path).unwrap();
    let foreign = std::os::unix::net::UnixListener::bind(&path).unwrap();
    let answering = std::thread::spawn(move || drop(foreign.accept()));
    judged().has("error", "unix", &["not by an instance"]);
    answering.join().unwrap();
    judged().has("ok", "unix", &["dead process"]);
    let instance = Binary::start_on_socket(&place).await;
    judged().has("ok", "unix", &["running instance"]);
    drop(instance);
    let lost = folder.path().join("lost/a.sock").display().to_string();
    let place = [&place[1..], &[("WSPROXY_SERVER__UNIX", lost.as_str())]].concat();
    Examined::with(&place).has("error", "unix", &["no folder"]);
}

#[test]
fn a_certificate_is_told_with_its_end() {
    let files = Files::new(&Made::new());
    let certificate = files.certificate().display().to_string();
    let key = files.key().display().to_string();
    let variables = [
        ("WSPROXY_TLS__CERTIFICATE", certificate.as_str()),
        ("WSPROXY_TLS__KEY", key.as_str()),
        ("WSPROXY_SERVER__TRUSTED_PROXIES", "0.0.0.0/0"),
    ];
    let examined = Examined::with(&variables);
    examined.has("ok", "tls", &["it expires on"]);
    examined.has("error", "trusted_proxies", &["0.0.0.0/0"]);
    let (code, text) = run(&[], &[("LOG_LEVEL", "loud")]);
    assert!(
        code == Some(78) && text.contains("log.level"),
        "an invalid file is checked no further"
    );
}

const SECRET: &str = "secret-of-the-doctor-0123456789abcdef";
