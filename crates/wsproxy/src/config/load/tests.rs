//! Tests of loading: precedence, problems, secrets.

use std::{io::Write, time::Duration};

use jsonwebtoken::Algorithm;
use secrecy::ExposeSecret;
use tempfile::NamedTempFile;

mod doubts;

use super::*;
use crate::config::{NoReceiver, render};

mod place;

fn file(text: &str) -> NamedTempFile {
    let mut file = NamedTempFile::new().unwrap();
    file.write_all(text.as_bytes()).unwrap();
    file
}

fn load_file(text: &str) -> Result<Loaded, Problems> {
    let file = file(text);
    load(ConfigSources { file: Some(file.path().into()), ..ConfigSources::default() })
}

fn load_env<const N: usize>(pairs: [(&str, &str); N]) -> Result<Loaded, Problems> {
    load(ConfigSources { environment: pairs.into(), ..ConfigSources::default() })
}

fn key(path: &str) -> &'static Key {
    keys::all().find(|key| key.path() == path).unwrap()
}

/// Returns the only problem, without the name of the temporary file.
fn problem(result: Result<Loaded, Problems>) -> String {
    let problems = result.unwrap_err().0;
    assert_eq!(problems.len(), 1, "{problems:?}");
    let text = problems[0].to_string();
    text.split_once(".tmp").map_or_else(|| text.clone(), |(_, rest)| rest[6..].to_owned())
}

#[test]
fn the_flag_wins_over_the_environment_over_the_file() {
    let file = file("[server]\nport = 1\nthreads = 1\n\n[log]\nlevel = 'debug'\n");
    let loaded = load(ConfigSources {
        file: Some(file.path().into()),
        environment: [
            ("WSPROXY_SERVER__PORT", "2"),
            ("PORT", "3"),
            ("SERVER_ID", "a"),
            ("WSPROXY_SERVER__THREADS", "2"),
        ]
        .into(),
        flags: vec![(key("server.port"), "4".into())],
        ..ConfigSources::default()
    })
    .unwrap();
    let server = &loaded.config.server;
    assert_eq!((server.port, server.threads, server.server_id.as_deref()), (4, 2, Some("a")));
    assert_eq!(loaded.config.log.level, "debug");
    assert_eq!(loaded.origin(key("server.port")), &ValueOrigin::Flag("port"));
    let threads = ValueOrigin::Env("WSPROXY_SERVER__THREADS".into());
    assert_eq!(loaded.origin(key("server.threads")), &threads);
    assert_eq!(loaded.origin(key("server.server_id")), &ValueOrigin::Env("SERVER_ID".into()));
    assert!(matches!(loaded.origin(key("log.level")), ValueOrigin::File { line: 6, .. }));
    assert_eq!(loaded.origin(key("server.bind")), &ValueOrigin::Default);
}

#[test]
fn short_names_of_variables_work() {
    let loaded = load_env([
        ("PORT", "9000"),
        ("METRICS_PORT", "9001"),
        ("HEARTBEAT_INTERVAL", "15000"),
        ("HEARTBEAT_TIMEOUT", "45s"),
        ("RATE_LIMIT_MAX_REQUESTS", "60"),
        ("RATE_LIMIT_WINDOW_SECONDS", "30"),
        ("REDIS_CHANNEL_PREFIX", "eu"),
        ("LOG_LEVEL", "WARNING"),
        ("REDIS_URL", ""),
        ("SECRET_KEY", "0123456789abcdef"),
        ("ALGORITHM", "HS512"),
        ("DATABASE_URL", "postgres://x"),
    ])
    .unwrap();
    let config = loaded.config;
    assert_eq!((config.server.port, config.admin.port), (9000, Some(9001)));
    assert_eq!(config.heartbeat.interval, Duration::from_secs(15));
    assert_eq!(config.heartbeat.timeout, Duration::from_secs(45));
    assert_eq!(config.rate_limit.max_requests, 60);
    assert_eq!(config.rate_limit.window, Duration::from_secs(30));
    assert_eq!((config.redis.channel_prefix.as_str(), config.log.level.as_str()), ("eu", "warn"));
    assert!(config.redis.url.is_none());
    assert_eq!(config.jwt.secret_key.unwrap().expose_secret(), "0123456789abcdef");
    assert_eq!(config.jwt.algorithms, [Algorithm::HS512]);
    assert_eq!(loaded.ignored, ["DATABASE_URL"]);
    assert!(config.database.url.is_none());
}

#[test]
fn a_database_url_of_another_service_is_not_read() {
    for name in ["DATABASE_URL", "DATABASE_URL_FILE"] {
        let loaded = load_env([(name, "mysql://x:secret@/\u{e4} #")]).unwrap();
        assert_eq!((loaded.ignored, loaded.warnings), (vec!["DATABASE_URL"], vec![]));
    }
    let loaded = load_env([("DATABASE_URL", ""), ("DATABASE_URI", "x")]).unwrap();
    assert_eq!((loaded.ignored, loaded.warnings), (vec![], vec![]));
}

#[test]
fn a_database_url_is_judged_where_agents_are_served() {
    let agents = ("WSPROXY_ENDPOINTS__AGENTS", "true");
    let loaded = load_env([agents, ("DATABASE_URL", "postgresql+asyncpg://u:p@h/d")]).unwrap();
    assert!(loaded.config.database.url.is_some() && loaded.ignored.is_empty());
    let text = problem(load_env([agents, ("DATABASE_URL", "mysql://u:secret@h/d")]));
    assert!(text.contains("database.url") && text.contains("must be postgres://"), "{text}");
    assert!(!text.contains("secret"), "{text}");
    let file = file("postgres://h/from_file\n");
    let path = file.path().to_str().unwrap();
    let loaded = load_env([agents, ("DATABASE_URL_FILE", path)]).unwrap();
    let url = loaded.config.database.url.unwrap();
    assert_eq!(url.expose_secret(), "postgres://h/from_file");
}

#[test]
fn the_embedded_database_is_in_the_state_directory() {
    let file = |pairs: [(&str, &str); 2]| load_env(pairs).unwrap().config.database.file();
    assert_eq!(file([("A", ""), ("B", "")]), PathBuf::from("wsproxy.db"));
    let state = ("STATE_DIRECTORY", "/var/lib/wsproxy:/var/lib/other");
    assert_eq!(file([state, ("B", "")]), PathBuf::from("/var/lib/wsproxy/wsproxy.db"));
    let path = ("WSPROXY_DATABASE__PATH", "/x/y.db");
    assert_eq!(file([state, path]), PathBuf::from("/x/y.db"));
}

#[test]
fn removed_keys_say_what_replaced_them() {
    for result in [
        load_file("[sessions]\nsse_token = 'once'\n"),
        load_env([("WSPROXY_SESSIONS__SSE_TOKEN", "reusable")]),
    ] {
        let problem = problem(result);
        assert!(problem.contains("was removed") && problem.contains("\"sse.\""), "{problem}");
    }
}

#[test]
fn secrets_are_as_long_as_the_hash() {
    let load = |algorithms: &str, bytes: usize| {
        load_env([
            ("WSPROXY_ENDPOINTS__EVENTS", "true"),
            ("SECRET_KEY", &"x".repeat(bytes)),
            ("ALGORITHM", algorithms),
        ])
    };
    for (algorithms, bytes_min) in
        [("HS256", 16), ("HS384", 48), ("HS512", 64), ("HS256,HS384", 48), ("HS512,HS256", 64)]
    {
        assert!(load(algorithms, bytes_min).is_ok(), "{algorithms}");
        let problem = problem(load(algorithms, bytes_min - 1));
        assert!(problem.contains(&format!("at least {bytes_min} bytes")), "{problem}");
        assert!(problem.starts_with("env SECRET_KEY: jwt.secret_key = \"***\""), "{problem}");
    }
}

#[test]
fn all_problems_are_reported_at_once_with_line_value_and_what_is_allowed() {
    let text = "[server]\nport = 99999\nprot = 1\n[sesions]\n[log]\nformat = 'xml'\n";
    let file = file(text);
    let path = file.path().display().to_string();
    let sources = ConfigSources {
        file: Some(file.path().into()),
        environment: [("WSPROXY_SERVER_PORT", "1"), ("WSPROXY_HEARTBEAT__TIMEOUT", "1s")].into(),
        ..ConfigSources::default()
    };
    let problems = load(sources).unwrap_err().to_string().replace(&path, "w.toml");
    let expected = [
        "6 problems in the configuration:",
        "  w.toml:2: server.port = 99999: must be an integer from 0 to 65535",
        "  w.toml:3: server.prot: unknown key; did you mean server.port?",
        "  w.toml:4: sesions: unknown section; did you mean [sessions]?",
        "  w.toml:6: log.format = 'xml': must be one of \"auto\", \"json\", \"pretty\"",
        "  env WSPROXY_SERVER_PORT: unknown variable; did you mean WSPROXY_SERVER__PORT?",
        "  env WSPROXY_HEARTBEAT__TIMEOUT: heartbeat.timeout = \"1s\": must be longer than \
         heartbeat.interval = \"30s\" (default)",
    ];
    assert_eq!(problems.lines().collect::<Vec<_>>(), expected);
}

#[test]
fn a_key_in_the_wrong_section_is_shown_where_it_belongs() {
    assert_eq!(
        problem(load_file("[server]\nmax_connections = 1\n")),
        ":2: server.max_connections: unknown key; did you mean limits.max_connections?"
    );
    assert_eq!(
        problem(load_file("port = 1\n")),
        ":1: port: unknown section; did you mean server.port?"
    );
    assert_eq!(problem(load_file("server = 1\n")), ":1: server: must be a section: [server]");
}

#[test]
fn every_rule_between_keys_is_checked() {
    for (text, blamed) in [
        ("[admin]\nport = 8080", "admin.port"),
        ("[admin]\nbind = '127.0.0.1'", "admin.bind"),
        ("[server]\nshutdown_timeout = 5", "server.shutdown_timeout"),
        ("[heartbeat]\ninterval = '60s'", "heartbeat.timeout"),
        ("[limits]\nmax_message_bytes = '16MiB'\n", "limits.send_buffer_bytes"),
        ("[limits]\nsend_buffers_total_bytes = '1MiB'", "limits.send_buffers_total_bytes"),
        ("[redis]\npublish_queue_bytes = '64KiB'", "redis.publish_queue_bytes"),
        ("[tls]\ncertificate = '/does/not/exist'", "tls.certificate"),
        ("[tls]\nkey = '/does/not/exist'", "tls.key"),
        ("[tls]\ncertificate = '/not/there'\nkey = '/not/there'", "tls.certificate"),
        ("[tls]\nadmin = true\n[admin]\nport = 9000", "tls.admin"),
        ("[redis]\nca_file = '/does/not/exist'", "redis.ca_file"),
        ("[jwt]\nca_file = '/does/not/exist'", "jwt.ca_file"),
        ("[jwt]\nalgorithms = []", "jwt.algorithms"),
        ("[endpoints]\nevents = true", "endpoints.events"),
        ("[endpoints]\nsessions = false", "endpoints.sessions"),
        ("[server]\nproxy_protocol = true", "server.proxy_protocol"),
        (
            "[server]\nproxy_protocol = true\nunix = '/a'\ntrusted_proxies = ['::1']",
            "server.proxy_protocol",
        ),
        ("[endpoints]\nevents = true\n[jwt]\nsecret_key = '0123456789abcde'", "jwt.secret_key"),
        ("[jwt]\nsecret_key = '0123456789abcdef'\nalgorithms = ['RS256']", "jwt.algorithms"),
        ("[jwt]\njwks_url = 'https://a/'", "jwt.algorithms"),
        ("[jwt]\njwks_url = 'https://a/'\nsecret_key = '0123456789abcdef'", "jwt.jwks_url"),
        ("[jwt]\npublic_key_file = '/x'\nalgorithms = ['RS256']", "jwt.public_key_file"),
    ] {
        let problems = load_file(text).unwrap_err().0;
        assert_eq!(problems.iter().map(|p| p.key.as_str()).collect::<Vec<_>>(), [blamed]);
    }
    assert!(load_file("[endpoints]\nsessions = false\necho = true").is_ok());
    let tls = "[tls]\ncertificate = '/c'\nkey = '/k'";
    let problems = load_file(&format!("[server]\nunix = '/run/a.sock'\n{tls}")).unwrap_err();
    let about = problems.0.iter().find(|problem| problem.message.starts_with("must be empty"));
    assert_eq!(about.unwrap().key, "tls.certificate");
    let beside = "[server]\nbind = '10.0.0.1'\n[admin]\nbind = '127.0.0.1'\nport = 8080";
    assert!(load_file(beside).is_ok());
}

#[test]
fn a_secret_may_be_there_for_others() {
    for text in [
        "[jwt]\nsecret_key = 'x'\nalgorithms = ['RS256']\njwks_url = 'https://a/'",
        "[jwt]\nsecret_key = '0123456789abcdef'\nalgorithms = ['HS256', 'ES256']\njwks_url = 'http://a/'",
        "[jwt]\nalgorithms = ['EdDSA']",
        "[jwt]\nsecret_key = 'x'",
    ] {
        assert!(load_file(text).is_ok(), "{text}");
    }
    assert_eq!(
        problem(load_env([("SECRET_KEY", "short"), ("WSPROXY_ENDPOINTS__EVENTS", "true")])),
        "env SECRET_KEY: jwt.secret_key = \"***\": must be at least 16 bytes long, better 32, \
         to be used with jwt.algorithms = [\"HS256\"] (default)"
    );
    assert_eq!(
        problem(load_env([("WSPROXY_JWT__JWKS_URL", "https://a/")])),
        "default: jwt.algorithms = [\"HS256\"]: must be those of public keys (RS256, ES256, \
         EdDSA, …), since HS… need jwt.secret_key = \"\" (default)"
    );
}

#[test]
fn a_rule_is_not_checked_against_the_default_of_a_bad_value() {
    let text = "[heartbeat]\ninterval = 'often'\ntimeout = 20";
    assert!(problem(load_file(text)).starts_with(":2: heartbeat.interval = 'often'"));
}

#[test]
fn secrets_never_show() {
    let secret = "hunter2-hunter2-hunter2";
    let url = format!("http://:{secret}@h");
    let texts = [
        format!("[redis]\nurl = '{url}'"),
        format!("[redis]\nurl = ['{secret}', 1]"),
        format!("[redis]\nurl = 'redis://:{secret}@h"),
        format!("[redis]\nurll = '{url}'"),
        format!("[api]\nkeys = ['{secret} ']\nx = 1"),
        format!("[api]\nkeys = '{secret} x'"),
        format!("[api]\nkeys = [['{secret}']]"),
        format!("[jwt]\nsecret_key = '-----BEGIN {secret}'"),
    ];
    for text in texts {
        let problems = load_file(&text).unwrap_err();
        assert!(!format!("{problems} {problems:?}").contains("hunter2"), "{problems}");
    }
    let url = format!("redis://:{secret}@h");
    let loaded = load_env([("REDIS_URL", &url), ("WSPROXY_API__KEYS", secret)]).unwrap();
    let shown = format!("{} {loaded:?}", render::show(&loaded));
    assert!(!shown.contains("hunter2"), "{shown}");
    assert!(shown.contains("url = \"***\"") && shown.contains("keys = [\"***\"]"), "{shown}");
}

#[test]
fn secrets_come_from_files_too() {
    let url = file("redis://:pw@h\n");
    let keys = file("0123456789abcdef\nfedcba9876543210\n");
    let path = |file: &NamedTempFile| file.path().to_str().unwrap().to_owned();
    let loaded = load_env([
        ("REDIS_URL_FILE", path(&url).as_str()),
        ("WSPROXY_API__KEYS_FILE", path(&keys).as_str()),
    ])
    .unwrap();
    assert_eq!(loaded.config.redis.url.unwrap().expose_secret(), "redis://:pw@h");
    assert_eq!(loaded.config.api.keys.len(), 2);
    let missing = problem(load_env([("REDIS_URL_FILE", "/does/not/exist")]));
    assert!(missing.starts_with("env REDIS_URL_FILE: redis.url: cannot read /does/not/exist"));
    assert!(problem(load_env([("WSPROXY_SERVER__PORT_FILE", "/x")])).contains("unknown variable"));
}

#[test]
fn a_secret_file_without_a_secret_is_a_problem() {
    for text in ["", "\n", " \r\n"] {
        let file = file(text);
        let path = file.path().to_str().unwrap();
        for (name, key) in [
            ("REDIS_URL_FILE", "redis.url"),
            ("WSPROXY_REDIS__URL_FILE", "redis.url"),
            ("SECRET_KEY_FILE", "jwt.secret_key"),
            ("WSPROXY_API__KEYS_FILE", "api.keys"),
            ("WSPROXY_API__KEY_FILE", "api.key"),
        ] {
            let expected = format!("env {name}: {key}: the file {path} is empty");
            assert_eq!(load_env([(name, path)]).unwrap_err().0[0].to_string(), expected);
        }
    }
    let folder = problem(load_env([("REDIS_URL_FILE", "/")]));
    assert!(folder.contains("cannot read /: Is a directory (os error 21)"), "{folder}");
}

#[test]
fn a_variable_and_its_file_exclude_each_other() {
    let url = file("redis://h\n");
    let path = url.path().to_str().unwrap();
    for (name, file) in
        [("REDIS_URL", "REDIS_URL_FILE"), ("WSPROXY_REDIS__URL", "WSPROXY_REDIS__URL_FILE")]
    {
        assert_eq!(
            problem(load_env([(name, "redis://g"), (file, path)])),
            format!(
                "env {file}: redis.url: cannot be set together with {name}: remove one of them"
            )
        );
    }
    // Compose files pass unset variables on as empty text.
    let loaded = load_env([("REDIS_URL", ""), ("REDIS_URL_FILE", path)]).unwrap();
    assert_eq!(loaded.config.redis.url.unwrap().expose_secret(), "redis://h");
    assert!(loaded.warnings.is_empty(), "{:?}", loaded.warnings);
    let loaded = load_env([("REDIS_URL", "redis://h"), ("REDIS_URL_FILE", "")]).unwrap();
    assert!(loaded.warnings.is_empty(), "{:?}", loaded.warnings);
}

#[test]
fn variables_with_our_prefix_that_no_key_has_are_problems() {
    for (name, near) in [
        ("WSPROXY_REDIS_URL", "WSPROXY_REDIS__URL"),
        ("WSPROXY__REDIS__URL", "WSPROXY_REDIS__URL"),
        ("wsproxy_redis__url", "WSPROXY_REDIS__URL"),
        ("WSPROXY_REDIS__URL_FIEL", "WSPROXY_REDIS__URL_FILE"),
        ("WSPROXY_CONFG", "WSPROXY_CONFIG"),
    ] {
        let expected = format!("env {name}: unknown variable; did you mean {near}?");
        assert_eq!(problem(load_env([(name, "redis://h")])), expected);
    }
}

#[test]
fn a_bare_number_in_milliseconds_says_so() {
    assert_eq!(
        problem(load_env([("HEARTBEAT_INTERVAL", "30")])),
        "env HEARTBEAT_INTERVAL: heartbeat.interval = \"30\": a bare number in this variable is \
         milliseconds; it must be a time from 100ms to 1h"
    );
    let own = problem(load_env([("WSPROXY_HEARTBEAT__INTERVAL", "0")]));
    assert!(own.ends_with("such as 30 (seconds) or \"500ms\""), "{own}");
}

#[test]
fn problems_name_the_element_of_a_list() {
    let text = "[server]\ntrusted_proxies = ['10.0.0.0/8', '10.0.0.0/33']";
    assert_eq!(
        problem(load_file(text)),
        ":2: server.trusted_proxies = ['10.0.0.0/8', '10.0.0.0/33']: element 2 (\"10.0.0.0/33\") must be a network or \
         an address, such as \"10.0.0.0/8\" or \"::1\", or \"unix:\""
    );
    let origins = problem(load_env([(
        "WSPROXY_SERVER__ALLOWED_ORIGINS",
        "https://a.example,b.example,https://c.example/",
    )]));
    assert!(origins.contains("element 2 (\"b.example\") must be an origin"), "{origins}");
    assert!(origins.contains("element 3 (\"https://c.example/\") must be"), "{origins}");
    let keys = problem(load_env([("WSPROXY_API__KEYS", "0123456789abcdef,hunter2")]));
    assert!(keys.contains("element 2 must be 16 to 256") && !keys.contains("hunter2"), "{keys}");
}

#[test]
fn files_that_cannot_be_read_say_why() {
    let text = "[jwt]\npublic_key_file = '/does/not/exist'\nalgorithms = ['ES256']";
    let key = problem(load_file(text));
    let (missing, empty) = ("No such file or directory (os error 2)", file(""));
    assert!(key.contains("/does/not/exist cannot be read") && key.contains(missing), "{key}");
    let text = text.replace("/does/not/exist", empty.path().to_str().unwrap());
    let key = load_file(&text).unwrap_err().to_string();
    assert!(key.contains("holds no PUBLIC KEY in PEM form"), "{key}");
}

#[test]
fn keys_of_the_api_are_tables_of_the_file_or_json() {
    let tables = "[[api.key]]\nname = 'a'\nsecret = '0123456789abcdef'\nscopes = ['sessions']\n\
                  [[api.key]]\nname = 'b'\nsecret = 'fedcba9876543210'\nscopes = ['events', 'admin']\n";
    let inline = "[api]\nkey = [{ name = 'a', secret = '0123456789abcdef', scopes = ['sessions'] },\n\
                  { name = 'b', secret = 'fedcba9876543210', scopes = ['events', 'admin'] }]";
    let json = r#"[{"name":"a","secret":"0123456789abcdef","scopes":["sessions"]},
                   {"name":"b","secret":"fedcba9876543210","scopes":["events","admin"]}]"#;
    let in_a_file = file(json);
    let in_a_file = [("WSPROXY_API__KEY_FILE", in_a_file.path().to_str().unwrap())];
    for loaded in [
        load_file(tables),
        load_file(inline),
        load_env([("WSPROXY_API__KEY", json)]),
        load_env(in_a_file),
    ] {
        let shown = key("api.key").write(&loaded.unwrap().config);
        assert_eq!(
            shown,
            "[{ name = \"a\", secret = \"***\", scopes = [\"sessions\"] }, \
             { name = \"b\", secret = \"***\", scopes = [\"events\", \"admin\"] }]"
        );
    }
    let text = "[[api.key]]\nname = 'a'\nsecret = '0123456789abcdef'\nscope = ['sessions']";
    assert_eq!(
        problem(load_file(text)),
        ":1: api.key = ***: of key 1, a field is unknown; did you mean scopes?"
    );
    let table = "[api.key]\nname = 'a'\nsecret = '0123456789abcdef'\nscopes = ['sessions']";
    assert!(problem(load_file(table)).starts_with(":1: api.key = ***: must be a list of tables"));
}

#[test]
fn broken_toml_is_reported_with_its_line() {
    let problems = load_file("[server]\nport = \n[log\nlevel = 'x'\n").unwrap_err().0;
    let lines: Vec<_> = problems.iter().map(|problem| problem.origin.clone()).collect();
    let [Some(ValueOrigin::File { line: 2, .. }), Some(ValueOrigin::File { line: 3, .. })] =
        lines[..]
    else {
        panic!("{problems:?}")
    };
    assert!(problem(load_file("[log]\nlevel='info'\nlevel='info'\n")).contains(":3: TOML"));
    let missing =
        load(ConfigSources { file: Some("/does/not/exist".into()), ..ConfigSources::default() });
    assert!(problem(missing).starts_with("/does/not/exist: cannot be read"));
}

#[test]
fn an_open_tunnel_needs_a_loopback_address() {
    let open = "[endpoints]\ntunnel = true\n[tunnel]\nclient_auth = \"none\"\n[server]\nbind = ";
    assert!(load_file(&format!("{open}\"127.0.0.1\"")).is_ok());
    let refused = problem(load_file(&format!("{open}\"0.0.0.0\"")));
    assert!(refused.contains("tunnel.client_auth"), "{refused}");
}

#[test]
fn a_variable_of_an_older_gateway_sets_the_key_of_every_family() {
    let loaded = load_env([
        ("MESSAGE_QUEUE_SIZE", "500"),
        ("MESSAGE_RETRY_INTERVAL", "7"),
        ("RATE_LIMIT_MAX_REQUESTS", "0"),
    ]);
    let Config { rooms, events, rate_limit, .. } = loaded.unwrap().config;
    assert_eq!((rooms.ack_queue, events.ack_queue), (500, 500));
    assert_eq!([rooms.ack_interval, events.ack_interval], [Duration::from_secs(7); 2]);
    // 0 switches the limit off for all families, also for those that have one by default.
    assert_eq!(rate_limit.max_requests_or(60), 0);
    assert_eq!(Config::default().rate_limit.max_requests_or(60), 60);
}

#[test]
fn variables_of_older_rooms_are_accepted_and_named() {
    let older = [("METRICS_SAMPLE_SIZE", "1000"), ("LATENCY_TRACKING_ENABLED", "true")];
    let elsewhere = load_env(older).unwrap();
    assert!(elsewhere.ignored.is_empty());
    let rooms = ("WSPROXY_ENDPOINTS__ROOMS", "true");
    let key = ("SECRET_KEY", "0123456789abcdef");
    let loaded = load_env([rooms, key, older[0], older[1]]).unwrap();
    assert_eq!(loaded.ignored, ["METRICS_SAMPLE_SIZE", "LATENCY_TRACKING_ENABLED"]);
}

#[test]
fn rooms_need_a_key_or_development_mode() {
    let missing = problem(load_file("[endpoints]\nrooms = true"));
    assert!(missing.contains("endpoints.rooms = true: must be false, unless"), "{missing}");
    assert!(missing.contains("rooms.development is on"), "{missing}");
    for open in ["'anywhere'", "true\n[server]\nbind = '127.0.0.1'", "true\n[server]\nbind = '::1'"]
    {
        let text = format!("[endpoints]\nrooms = true\n[rooms]\ndevelopment = {open}");
        assert!(load_file(&text).is_ok(), "{text}");
    }
    let exposed = problem(load_file("[endpoints]\nrooms = true\n[rooms]\ndevelopment = true"));
    assert!(exposed.contains("rooms.development = \"true\": must be \"anywhere\""), "{exposed}");
    assert!(exposed.ends_with("server.bind = \"0.0.0.0\" (default)"), "{exposed}");
    assert!(load_file("[rooms]\ndevelopment = true").is_ok(), "rooms are off");
}

#[test]
fn every_key_of_the_example_round_trips() {
    let example = render::example();
    assert!(load_file(&example).is_ok());
    let set: String = example
        .lines()
        .map(|line| line.strip_prefix('#').filter(|rest| !rest.starts_with(' ')).unwrap_or(line))
        .fold(String::new(), |text, line| text + line + "\n");
    let loaded = load_file(&set).unwrap();
    for key in keys::all() {
        assert!(matches!(loaded.origin(key), ValueOrigin::File { .. }), "{}", key.path());
        assert_eq!(key.write(&loaded.config), key.write(&Config::default()), "{}", key.path());
    }
}

#[test]
fn every_key_can_be_set_by_its_variable() {
    for key in keys::all() {
        let value = key.write(&Config::default());
        let value = value.trim_matches(['"', '[', ']']);
        let loaded = load_env([(key.env().as_str(), value)]).unwrap();
        assert_eq!(loaded.origin(key), &ValueOrigin::Env(key.env()));
    }
    let loaded = load_env([("WSPROXY_SESSIONS__NO_RECEIVER", "queue")]).unwrap();
    assert_eq!(loaded.config.sessions.no_receiver, NoReceiver::Queue);
    let lists = load_env([("WSPROXY_SERVER__TRUSTED_PROXIES", "10.0.0.0/8, ::1")]).unwrap();
    assert_eq!(lists.config.server.trusted_proxies.len(), 2);
}
