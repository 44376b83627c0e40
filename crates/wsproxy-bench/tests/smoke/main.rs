//! The tool as a process against its own raw limit and against gateways: small fleets, every message accounted for.

#![expect(clippy::unwrap_used, reason = "a test that cannot set up has failed")]

mod history;
mod rooms;
mod servers;
mod tunnel;

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};

use serde_json::Value;

use servers::Redis;

fn bench(arguments: &[&str]) -> (bool, Value) {
    let output = Command::new(env!("CARGO_BIN_EXE_wsproxy-bench"))
        .args(arguments)
        .args(["--json", "--connections", "50"])
        .args(if arguments.contains(&"--timeout") || arguments[0] == "tunnel" {
            &[][..]
        } else {
            &["--timeout", "20"]
        })
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    let report = serde_json::from_str(&text).unwrap_or_else(|_| panic!("{text}\n{errors}"));
    (output.status.success(), report)
}

#[test]
fn every_message_of_a_fanout_arrives() {
    let (good, report) = bench(&[&["limit", "fanout", "--burst", "16"], &SHORT[..]].concat());
    assert!(good, "{report}");
    let figures = &report["figures"];
    assert_eq!(figures["lost"], 0);
    let published = figures["published"].as_u64().unwrap();
    assert_eq!(figures["delivered"].as_u64().unwrap(), published * 50);
    assert!(figures["server_cpu_us_per_delivery"].as_f64().unwrap() > 0.0);
    assert!(figures["latency_p99_ms"].as_f64().unwrap() > 0.0);
}

#[test]
fn every_message_to_many_sessions_arrives() {
    let redis = Redis::start();
    let address = redis.address.to_string();
    let load = ["limit", "sessions", "--rates", "2000", "--publish", &address];
    let (good, report) = bench(&[&load, &SHORT[..]].concat());
    assert!(good, "{report}");
    assert_eq!(report["figures"]["delivered"], 600);
    assert!(report["figures"]["redis_cpu_percent"].as_f64().is_some());
    let (good, report) = bench(&["limit", "connect", "--publish", &address]);
    assert!(good, "{report}");
    assert_eq!(report["figures"]["opened"], 50);
}

#[test]
fn lost_connections_make_the_run_fail() {
    let mut limit = Command::new(env!("CARGO_BIN_EXE_wsproxy-bench"))
        .args(["limit", "serve"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(limit.stdout.take().unwrap()).read_line(&mut line).unwrap();
    let address = |name: &str| {
        line.split_whitespace().find_map(|word| word.strip_prefix(name)).unwrap().to_owned()
    };
    let pid = limit.id().to_string();
    let (server, publish) = (address("server="), address("publish="));
    let target = ["--target", "wsproxy", "--server", &server, "--publish", &publish];
    // The raw limit has no drain: it dies at once, and the run must count that as a failure.
    let (good, report) = bench(&[&["drain", "--pid", &pid], &target[..]].concat());
    limit.wait().unwrap();
    assert!(!good, "{report}");
    assert_eq!(report["figures"]["codes"]["1006"], 50);
}

const SHORT: [&str; 4] = ["--duration", "0.3", "--warmup", "0.1"];
