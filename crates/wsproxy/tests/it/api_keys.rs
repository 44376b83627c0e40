//! Keys of the worker API: their scopes, their traces in log and metrics, and files that change.

use std::path::Path;

use serde_json::json;
use wsproxy::config::api_key::{ApiKey, KeySecret, Scope};

use crate::support::{
    binary::Binary,
    eventually,
    gateway::{API_KEY, TestInstance},
    http::{self, Response},
    soon,
};

/// The secret of the key that has one scope.
fn secret(scope: &str) -> String {
    format!("{scope}-secret-0123456789")
}

async fn with_scoped_keys() -> TestInstance {
    TestInstance::with(|config| {
        config.endpoints.events = true;
        config.jwt.secret_key = Some("0123456789abcdef0123456789abcdef".into());
        config.api.key = Scope::ALL
            .into_iter()
            .map(|scope| ApiKey {
                name: format!("only-{}", scope.label()),
                secret: KeySecret::Text(secret(scope.label()).into()),
                scopes: [scope].into_iter().collect(),
            })
            .collect();
    })
    .await
}

async fn ask(
    instance: &TestInstance,
    secret: &str,
    method: &str,
    path: &str,
    body: &str,
) -> Response {
    let key = format!("Bearer {secret}");
    let headers = [("authorization", key.as_str())];
    http::request(instance.address(), method, path, &headers, body.as_bytes()).await
}

#[tokio::test]
async fn a_key_without_scope_is_told_the_missing_one() {
    let instance = with_scoped_keys().await;
    for (method, path) in wsproxy::endpoint::api_routes() {
        if path.ends_with("openapi.json") {
            continue;
        }
        let needed = match path.split('/').nth(3).unwrap() {
            "agents" if path.ends_with("/sessions/events") => "sessions",
            "clusters" | "console" | "info" | "reload" => "admin",
            family => family,
        };
        let ids = [
            ("{session_id}", "s"),
            ("{agent_id}", "a"),
            ("{stream_id}", "t"),
            ("{user_id}", "u"),
            ("{request_id}", "q"),
            ("{cluster_id}", "c"),
        ];
        let path = ids.iter().fold((*path).to_owned(), |path, (name, id)| path.replace(name, id));
        for scope in SCOPES {
            let method = method.to_ascii_uppercase();
            let answer = ask(&instance, &secret(scope), &method, &path, "").await;
            if scope == needed {
                assert!(!answer.body.contains("missing_scope"), "{method} {path}: {answer:?}");
            } else {
                answer.assert_refused(403, &format!("missing_scope_{needed}"));
            }
        }
        // A plain key has all scopes.
        let answer = ask(&instance, API_KEY, &method.to_ascii_uppercase(), &path, "").await;
        assert!(!answer.body.contains("missing_scope"), "{method} {path}: {answer:?}");
    }
}

#[tokio::test]
async fn a_batch_to_sessions_needs_their_scope_too() {
    let instance = with_scoped_keys().await;
    let batch = r#"{"messages":[{"to":"session:s","message":1,"history":false},
        {"to":"user:u","message":{"type":"x"},"history":false}]}"#;
    let path = "/api/v1/events/batch";
    let answer = ask(&instance, &secret("events"), "POST", path, batch).await;
    let results = answer.json();
    assert_eq!(results["results"][0]["error"]["code"], "missing_scope_sessions");
    assert_eq!(results["results"][1], json!({ "receivers": 0 }));
    let all = ask(&instance, API_KEY, "POST", path, batch).await.json();
    assert_eq!(all["results"][0], json!({ "receivers": 0 }));
}

#[tokio::test]
async fn calls_are_counted_by_the_names_of_keys() {
    let instance = with_scoped_keys().await;
    let of = |key: &str, outcome: &str| {
        instance.metric(&format!("wsproxy_api_calls_total{{key=\"{key}\",outcome=\"{outcome}\"}}"))
    };
    assert_eq!(ask(&instance, &secret("admin"), "GET", "/api/v1/info", "").await.status, 200);
    assert_eq!(ask(&instance, &secret("events"), "GET", "/api/v1/info", "").await.status, 403);
    assert_eq!(ask(&instance, API_KEY, "GET", "/api/v1/info", "").await.status, 200);
    assert_eq!((of("only-admin", "accepted"), of("only-admin", "missing_scope")), (1.0, 0.0));
    assert_eq!((of("only-events", "accepted"), of("only-events", "missing_scope")), (0.0, 1.0));
    assert_eq!(of("api.keys", "accepted"), 1.0);
    assert_eq!(instance.metric("wsproxy_errors_total{kind=\"api_key\"}"), 1.0);
}

async fn info(binary: &Binary, secret: &str) -> Response {
    let key = format!("Bearer {secret}");
    let headers = [("authorization", key.as_str())];
    http::request(binary.address, "GET", "/api/v1/info?secret=x", &headers, b"").await
}

#[tokio::test]
async fn keys_leave_their_names_in_the_log_and_never_their_secrets() {
    let keys = r#"[{"name":"deploy","secret":"deploy-secret-0123456789","scopes":["admin"]},
                   {"name":"mail","secret":"mail-secret-0123456789","scopes":["events"]}]"#;
    let binary = Binary::start(&[("WSPROXY_API__KEY", keys)]).await;
    assert_eq!(info(&binary, "deploy-secret-0123456789").await.status, 200);
    let line = binary.line("A worker called the API.").await;
    assert_eq!((&line["key"], &line["level"]), (&json!("deploy"), &json!("DEBUG")));
    assert_eq!((&line["method"], &line["path"]), (&json!("GET"), &json!("/api/v1/info")));
    assert_eq!(info(&binary, API_KEY).await.status, 200);
    eventually("the plain key is named by its place", || {
        binary.lines("A worker called the API.").iter().any(|line| line["key"] == "api.keys[1]")
    })
    .await;

    info(&binary, "mail-secret-0123456789").await.assert_refused(403, "missing_scope_admin");
    let line = binary.line("A call of the API was refused.").await;
    assert_eq!((&line["key"], &line["level"]), (&json!("mail"), &json!("WARN")));
    assert_eq!(
        (&line["code"], &line["address"]),
        (&json!("missing_scope_admin"), &json!("127.0.0.1"))
    );
    // Strangers who guess do not fill the log.
    let before = std::time::Instant::now();
    for n in 0..50 {
        let guess = format!("guessed-secret-{n:010}");
        info(&binary, &guess).await.assert_refused(403, "invalid_token");
    }
    let lines = binary.lines("A call of the API was refused.").len() as u64;
    assert!(lines <= 2 + before.elapsed().as_secs(), "{lines}");
    assert!(!binary.log().contains("-secret-"), "a secret is in the log");
    assert!(!binary.log().contains("secret=x"), "the query is in the log");
}

#[tokio::test]
async fn keys_in_files_change_without_a_restart() {
    let folder = tempfile::tempdir().unwrap();
    let (named, plain) = (folder.path().join("named"), folder.path().join("plain"));
    std::fs::write(&named, "named-old-0123456789\n").unwrap();
    std::fs::write(&plain, "plain-old-0123456789\nplain-two-0123456789\n").unwrap();
    let keys = json!([{ "name": "named", "secret_file": named, "scopes": ["admin"] }]).to_string();
    let mut binary = Binary::start(&[
        ("WSPROXY_API__KEY", &keys),
        ("WSPROXY_API__KEYS", ""),
        ("WSPROXY_API__KEYS_FILE", plain.to_str().unwrap()),
    ])
    .await;
    let works = async |secret: &str| info(&binary, secret).await.status == 200;
    assert!(works("named-old-0123456789").await && works("plain-old-0123456789").await);

    // Another file in its place, as a mounted secret is changed.
    let next = folder.path().join("next");
    std::fs::write(&next, "named-new-0123456789\n").unwrap();
    std::fs::rename(&next, &named).unwrap();
    soon("the new key works", async { while !works("named-new-0123456789").await {} }).await;
    assert!(!works("named-old-0123456789").await);
    binary.line("The file of an API key was read again.").await;

    let trouble = "The file of an API key cannot be used: the key stays as it was.";
    let spoils: [fn(&Path) -> std::io::Result<()>; 2] =
        [|file| std::fs::write(file, ""), |file| std::fs::remove_file(file)];
    for spoil in spoils {
        let before = binary.lines(trouble).len();
        spoil(&named).unwrap();
        eventually("it is said", || binary.lines(trouble).len() > before).await;
        assert!(works("named-new-0123456789").await);
    }
    // The list of plain keys.
    assert!(works("plain-two-0123456789").await);
    std::fs::write(&plain, "plain-new-0123456789\n").unwrap();
    soon("the new key works", async { while !works("plain-new-0123456789").await {} }).await;
    assert!(!works("plain-old-0123456789").await && !works("plain-two-0123456789").await);
    binary.signal(rustix::process::Signal::TERM);
    assert!(binary.exited().await.success());
    assert!(!binary.log().contains("0123456789"));
}

const SCOPES: [&str; 5] = ["sessions", "events", "rooms", "agents", "admin"];
