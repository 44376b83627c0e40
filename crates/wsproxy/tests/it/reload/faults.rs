//! Reloads of what cannot be used, or is being written: nothing changes, and the answer says everything that is wrong.

use std::{
    fs,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use futures_util::future::join_all;
use serde_json::Value;
use wsproxy::config::load::ConfigSources;

use super::{Reloading, Values, names};
use crate::support::{
    gateway::TestInstance,
    http::Response,
    soon,
    tls::{Files, Made},
};

/// Asserts that nothing was reloaded; answers the problems as text.
#[track_caller]
fn refused(response: &Response) -> String {
    assert_eq!(response.status, 409, "{response:?}");
    let body = response.json();
    assert_eq!(body["error"]["code"], "configuration_invalid");
    let problems = body["problems"].as_array().unwrap();
    let text = |problem: &Value| format!("{} {}", problem["key"], problem["message"]);
    assert!(!problems.is_empty());
    problems.iter().map(text).collect::<Vec<_>>().join("\n")
}

/// Reloads until it is refused, while a thread writes again and again; answers the last answer.
async fn reload_while(running: &Reloading, mut write: impl FnMut() + Send + 'static) -> Response {
    let stop = Arc::new(AtomicBool::new(false));
    let stopped = Arc::clone(&stop);
    let writer = std::thread::spawn(move || {
        while !stopped.load(Relaxed) {
            write();
            std::thread::sleep(Duration::from_millis(5));
        }
    });
    // The writer may pause for longer than the reload watches the file.
    let end = Instant::now() + Duration::from_secs(20);
    let answer = loop {
        let answer = running.reload().await;
        if answer.status != 200 || Instant::now() > end {
            break answer;
        }
    };
    stop.store(true, Relaxed);
    writer.join().unwrap();
    answer
}

#[tokio::test]
async fn an_invalid_file_changes_nothing_and_all_problems_are_told() {
    let running = Reloading::start(&Values::new()).await;
    let mut values = Values::new().with("api.keys", "[\"new-key-0123456789\"]");
    values.set("server.prot", "1");
    values.set("limits.max_message_bytes", "\"many\"");
    values.set("jwt.public_key_file", "\"/does/not/exist\"");
    values.set("jwt.algorithms", "[\"ES256\"]");
    running.write(&values.text());
    let problems = refused(&running.reload().await);
    for part in ["server.prot", "limits.max_message_bytes", "/does/not/exist"] {
        assert!(problems.contains(part), "{part} is missing:\n{problems}");
    }
    assert_eq!((running.count("refused"), running.count("done")), (1.0, 0.0));
    // The key of the test still works, which the new file takes away.
    assert_eq!(running.instance.api("GET", "/api/v1/info", "").await.status, 200);
}

#[tokio::test]
async fn a_file_that_vanished_or_is_half_written_changes_nothing() {
    let values = Values::new();
    let running = Reloading::start(&values).await;
    let text = values.text();
    fs::remove_file(running.file()).unwrap();
    assert!(refused(&running.reload().await).contains("cannot be read"));
    running.write(&text[..text.len() - 3]);
    refused(&running.reload().await);
    // A directory and a pipe in its place: neither blocks.
    fs::remove_file(running.file()).unwrap();
    fs::create_dir(running.file()).unwrap();
    assert!(refused(&running.reload().await).contains("no regular file"));
    fs::remove_dir(running.file()).unwrap();
    let made = std::process::Command::new("mkfifo").arg(running.file()).status().unwrap();
    assert!(made.success());
    let answer = soon("an answer about a pipe", running.reload()).await;
    assert!(refused(&answer).contains("no regular file"));
    fs::remove_file(running.file()).unwrap();
    running.to(&values).await;
}

#[tokio::test]
async fn a_file_that_is_being_written_is_not_used() {
    let running = Reloading::start(&Values::new()).await;
    let (text, file) = (Values::new().text(), running.file());
    let mut rounds = 0;
    let answer = reload_while(&running, move || {
        rounds += 1;
        fs::write(&file, format!("{text}# {rounds}\n")).unwrap();
    })
    .await;
    refused(&answer);
    assert_eq!(names(&running.to(&Values::new()).await, "changed"), [""; 0]);
}

#[tokio::test]
async fn a_chain_that_is_being_written_is_not_used() {
    let (made, issuer) = (Made::new(), Made::new());
    let files = Files::new(&made);
    let mut values = Values::new();
    values.set("admin.port", "0");
    values.set("tls.certificate", &format!("\"{}\"", files.certificate().display()));
    values.set("tls.key", &format!("\"{}\"", files.key().display()));
    let running = Reloading::start(&values).await;
    let path = files.certificate();
    let mut is_whole = true;
    let answer = reload_while(&running, move || {
        // Each of them is a good pair with the key.
        is_whole = !is_whole;
        let further = if is_whole { issuer.certificate.as_str() } else { "" };
        let new = path.with_extension("new");
        fs::write(&new, format!("{}{further}", made.certificate)).unwrap();
        fs::rename(new, &path).unwrap();
    })
    .await;
    assert!(refused(&answer).contains("tls.certificate"), "{answer:?}");
    running.to(&values).await;
}

#[tokio::test]
async fn a_secret_file_that_cannot_be_used_changes_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let secret = folder.path().join("secret");
    fs::write(&secret, "k".repeat(64)).unwrap();
    let file = folder.path().join("wsproxy.toml");
    fs::write(&file, Values::new().with("endpoints.events", "true").text()).unwrap();
    let path = secret.display().to_string();
    let sources = ConfigSources {
        file: Some(file),
        environment: [("SECRET_KEY_FILE", path.as_str())].into(),
        ..ConfigSources::default()
    };
    let instance = TestInstance::from_sources(sources).await;
    let reload = async || instance.api("POST", "/api/v1/reload", "").await;
    fs::write(&secret, "").unwrap();
    assert!(refused(&reload().await).contains("is empty"));
    fs::write(&secret, "short").unwrap();
    let problems = refused(&reload().await);
    assert!(problems.contains("jwt.secret_key") && !problems.contains("short\""), "{problems}");
    fs::remove_file(&secret).unwrap();
    assert!(refused(&reload().await).contains("cannot read"));
    fs::create_dir(&secret).unwrap();
    assert!(refused(&reload().await).contains("no regular file"));
    fs::remove_dir(&secret).unwrap();
    fs::write(&secret, "n".repeat(64)).unwrap();
    let answer = reload().await;
    assert_eq!(names(&answer.json(), "changed"), ["jwt.secret_key"]);
}

#[tokio::test]
async fn values_that_fit_only_after_a_restart_change_nothing() {
    let mut values = Values::new().with("endpoints.events", "true");
    values.set("jwt.algorithms", "[\"HS512\"]");
    values.set("jwt.secret_key", &format!("\"{}\"", "k".repeat(64)));
    let running = Reloading::start(&values).await;
    values.set("jwt.algorithms", "[\"HS256\"]");
    values.set("jwt.secret_key", &format!("\"{}\"", "n".repeat(32)));
    running.write(&values.text());
    let problems = refused(&running.reload().await);
    assert!(problems.contains("jwt.secret_key") && problems.contains("restart"), "{problems}");
}

#[tokio::test]
async fn variables_and_flags_win_over_the_file() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("wsproxy.toml");
    fs::write(&file, Values::new().text()).unwrap();
    let sources = ConfigSources {
        file: Some(file.clone()),
        environment: [("WSPROXY_SERVER__ALLOWED_ORIGINS", "https://app.example")].into(),
        ..ConfigSources::default()
    };
    let instance = TestInstance::from_sources(sources).await;
    let values = Values::new().with("server.allowed_origins", "[\"https://evil.example\"]");
    fs::write(&file, values.text()).unwrap();
    let answer = instance.api("POST", "/api/v1/reload", "").await.json();
    assert_eq!((names(&answer, "changed"), names(&answer, "needs_restart")), (vec![], vec![]));
}

#[tokio::test]
async fn reloads_run_one_after_the_other() {
    let running = Reloading::start(&Values::new()).await;
    running.write(&Values::new().with("rate_limit.max_requests", "7").text());
    let answers = join_all((0..6).map(|_| running.reload())).await;
    assert!(answers.iter().all(|answer| answer.status == 200), "{answers:?}");
    let changed = |answer: &&Response| !names(&answer.json(), "changed").is_empty();
    assert_eq!(answers.iter().filter(changed).count(), 1, "one of them found the change");
    assert_eq!(running.count("done"), 6.0);
}
