//! `wsproxy agents` and `wsproxy migrate` as an operator runs them.

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::TcpStream,
    process::{Command, Output, Stdio},
    time::Duration,
};

use serde_json::{Value, json};
use tempfile::TempDir;

use super::audit_log::TestDatabase;
use crate::support::{binary::Binary, postgres::PostgresServer, redis_server::RedisServer};

/// Runs the program in a folder, with these variables only.
fn run(folder: &TempDir, args: &[&str], env: &[(&str, &str)], input: &str) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_wsproxy"));
    command.args(args).env_clear().envs(env.iter().copied()).current_dir(folder.path());
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    // A command that reads nothing may have ended.
    let _ = child.stdin.take().unwrap().write_all(input.as_bytes());
    child.wait_with_output().unwrap()
}

fn code(output: &Output) -> i32 {
    output.status.code().unwrap()
}

fn out(output: &Output) -> &str {
    std::str::from_utf8(&output.stdout).unwrap()
}

fn err(output: &Output) -> &str {
    std::str::from_utf8(&output.stderr).unwrap()
}

fn answer(output: &Output) -> Value {
    assert_eq!(code(output), 0, "{}", err(output));
    serde_json::from_str(out(output)).unwrap()
}

/// A subscriber of one channel.
struct Listener(BufReader<TcpStream>);

impl Listener {
    fn new(port: u16, channel: &str) -> Self {
        let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        writeln!(stream, "SUBSCRIBE {channel}\r").unwrap();
        let mut listener = Self(BufReader::new(stream));
        listener.lines(6);
        listener
    }

    /// The payload of the next message.
    fn message(&mut self) -> String {
        self.lines(7).pop().unwrap()
    }

    fn lines(&mut self, count: usize) -> Vec<String> {
        let lines = self.0.by_ref().lines().take(count);
        lines.map(|line| line.unwrap().trim_end().to_owned()).collect()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn commands_work_on_both_databases() {
    for place in TestDatabase::both().await {
        let folder = tempfile::tempdir().unwrap();
        let config = place.config();
        let path = config.database.file().display().to_string();
        let url = config.database.url.as_ref().map(secrecy::ExposeSecret::expose_secret);
        let env = match url {
            Some(url) => [("DATABASE_URL", url)],
            None => [("WSPROXY_DATABASE__PATH", path.as_str())],
        };
        let agents = |args: &[&str]| run(&folder, &[&["agents"], args].concat(), &env, "");
        let added = agents(&["add", "u1", "--platform", "darwin", "--expires", "90d"]);
        let secret = out(&added).trim_end().to_owned();
        assert!(secret.starts_with("wsa_") && secret.len() == 47, "{secret} {}", err(&added));
        assert!(!err(&added).contains(&secret));
        let again = agents(&["add", "u1"]);
        assert_eq!((code(&again), out(&again)), (65, ""));
        assert!(err(&again).contains("`rotate`"), "{}", err(&again));
        let listed = answer(&agents(&["list", "--json"]));
        assert_eq!(listed["agents"][0]["user_id"], "u1");
        assert_eq!(answer(&agents(&["list", "--connected", "--json"])), json!({ "agents": [] }));
        let rotated = answer(&agents(&["rotate", "u1", "--overlap", "0", "--json"]));
        assert!(rotated["secret"].as_str().is_some_and(|secret| secret.starts_with("wsa_")));
        let shown = answer(&agents(&["show", "u1", "--json"]));
        let valid: Vec<_> =
            shown["secrets"].as_array().unwrap().iter().map(|secret| &secret["valid"]).collect();
        assert_eq!(
            (&shown["platform"], valid),
            (&"darwin".into(), vec![&json!(true), &json!(false)])
        );
        let id = rotated["secret_id"].as_str().unwrap();
        let revoked = answer(&agents(&["revoke", "u1", "--secret", id, "--json"]));
        assert_eq!((&revoked["revoked"], &revoked["instances"]), (&json!(1), &Value::Null));
        assert!(out(&agents(&["revoke", "u1"])).contains("/api/v1/agents/u1/disconnect"));
        assert_eq!(code(&agents(&["remove", "u1"])), 0);
        for gone in [["show", "u1"], ["remove", "u1"], ["rotate", "u1"], ["revoke", "u1"]] {
            assert_eq!(code(&agents(&gone)), 67, "{gone:?}");
        }
        let adopted = answer(&agents(&["adopt", "--json"]));
        assert_eq!(
            adopted,
            json!({ "dry_run": false, "adopted": [], "too_short": [], "changed": [] })
        );
        let migrated = run(&folder, &["migrate", "--dry-run", "--json"], &env, "");
        assert_eq!(answer(&migrated), json!({ "dry_run": true, "changes": [] }));
    }
}

#[test]
fn a_given_secret_is_long_or_refused() {
    let folder = tempfile::tempdir().unwrap();
    let add = ["agents", "add", "u1", "--secret-stdin", "--json"];
    let short = run(&folder, &add, &[], "correct horse\n");
    assert_eq!((code(&short), out(&short)), (65, ""));
    assert!(err(&short).contains("fast hash") && !err(&short).contains("horse"));
    let given = answer(&run(&folder, &add, &[], &format!("{}\r\n", "k".repeat(40))));
    assert!(given["secret"].is_null() && given["secret_id"].is_string(), "{given}");
}

#[test]
fn commands_without_a_database_say_so() {
    let folder = tempfile::tempdir().unwrap();
    let list = |env: &[(&str, &str)]| run(&folder, &["agents", "list"], env, "");
    let absent = list(&[]);
    assert_eq!(code(&absent), 78);
    assert!(err(&absent).contains("there is no database wsproxy.db"), "{}", err(&absent));
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    let away = list(&[("DATABASE_URL", "postgres://u:hunter2@127.0.0.1:1/d")]);
    assert_eq!(code(&away), 69);
    let odd = list(&[("DATABASE_URL", "mysql://u:hunter2@127.0.0.1:1/d")]);
    assert_eq!(code(&odd), 78);
    let off = [("WSPROXY_ENDPOINTS__AGENTS", "false"), ("DATABASE_URL", "mysql://u:hunter2@h/d")];
    let off = list(&off);
    assert_eq!(code(&off), 78);
    assert!(err(&off).contains("endpoints.agents is off"), "{}", err(&off));
    for output in [away, odd, off] {
        assert!(!err(&output).contains("hunter2"), "{}", err(&output));
    }
    assert_eq!(code(&run(&folder, &["agents", "show", "a:b"], &[], "")), 64);
}

#[test]
fn a_revocation_is_told_over_redis() {
    let (folder, redis) = (tempfile::tempdir().unwrap(), RedisServer::start());
    let url = redis.url();
    let env = [("REDIS_URL", url.as_str()), ("WSPROXY_REDIS__CHANNEL_PREFIX", "eu")];
    assert_eq!(code(&run(&folder, &["agents", "add", "u1"], &env, "")), 0);
    let mut control = Listener::new(redis.port(), "eu:agents:control");
    let revoked = answer(&run(&folder, &["agents", "revoke", "u1", "--json"], &env, ""));
    assert_eq!((&revoked["revoked"], &revoked["instances"]), (&json!(1), &json!(1)));
    assert_eq!(control.message(), r#"{"op":"revoke","userId":"u1"}"#);
    let removed = run(&folder, &["agents", "remove", "u1"], &env, "");
    assert!(out(&removed).contains("1 instance was told"), "{}", out(&removed));
    // Redis is away: the database is changed, and the operator hears that connections stay.
    assert_eq!(code(&run(&folder, &["agents", "add", "u2"], &env, "")), 0);
    drop(redis);
    let half = run(&folder, &["agents", "revoke", "u2"], &env, "");
    assert_eq!(code(&half), 69);
    assert!(err(&half).contains("revoked, but open connections stay"), "{}", err(&half));
    let shown = answer(&run(&folder, &["agents", "show", "u2", "--json"], &[], ""));
    assert_eq!(shown["secrets"][0]["valid"], false);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_start_warns_of_a_file_beside_redis_and_of_clear_secrets() {
    let (folder, redis) = (tempfile::tempdir().unwrap(), RedisServer::start());
    let path = folder.path().join("a.db").display().to_string();
    let url = redis.url();
    let env = [
        ("WSPROXY_ENDPOINTS__AGENTS", "true"),
        ("WSPROXY_DATABASE__PATH", &path),
        ("REDIS_URL", &url),
    ];
    let gateway = Binary::start(&env).await;
    let line = "Credentials of agents and the audit log are in a file of this instance, and other instances on the same \
                Redis do not see it. Set database.url (DATABASE_URL) to share a PostgreSQL.";
    assert_eq!(gateway.line(line).await["level"], "WARN");
    drop(gateway);

    let server = PostgresServer::shared().await;
    let name = server.new_database().await;
    let url = server.url_of(&name);
    let env = [("WSPROXY_ENDPOINTS__AGENTS", "true"), ("DATABASE_URL", url.as_str())];
    assert_eq!(code(&run(&folder, &["agents", "add", "u1"], &env, "")), 0);
    let sql = "INSERT INTO agent_credentials (user_id, shared_secret, platform, status) \
               SELECT 'user_' || n, md5(n::text), 'linux', 'pending' FROM generate_series(1, 7) n";
    server.query_in(&name, sql).await;
    let gateway = Binary::start(&env).await;
    let line = "Secrets of agents lie in clear in agent_credentials.shared_secret: `wsproxy agents adopt` replaces them \
                by hashes; agents.legacy_secrets = \"reject\" refuses them.";
    let line = gateway.line(line).await;
    assert_eq!((&line["rows"], &line["level"]), (&json!(7), &json!("WARN")));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_password_is_in_no_line_of_the_log() {
    let server = PostgresServer::start().await;
    let file = server.query("SHOW hba_file").await.remove(0).remove(0).unwrap();
    let rule = "host all all 127.0.0.1/32 scram-sha-256";
    let sql = format!("ALTER ROLE postgres PASSWORD 'hunter2'; COPY (SELECT '{rule}') TO '{file}'");
    server.query(&sql).await;
    server.query("SELECT pg_reload_conf()").await;
    let url = |password: &str| server.url().replace("postgres@", &format!("postgres:{password}@"));
    let away = "The database is away: agents cannot connect until it answers.";
    for (url, line) in [(url("hunter3"), away), (url("hunter2"), "Absent tables are created.")] {
        let level = ("LOG_LEVEL", "trace");
        let env = [("WSPROXY_ENDPOINTS__AGENTS", "true"), ("DATABASE_URL", &*url), level];
        let gateway = Binary::start(&env).await;
        let cause = gateway.line(line).await["cause"].to_string();
        let is_refused = cause.contains("password authentication failed");
        assert_eq!(is_refused, line == away, "{cause}");
        assert!(!gateway.log().contains("hunter"), "{}", gateway.log());
    }
}
