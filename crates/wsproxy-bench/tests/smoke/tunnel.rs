//! The scenarios of the tunnel against a plain proxy in its place, with the tool's own service and link.

use std::net::SocketAddr;
use std::process::{Child, Command, Stdio};

use crate::bench;
use crate::servers::{free_address, until_it_listens};

/// A service of the tool, by the name of its command.
struct Service {
    child: Child,
    address: SocketAddr,
}

impl Service {
    fn start(name: &str, options: &[&str]) -> Self {
        let address = free_address();
        let child = Command::new(env!("CARGO_BIN_EXE_wsproxy-bench"))
            .args([name, "--listen", &address.to_string()])
            .args(options)
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        until_it_listens(address);
        Self { child, address }
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn bodies_and_small_requests_pass_a_proxy() {
    let upstream = Service::start("upstream", &[]);
    let relay = Service::start("relay", &["--to", &upstream.address.to_string()]);
    let proxy = Service::start("proxy", &["--to", &relay.address.to_string()]);
    let (server, pid) = (proxy.address.to_string(), proxy.child.id().to_string());
    let run = |case: &[&str]| {
        let (good, report) =
            bench(&[&["tunnel"], case, &["--server", &server, "--pid", &pid]].concat());
        assert!(good, "{report}");
        report["figures"].clone()
    };
    let bulk = run(&["bulk", "--bytes", "3000000", "--times", "2"]);
    assert!(bulk["down_mb_per_s"].as_f64().unwrap() > 0.0);
    assert!(bulk["up_cpu_s_per_gb"].as_f64().unwrap() > 0.0);
    let small = run(&["small", "--at-once", "1,20", "--duration", "0.3"]);
    assert!(small["at_20_cpu_us_per_request"].as_f64().unwrap() > 0.0);
    assert_eq!(small["at_1_errors"], 0);
}

#[test]
fn clients_that_leave_are_timed_at_the_service() {
    let upstream = Service::start("upstream", &[]);
    let proxy = Service::start("proxy", &["--to", &upstream.address.to_string()]);
    let (server, upstream) = (proxy.address.to_string(), upstream.address.to_string());
    let (good, report) = bench(&["tunnel", "leave", "--server", &server, "--upstream", &upstream]);
    assert!(good, "{report}");
    for state in ["streaming", "waiting", "stalled"] {
        assert!(report["figures"][format!("{state}_p99_ms")].as_f64().unwrap() > 0.0, "{report}");
    }
}

#[test]
fn cuts_of_the_link_leave_every_post_counted() {
    let upstream = Service::start("upstream", &[]);
    let control = free_address().to_string();
    let to = upstream.address.to_string();
    let relay = Service::start("relay", &["--to", &to, "--control", &control]);
    let server = relay.address.to_string();
    let load = ["tunnel", "cuts", "--rate", "100", "--duration", "2"];
    let (good, report) = bench(
        &[&load, &["--server", &server, "--upstream", &to, "--control", &control][..]].concat(),
    );
    assert!(good, "{report}");
    assert!(report["figures"]["cuts"].as_u64().unwrap() > 0, "{report}");
    assert!(report["figures"]["ended_200"].as_u64().unwrap() > 0, "{report}");
}
