//! The program: the signal, the log and its level, the supervisor, and the command `wsproxy reload`.

use std::{
    fs,
    os::unix::net::UnixDatagram,
    process::{Command, Output, Stdio},
    time::Duration,
};

use rustix::process::Signal;
use tempfile::TempDir;

use super::Values;
use crate::support::{binary::Binary, gateway::API_KEY};

/// A configuration file for a binary, which gets address and key from variables.
struct File(TempDir);

impl File {
    fn new(text: &str) -> Self {
        let file = Self(tempfile::tempdir().unwrap());
        file.write(text);
        file
    }

    fn path(&self) -> String {
        self.0.path().join("wsproxy.toml").display().to_string()
    }

    fn write(&self, text: &str) {
        fs::write(self.path(), text).unwrap();
    }
}

#[tokio::test]
async fn a_signal_reloads_the_level_and_the_log_says_so() {
    let file = File::new("[log]\nlevel = \"info\"\n");
    let binary = Binary::start(&[("WSPROXY_CONFIG", &file.path()), ("LOG_LEVEL", "")]).await;
    let called = "A worker called the API.";
    binary.api("GET", "/api/v1/info", "").await;
    file.write("[log]\nlevel = \"debug\"\n[server]\nthreads = 2\n[sessions]\nhistory = true\n");
    binary.signal(Signal::HUP);
    let line = binary.line(RELOADED).await;
    assert_eq!(line["by"], "SIGHUP");
    assert_eq!(line["changed"], "log.level = \"debug\"");
    // The number of threads is a variable here, which wins.
    assert_eq!(line["needs_restart"], "sessions.history = true");
    binary.api("GET", "/api/v1/info", "").await;
    binary.line(called).await;
    assert_eq!(binary.lines(called).len(), 1, "the call at the level info left no line");
    file.write("[log]\nlevel = \"loud\"\n[server]\nprot = 1\n");
    binary.signal(Signal::HUP);
    let line = binary.line("Nothing was reloaded: the configuration has problems.").await;
    assert_eq!((&line["by"], &line["problems"]), (&"SIGHUP".into(), &2.into()));
    assert_eq!(binary.lines("The configuration cannot be reloaded.").len(), 2);
    assert_eq!(binary.metric("wsproxy_reloads_total{outcome=\"refused\"}").await, 1.0);
    assert!(!binary.log().contains(API_KEY));
}

#[tokio::test]
async fn the_supervisor_is_told_when_a_reload_begins_and_ends() {
    let file = File::new("");
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("notify");
    let socket = UnixDatagram::bind(&path).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let path = path.display().to_string();
    let variables = [("WSPROXY_CONFIG", &*file.path()), ("NOTIFY_SOCKET", &*path)];
    let binary = Binary::start(&variables).await;
    let next = || {
        let mut bytes = [0; 256];
        let length = socket.recv(&mut bytes).unwrap();
        String::from_utf8(bytes[..length].to_vec()).unwrap()
    };
    assert_eq!(next().trim(), "READY=1");
    binary.signal(Signal::HUP);
    let begins = next();
    let time = begins.trim().strip_prefix("RELOADING=1\nMONOTONIC_USEC=").unwrap();
    assert!(time.parse::<u64>().unwrap() > 0);
    binary.line(RELOADED).await;
    assert_eq!(next().trim(), "READY=1");
}

fn command(arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_wsproxy"));
    command.arg("reload").args(arguments).env_clear().stdin(Stdio::null());
    command.output().unwrap()
}

#[tokio::test]
async fn the_command_prints_the_answer() {
    let file = File::new("");
    let binary = Binary::start(&[("WSPROXY_CONFIG", &file.path()), ("LOG_LEVEL", "")]).await;
    let run = async |arguments: Vec<String>| {
        let work = tokio::task::spawn_blocking(move || {
            command(&arguments.iter().map(String::as_str).collect::<Vec<_>>())
        });
        let output = work.await.unwrap();
        let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
        (output.status.code(), text(&output.stdout), text(&output.stderr))
    };
    // A file with the address and the key, as the file of `serve` usually has both.
    let mut own = Values::new();
    own.set("server.port", &binary.address.port().to_string());
    let own = File::new(&own.text());
    let by_config = || vec!["--config".to_owned(), own.path()];
    file.write("[log]\nlevel = \"debug\"\n[sessions]\nhistory = true\n");
    let (code, out, _) = run(by_config()).await;
    assert_eq!(code, Some(0));
    let expected = "Reloaded. Changed:\n  log.level = \"debug\" (was \"info\")\nNeeds a restart:\n  \
                    sessions.history = true (was false)\n";
    assert_eq!(out, expected);
    // By URL and key.
    let key = File::new(API_KEY);
    let url = format!("http://{}", binary.address);
    let by_url = |key: &File, rest: &[&str]| {
        let words = ["--url", &url, "--key-file", &key.path()].map(str::to_owned);
        words.into_iter().chain(rest.iter().map(|word| (*word).to_owned())).collect()
    };
    let (code, out, _) = run(by_url(&key, &["--json"])).await;
    assert_eq!(code, Some(0));
    let answer: serde_json::Value = serde_json::from_str(&out).unwrap();
    assert_eq!(answer["changed"], serde_json::json!([]));
    let (code, _, err) = run(by_url(&File::new("wrong-key-0123456789"), &[])).await;
    assert!(code == Some(77) && err.contains("not known") && !err.contains("wrong-key"), "{err}");
    file.write("[log]\nlevel = \"loud\"\n[server]\nprot = 1\n");
    let (code, _, err) = run(by_config()).await;
    assert!(code == Some(78) && err.contains("log.level") && err.contains("server.prot"), "{err}");
    drop(binary);
    let (code, _, err) = run(by_config()).await;
    assert!(code == Some(69) && err.contains("does not answer"), "{code:?} {err}");
}

#[tokio::test]
async fn the_command_reaches_a_unix_socket_and_writes_a_proxy_header() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("wsproxy.sock").display().to_string();
    let unix = format!("unix = \"{socket}\"\ntrusted_proxies = [\"unix:\"]");
    let port = "bind = \"127.0.0.1\"\ntrusted_proxies = [\"127.0.0.1\"]";
    for place in [&unix, port] {
        let server = |port: &str| {
            format!(
                "[api]\nkeys = [\"{API_KEY}\"]\n[server]\nproxy_protocol = true\n{place}\n{port}"
            )
        };
        let file = File::new(&server(""));
        let variables = [
            ("WSPROXY_CONFIG", &*file.path()),
            ("WSPROXY_SERVER__BIND", ""),
            ("WSPROXY_API__KEYS", ""),
            ("LOG_LEVEL", ""),
            ("PORT", if place == port { "0" } else { "" }),
        ];
        let binary = match place == port {
            true => Binary::start(&variables).await,
            false => Binary::start_on_socket(&variables).await,
        };
        let port = format!("port = {}\n", binary.address.port());
        let own = File::new(&server(if place.contains("unix:") { "" } else { &port }));
        file.write(&format!("{}[log]\nlevel = \"debug\"\n", server("")));
        let output = command(&["--config", &own.path()]);
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(output.status.success() && text.contains("log.level"), "{text}");
        let health = Command::new(env!("CARGO_BIN_EXE_wsproxy"))
            .args(["health", "--config", &own.path()])
            .env_clear()
            .status();
        assert!(health.unwrap().success());
    }
    // By URL, of a socket that is gone.
    let key = File::new(API_KEY);
    let url = format!("http://unix:{socket}");
    let output = command(&["--url", &url, "--key-file", &key.path()]);
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(text.contains(&format!("{url}:/api/v1/reload does not answer")), "{text}");
    assert_eq!(output.status.code(), Some(69));
}

const RELOADED: &str = "The configuration was reloaded.";
