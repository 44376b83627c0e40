//! Tests of the program as an operator runs it: output, exit codes, and the generated page.
#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use std::{
    fs,
    io::{BufRead, BufReader, Read, Write},
    path::Path,
    process::{Command, Output, Stdio},
    time::{Duration, Instant},
};

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use wsproxy::config::{
    load::{ConfigSources, load},
    render,
};

#[path = "cli/agent.rs"]
mod agent;
#[path = "cli/cargo.rs"]
mod cargo;
#[path = "cli/health.rs"]
mod health;

/// Runs the program with the environment `env` only.
fn wsproxy(args: &[&str], env: &[(&str, &str)]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_wsproxy"));
    command.args(args).env_clear().envs(env.iter().copied()).stdin(Stdio::null());
    command.output().unwrap()
}

fn stdout(output: &Output) -> &str {
    std::str::from_utf8(&output.stdout).unwrap()
}

fn stderr(output: &Output) -> &str {
    std::str::from_utf8(&output.stderr).unwrap()
}

fn file(text: &str) -> (tempfile::TempDir, String) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("wsproxy.toml");
    fs::write(&path, text).unwrap();
    let path = path.to_str().unwrap().to_owned();
    (folder, path)
}

#[test]
fn the_example_passes_the_check() {
    let example = wsproxy(&["config", "example"], &[]);
    assert!(example.status.success());
    let (_folder, path) = file(stdout(&example));
    let check = wsproxy(&["config", "check", "--config", &path], &[]);
    assert_eq!((check.status.code(), stderr(&check)), (Some(0), ""));
}

#[test]
fn all_problems_come_at_once_with_exit_code_78() {
    let (_folder, path) = file("[server]\nport = 99999\n[limts]\nmax_connections = 5\n");
    let args = ["config", "check", "-c", &path, "--log-level", "loud", "--bind", "here"];
    for command in ["check", "show"] {
        let args = args.map(|arg| if arg == "check" { command } else { arg });
        let output = wsproxy(&args, &[("WSPROXY_SERVER__PROT", "1"), ("METRICS_PORT", "many")]);
        assert_eq!((output.status.code(), stdout(&output)), (Some(78), ""));
        let problems = stderr(&output);
        for part in [
            "6 problems",
            "wsproxy.toml:2: server.port = 99999: must be an integer from 0 to 65535",
            "wsproxy.toml:3: limts: unknown section; did you mean [limits]?",
            "env WSPROXY_SERVER__PROT: unknown variable; did you mean WSPROXY_SERVER__PORT?",
            "env METRICS_PORT: admin.port = \"many\"",
            "flag --log-level: log.level = \"loud\"",
            "flag --bind: server.bind = \"here\"",
        ] {
            assert!(problems.contains(part), "{part}\nis missing in\n{problems}");
        }
    }
    let serve = wsproxy(&["serve", "-c", &path], &[]);
    assert_eq!(serve.status.code(), Some(78));
}

/// Runs `serve`; returns its output until it listens, or else its exit code and output.
fn serve(env: &[(&str, &str)]) -> Result<String, (Option<i32>, String)> {
    let mut command = Command::new(env!("CARGO_BIN_EXE_wsproxy"));
    command.arg("serve").env_clear().envs(env.iter().copied()).stdin(Stdio::null());
    let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
    let mut said = String::new();
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines().map_while(Result::ok);
    let listens = lines.any(|line| {
        let listens = line.contains("\"Listening.\"");
        said += &(line + "\n");
        listens
    });
    if listens {
        child.kill().unwrap();
    }
    let code = child.wait().unwrap().code();
    if listens { Ok(said) } else { Err((code, said)) }
}

/// Writes files for keys of the configuration; returns their paths by content.
fn files() -> (tempfile::TempDir, impl Fn(&str) -> String) {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path().to_str().unwrap().to_owned();
    let key = rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).unwrap();
    let certificate = rcgen::CertificateParams::new(vec!["a".to_owned()]).unwrap();
    let certificate = certificate.self_signed(&key).unwrap().pem();
    for (name, text) in [
        ("empty", ""),
        ("text", "no PEM at all"),
        ("certificate", &certificate),
        ("broken", &certificate.replace("MII", "!!!")),
        ("public", &key.public_key_pem()),
        ("private", &key.serialize_pem()),
        ("key", "key-in-a-file-0123456789\n"),
        ("keys", "key-in-a-file-0123456789\nkey-in-a-file-9876543210\n"),
    ] {
        fs::write(folder.path().join(name), text).unwrap();
    }
    (folder, move |name: &str| format!("{root}/{name}"))
}

/// Configurations, each with the key to blame; `""` for a good one.
#[derive(Default)]
struct Configurations(Vec<(String, Vec<(&'static str, String)>)>);

impl Configurations {
    fn add(&mut self, blamed: &str, env: &[(&'static str, &str)]) {
        let env = env.iter().map(|(name, value)| (*name, (*value).to_owned())).collect();
        self.0.push((blamed.to_owned(), env));
    }
}

fn add_urls_and_certificates(all: &mut Configurations, file: impl Fn(&str) -> String) {
    for (url, blamed) in [
        ("redis://h", ""),
        ("redis://u:p@h:1/2?protocol=3", ""),
        ("unix:///run/r%20s?db=1", ""),
        ("redis://user@h", "redis.url"),
        ("redis://h?db=two", "redis.url"),
        ("redis://:%ff@h", "redis.url"),
        ("redis://h/4294967296", "redis.url"),
        ("unix:///r%ff", "redis.url"),
        ("redis://h:0", "redis.url"),
        ("redis://h:65536", "redis.url"),
    ] {
        all.add(blamed, &[("REDIS_URL", url)]);
    }
    for name in ["certificate", "empty", "text", "broken", "public", "", "missing"] {
        let (file, good) = (file(name), name == "certificate");
        let blamed = |key| if good { "" } else { key };
        let redis = [("REDIS_URL", "rediss://h"), ("WSPROXY_REDIS__CA_FILE", &file)];
        all.add(blamed("redis.ca_file"), &redis);
        let events = [
            ("WSPROXY_ENDPOINTS__EVENTS", "true"),
            ("WSPROXY_JWT__JWKS_URL", "https://issuer.example/jwks"),
            ("ALGORITHM", "ES256"),
            ("WSPROXY_JWT__CA_FILE", &file),
        ];
        all.add(blamed("jwt.ca_file"), &events);
    }
    for name in ["public", "certificate", "private", "empty", "text", "", "missing"] {
        for (algorithm, fits) in [("ES256", true), ("RS256", false)] {
            let blamed = if fits && name == "public" { "" } else { "jwt.public_key_file" };
            let file = file(name);
            let events = [
                ("WSPROXY_ENDPOINTS__EVENTS", "true"),
                ("WSPROXY_JWT__PUBLIC_KEY_FILE", file.as_str()),
                ("ALGORITHM", algorithm),
            ];
            all.add(blamed, &events);
        }
    }
}

fn add_secrets_and_ports(all: &mut Configurations, file: impl Fn(&str) -> String) {
    for (secret, blamed) in [("0123456789abcdef0123456789abcdef", ""), ("short", "jwt.secret_key")]
    {
        all.add(blamed, &[("WSPROXY_ENDPOINTS__EVENTS", "true"), ("SECRET_KEY", secret)]);
    }
    for (name, blamed) in [
        ("key", ""),
        ("keys", "api.key"),
        ("empty", "api.key"),
        ("missing", "api.key"),
        ("", "api.key"),
    ] {
        let key = serde_json::json!([
            { "name": "a", "secret_file": file(name), "scopes": ["events"] },
        ]);
        all.add(blamed, &[("WSPROXY_API__KEY", &key.to_string())]);
        // The same secret twice.
        let keys = [
            ("WSPROXY_API__KEY", &*key.to_string()),
            ("WSPROXY_API__KEYS", "key-in-a-file-0123456789"),
        ];
        all.add("api.key", &keys);
    }
    let twice = r#"[{"name":"a","secret":"0123456789abcdef","scopes":["events"]},
        {"name":"a","secret":"fedcba9876543210","scopes":["events"]}]"#;
    all.add("api.key", &[("WSPROXY_API__KEY", twice)]);
    all.add("api.keys", &[("WSPROXY_API__KEYS_FILE", &file("text"))]);
    for (bind, admin, blamed) in [
        ("127.0.0.1", "127.0.0.1", "admin.port"),
        ("127.0.0.1", "::ffff:127.0.0.1", "admin.port"),
        ("127.0.0.1", "::", "admin.port"),
        ("127.0.0.1", "127.0.0.2", ""),
    ] {
        let port = free_port();
        let ports = [("PORT", port.as_str()), ("METRICS_PORT", &port)];
        let binds = [("WSPROXY_SERVER__BIND", bind), ("WSPROXY_ADMIN__BIND", admin)];
        all.add(blamed, &[ports, binds].concat());
    }
}

/// Returns a port without a listener, below those that the kernel gives to outgoing connections and to other tests'
/// listeners.
fn free_port() -> String {
    loop {
        let port: u16 = rand::random_range(15_000..32_000);
        if std::net::TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port.to_string();
        }
    }
}

#[test]
fn the_check_refuses_exactly_what_serve_refuses() {
    let (_folder, file) = files();
    let mut all = Configurations::default();
    add_urls_and_certificates(&mut all, &file);
    add_secrets_and_ports(&mut all, &file);
    for (blamed, env) in all.0 {
        let mut env: Vec<_> = env.iter().map(|(name, value)| (*name, value.as_str())).collect();
        for (name, value) in
            [("PORT", "0"), ("WSPROXY_SERVER__BIND", "127.0.0.1"), ("WSPROXY_SERVER__THREADS", "1")]
        {
            if !env.iter().any(|(known, _)| *known == name) {
                env.push((name, value));
            }
        }
        let check = wsproxy(&["config", "check"], &env);
        let (code, said) = (check.status.code(), stderr(&check).to_owned());
        assert_eq!(code, Some(if blamed.is_empty() { 0 } else { 78 }), "{env:?}: {said}");
        assert!(said.contains(&blamed), "{blamed} in {said}");
        assert!(blamed.is_empty() || said.contains("1 problem "), "{said}");
        match serve(&env) {
            Ok(_) => assert_eq!(code, Some(0), "{env:?}"),
            Err(refused) => assert_eq!(refused, (code, said), "{env:?}"),
        }
    }
}

#[test]
fn doubts_about_the_environment_are_told_at_the_start() {
    let env = [("REDIS_URL_FILE", ""), ("SECRET_KEYS", "x")];
    let warnings = [
        "REDIS_URL_FILE is empty, so it does not set redis.url.",
        "SECRET_KEYS is not read by wsproxy; did you mean SECRET_KEY?",
    ];
    let check = wsproxy(&["config", "check"], &env);
    assert_eq!((check.status.code(), stderr(&check)), (Some(0), ""));
    let port = [("PORT", "0"), ("WSPROXY_SERVER__BIND", "127.0.0.1")];
    let said = serve(&[&env[..], &port].concat()).unwrap();
    for warning in warnings {
        assert!(stdout(&check).contains(&format!("\nWarning: {warning}\n")), "{check:?}");
        let line = said.lines().find(|line| line.contains(warning)).unwrap();
        assert!(line.contains("\"level\":\"WARN\""), "{line}");
    }
}

#[test]
fn the_check_answers_programs_in_json() {
    let check = |env: &[(&str, &str)]| {
        let output = wsproxy(&["config", "check", "--json"], env);
        assert_eq!(stderr(&output), "");
        let json: serde_json::Value = serde_json::from_str(stdout(&output)).unwrap();
        (output.status.code(), json)
    };
    let env = [("REDIS_URL", ""), ("DATABASE_URL", "postgres://x")];
    let good = serde_json::json!({
        "valid": true, "problems": [], "ignored": ["DATABASE_URL"],
        "warnings": ["REDIS_URL is empty, so it does not set redis.url."],
    });
    assert_eq!(check(&env), (Some(0), good));
    let (code, json) = check(&[("PORT", "99999"), ("WSPROXY_REDIS__URL", "redis://:secret@h:x")]);
    assert_eq!((code, &json["valid"]), (Some(78), &false.into()));
    assert_eq!(
        json["problems"][0],
        serde_json::json!({
            "origin": { "kind": "environment", "name": "PORT" }, "key": "server.port",
            "value": "\"99999\"", "message": "must be an integer from 0 to 65535",
        })
    );
    let url = &json["problems"][1];
    assert_eq!((&url["key"], &url["value"]), (&"redis.url".into(), &"***".into()));
    assert!(url["message"].as_str().unwrap().starts_with("the port must be"), "{url}");
    assert!(!json.to_string().contains("secret"));
}

#[test]
fn show_says_where_each_value_came_from() {
    let (_folder, path) = file("[server]\nport = 1\nthreads = 3\n[limits]\nmax_fragments = 7\n");
    let env = [("PORT", "2"), ("WSPROXY_SERVER__THREADS", "4"), ("WSPROXY_CONFIG", path.as_str())];
    let output = wsproxy(&["config", "show", "--port", "3"], &env);
    let lines: Vec<_> = stdout(&output)
        .lines()
        .map(|l| l.split_whitespace().collect::<Vec<_>>().join(" "))
        .collect();
    let from_file = format!("max_fragments = 7 # {path}:5");
    for line in [
        "port = 3 # flag --port",
        "threads = 4 # env WSPROXY_SERVER__THREADS",
        from_file.as_str(),
        "bind = \"0.0.0.0\" # default",
    ] {
        assert!(lines.iter().any(|known| known == line), "{line} is missing in {lines:#?}");
    }
}

#[test]
fn what_show_prints_is_a_configuration_again() {
    let env = [("WSPROXY_LIMITS__MAX_MESSAGE_BYTES", "1500000"), ("HEARTBEAT_TIMEOUT", "90000")];
    let first = wsproxy(&["config", "show"], &env);
    let (_folder, path) = file(stdout(&first));
    let second = wsproxy(&["config", "show", "--config", &path], &[]);
    let values = |output: &Output| -> Vec<String> {
        let lines = stdout(output).lines();
        lines.map(|line| line.split(" # ").next().unwrap_or_default().trim().to_owned()).collect()
    };
    assert_eq!(values(&first), values(&second));
}

#[test]
fn secrets_appear_in_no_output() {
    let key = r#"[{"name":"a","secret":"hunter2-hunter2-hunter2","scopes":["events"]}]"#;
    for key in [key, &key.replace("events", "evens"), &key.replace("hunter2-", ""), &key[1..]] {
        for args in [["config", "show"], ["config", "check"]] {
            let output = wsproxy(&args, &[("WSPROXY_API__KEY", key)]);
            let both = format!("{}{}", stdout(&output), stderr(&output));
            assert!(!both.contains("hunter2"), "{both}");
        }
    }
    let secret = "hunter2-hunter2-hunter2";
    let (good, bad) = (format!("redis://:{secret}@127.0.0.1:1"), format!("http://:{secret}@h"));
    for args in [["config", "show"], ["config", "check"], ["token", "s"], ["config", "example"]] {
        for url in [&good, &bad] {
            let keys = format!("{secret},short");
            for env in [vec![("REDIS_URL", url.as_str())], vec![("WSPROXY_API__KEYS", &keys)]] {
                let output = wsproxy(&args, &env);
                let both = format!("{}{}", stdout(&output), stderr(&output));
                assert!(!both.contains("hunter2"), "{both}");
            }
        }
    }
}

#[test]
fn wrong_usage_exits_with_64_and_help_with_0() {
    let none = wsproxy(&[], &[]);
    assert_eq!(none.status.code(), Some(64));
    assert!(stderr(&none).contains("Usage: wsproxy"));
    assert_eq!(wsproxy(&["sevre"], &[]).status.code(), Some(64));
    assert_eq!(wsproxy(&["serve", "--prot", "1"], &[]).status.code(), Some(64));
    assert_eq!(wsproxy(&["token", "a:b"], &[]).status.code(), Some(64));
    for help in [&["--help"][..], &["serve", "--help"], &["--version"]] {
        let output = wsproxy(help, &[]);
        assert_eq!((output.status.code(), stderr(&output)), (Some(0), ""));
    }
    assert!(stdout(&wsproxy(&["serve", "--help"], &[])).contains("--metrics-port"));
}

/// Checks the arguments and flags in the help of each command.
#[test]
fn the_help_of_a_command_lists_what_it_reads() {
    let everything =
        ["--port", "--redis-url", "--max-connections", "--log-level", "--metrics-port"];
    for (command, flags) in [
        (&["serve"][..], &everything[..]),
        (&["dev"], &["--port", "--redis-url", "--max-connections", "--log-level"]),
        (&["config", "check"], &everything),
        (&["config", "show"], &everything),
        (&["config", "example"], &[]),
        (&["token"], &["--redis-url"]),
        (&["jwt"], &[]),
        (&["health"], &["--port", "--metrics-port"]),
        (&["completions"], &[]),
        (&["version"], &[]),
    ] {
        let output = wsproxy(&[command, &["--help"]].concat(), &[]);
        let help = stdout(&output);
        for flag in everything {
            let listed = help.contains(&format!("{flag} <"));
            assert_eq!(listed, flags.contains(&flag), "{command:?} {flag}\n{help}");
        }
        let example = help.split_once("\nExample:\n").map(|(_, example)| example);
        let start = format!("wsproxy {}", command[0]);
        assert!(example.is_some_and(|example| example.contains(&start)), "{help}");
        assert!(!help.contains("<VALUE>"), "{help}");
    }
    let refused = wsproxy(&["token", "s-1", "--port", "1"], &[]);
    assert_eq!(refused.status.code(), Some(64));
}

#[test]
fn paragraphs_of_the_help_break_where_the_line_is_full() {
    let commands = "serve dev token jwt migrate health agents agents.add agents.list agents.revoke agents.adopt";
    for command in commands.split(' ') {
        let command: Vec<_> = command.split('.').chain(["--help"]).collect();
        let output = wsproxy(&command, &[]);
        let lines: Vec<_> = stdout(&output).lines().collect();
        for pair in lines.windows(2) {
            let is_text =
                |line: &str| line.starts_with(char::is_alphabetic) && !line.ends_with(':');
            let next_word = pair[1].split(' ').next().unwrap_or_default();
            let is_full = pair[0].len() + 1 + next_word.len() > 100;
            let is_paragraph = is_text(pair[0]) && is_text(pair[1]);
            assert!(!is_paragraph || is_full, "{command:?} {pair:?}");
        }
    }
}

#[test]
fn the_help_of_dev_says_its_own_address() {
    let bind = |command: &str| {
        let help = wsproxy(&[command, "--help"], &[]);
        let (_, rest) = stdout(&help).split_once("--bind <ADDRESS>").unwrap();
        rest.split_once("[default: ").unwrap().1.split(']').next().unwrap().to_owned()
    };
    assert_eq!((bind("serve"), bind("dev")), ("\"0.0.0.0\"".into(), "\"127.0.0.1\"".into()));
}

#[test]
fn completions_exist_for_every_shell() {
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let output = wsproxy(&["completions", shell], &[]);
        assert!(output.status.success());
        assert!(stdout(&output).contains("redis-url"), "{shell}");
    }
}

#[test]
fn version_is_text_or_json() {
    let text = wsproxy(&["version"], &[]);
    assert!(stdout(&text).starts_with(&format!("wsproxy {} ", env!("CARGO_PKG_VERSION"))));
    let json = wsproxy(&["version", "--json"], &[]);
    let json: serde_json::Value = serde_json::from_slice(&json.stdout).unwrap();
    assert_eq!(json["version"], env!("CARGO_PKG_VERSION"));
    match (json["commit"].as_str(), json["date"].as_str()) {
        (Some(commit), Some(date)) => {
            assert!(stdout(&text).contains(&format!("(commit {commit} of {date}, ")), "{text:?}");
        }
        // A debug build, or sources that are no checkout.
        (commit, _) => assert!(commit.is_none() && !stdout(&text).contains("commit"), "{text:?}"),
    }
}

#[test]
fn the_commit_of_a_build_is_the_one_checked_out() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let git =
        Command::new("git").arg("-C").arg(&root).args(["log", "-1", "--format=%H %ct"]).output();
    // Sources that are no checkout, or a machine without git, have no commit.
    let head = git.ok().filter(|head| head.status.success());
    assert_eq!(build::commit(&root).is_some(), head.is_some());
    if let (Some(commit), Some(head)) = (build::commit(&root), head) {
        let (id, seconds) = stdout(&head).trim().split_once(' ').unwrap();
        assert!(commit.id.len() >= 12 && id.starts_with(&commit.id), "{} {id}", commit.id);
        assert_eq!(commit.seconds.to_string(), seconds);
    }
    // A folder inside a checkout belongs to another project.
    assert!(build::commit(&root.join("crates")).is_none());
}

#[path = "../build.rs"]
#[allow(dead_code, reason = "the rest is for cargo")]
mod build;

#[test]
fn the_day_of_a_build_is_that_of_its_seconds() {
    for (seconds, day) in [
        (0, "1970-01-01"),
        (951_782_399, "2000-02-28"),
        (951_782_400, "2000-02-29"),
        (1_709_251_199, "2024-02-29"),
        (1_709_251_200, "2024-03-01"),
        (4_107_542_399, "2100-02-28"),
        (4_107_542_400, "2100-03-01"),
        (-1, "1969-12-31"),
    ] {
        assert_eq!(build::date(seconds), day);
    }
}

#[test]
fn a_token_needs_redis() {
    let output = wsproxy(&["token", "s-1"], &[]);
    assert_eq!((output.status.code(), stdout(&output)), (Some(78), ""));
    assert!(stderr(&output).contains("redis.url"));
}

#[test]
fn a_token_says_at_once_why_redis_does_not_answer() {
    let free = free_port();
    let token = |url: &str| {
        let start = Instant::now();
        let output = wsproxy(&["token", "s-1"], &[("REDIS_URL", url)]);
        assert_eq!((output.status.code(), stdout(&output)), (Some(69), ""));
        assert!(start.elapsed() < Duration::from_secs(4), "{:?}", start.elapsed());
        stderr(&output).to_owned()
    };
    let refused = token(&format!("redis://:hunter2@127.0.0.1:{free}"));
    let expected =
        format!("Redis at 127.0.0.1:{free} cannot be used: Connection refused (os error 111)");
    assert!(refused.contains(&expected) && !refused.contains("hunter2"), "{refused}");
    let missing = token("unix:///does/not/exist");
    assert!(missing.contains("No such file or directory (os error 2)"), "{missing}");
    for (answer, why) in [
        ("-WRONGPASS invalid username-password pair\r\n", "WRONGPASS invalid username-password"),
        ("-LOADING Redis is loading the dataset in memory\r\n", "LOADING Redis is loading"),
        ("HTTP/1.1 400 Bad Request\r\n\r\n", "broke the protocol"),
        ("", "the server closed the connection"),
    ] {
        let said = token(&format!("redis://:hunter2@127.0.0.1:{}", answering(answer)));
        assert!(said.contains(why) && !said.contains("hunter2"), "{said}");
    }
}

/// Starts a server that answers one request; returns its port.
fn answering(answer: &'static str) -> u16 {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let _ = stream.read(&mut [0; 1024]).unwrap();
        stream.write_all(answer.as_bytes()).unwrap();
    });
    port
}

#[test]
fn a_jwt_is_signed_with_the_configured_secret() {
    let secret = ("SECRET_KEY", "hunter2-hunter2-hunter2-hunter2-");
    let args = ["jwt", "--sub", "alice", "--ttl", "5m", "--claim", "role=admin"];
    let output = wsproxy(&args, &[secret]);
    assert_eq!((output.status.code(), stderr(&output)), (Some(0), ""));
    let parts: Vec<_> = stdout(&output).trim().split('.').collect();
    let [_, claims, _] = parts[..] else { panic!("{parts:?}") };
    let claims = URL_SAFE_NO_PAD.decode(claims).unwrap();
    let claims: serde_json::Value = serde_json::from_slice(&claims).unwrap();
    assert_eq!((&claims["sub"], &claims["role"]), (&"alice".into(), &"admin".into()));
    assert_eq!(claims["exp"].as_u64().unwrap() - claims["iat"].as_u64().unwrap(), 300);

    let none = wsproxy(&args, &[]);
    assert_eq!((none.status.code(), stdout(&none)), (Some(78), ""));
    assert!(stderr(&none).contains("SECRET_KEY"));
    assert_eq!(wsproxy(&["jwt", "--sub", "a:b"], &[secret]).status.code(), Some(64));
    assert!(stdout(&wsproxy(&["jwt", "--help"], &[])).contains("openssl rand"));
}

/// Compares the page; `UPDATE_DOCS=1` writes it anew.
#[test]
#[expect(clippy::disallowed_methods, reason = "the variable is the test's, not the program's")]
fn the_reference_page_is_the_generated_one() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/reference/configuration.md");
    if std::env::var_os("UPDATE_DOCS").is_some() {
        fs::write(&path, render::markdown()).unwrap();
    }
    let page = fs::read_to_string(&path).unwrap_or_default();
    assert!(page == render::markdown(), "{} is not up to date", path.display());
}

/// Checks deployed files: people copy them, so they must work unchanged.
#[test]
fn the_deployed_file_passes_the_check() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../deploy/systemd/wsproxy.toml");
    let check = wsproxy(&["config", "check", "--config", path], &[]);
    assert_eq!((check.status.code(), stderr(&check)), (Some(0), ""));
}

#[test]
fn the_unit_waits_longer_than_a_shutdown_may_take() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../../deploy/systemd");
    let unit = fs::read_to_string(format!("{folder}/wsproxy.service")).unwrap();
    let stop = unit.lines().find_map(|line| line.strip_prefix("TimeoutStopSec=")).unwrap();
    let file = Some(format!("{folder}/wsproxy.toml").into());
    let loaded = load(ConfigSources { file, ..ConfigSources::default() }).unwrap();
    let stop = Duration::from_secs(stop.parse().unwrap());
    assert!(stop > loaded.config.server.shutdown_timeout + loaded.config.server.drain_delay);
}
