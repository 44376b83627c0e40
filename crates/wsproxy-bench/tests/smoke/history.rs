//! Histories, resumption, outages and several instances, against gateways as processes.

use crate::bench;
use crate::servers::{Gateway, Redis};

#[test]
fn plain_messages_and_those_with_history_take_turns() {
    let redis = Redis::start();
    let gateway = Gateway::start(&redis, &WITH_HISTORY);
    let (server, publish) = (gateway.address.to_string(), redis.address.to_string());
    let pid = gateway.pid().to_string();
    let at = ["--server", &server, "--publish", &publish, "--pid", &pid];
    let short = ["--duration", "0.6", "--warmup", "0.1", "--turns", "2"];
    for (shape, rate, receivers) in [(&[][..], "1000", 1), (&["--shared"][..], "50", 50)] {
        let load = ["history", "--rate", rate];
        let (good, report) = bench(&[&load, shape, &at, &short].concat());
        assert!(good, "{report}");
        let figures = &report["figures"];
        let of = |name: &str| figures[name].as_u64().unwrap();
        assert!(of("history_published") > 0);
        assert!(of("delivered") >= (of("history_published") + of("plain_published")) * receivers);
        assert!(figures["redis_cpu_ratio"].as_f64().unwrap() > 0.0, "{report}");
    }
}

#[test]
fn clients_of_a_killed_instance_resume_at_another() {
    let redis = Redis::start();
    let (one, other) =
        (Gateway::start(&redis, &WITH_HISTORY), Gateway::start(&redis, &WITH_HISTORY));
    let (server, publish) = (one.address.to_string(), redis.address.to_string());
    let (next, pids) = (other.address.to_string(), format!("{},{}", one.pid(), other.pid()));
    let at = ["--server", &server, "--publish", &publish, "--other", &next, "--pid", &pids];
    let (good, report) = bench(&[&["resume"], &at[..]].concat());
    assert!(good, "{report}");
    assert_eq!(report["figures"]["resumed"], 50);
    assert_eq!(report["figures"]["delivered"], 50 * 20);
    assert_eq!(report["figures"]["cut_off"], 50);
}

#[test]
fn an_instance_without_history_makes_the_run_fail() {
    let redis = Redis::start();
    let (one, other) = (Gateway::start(&redis, &WITH_HISTORY), Gateway::start(&redis, &[]));
    let (server, publish) = (one.address.to_string(), redis.address.to_string());
    let (next, pids) = (other.address.to_string(), format!("{},{}", one.pid(), other.pid()));
    let at = ["--server", &server, "--publish", &publish, "--other", &next, "--pid", &pids];
    let (good, report) = bench(&[&["resume"], &at[..], &["--timeout", "1"]].concat());
    assert!(!good, "{report}");
    assert_eq!(report["figures"]["lost"], 50 * 20);
}

#[test]
fn clients_get_over_an_outage_of_redis() {
    let redis = Redis::keeping("appendonly yes\nappendfsync always");
    let gateway = Gateway::start(&redis, &WITH_HISTORY);
    let (server, publish) = (gateway.address.to_string(), redis.address.to_string());
    let (pid, conf) = (gateway.pid().to_string(), redis.conf.display().to_string());
    let at = ["--server", &server, "--publish", &publish, "--pid", &pid, "--redis-conf", &conf];
    let load = ["outage", "--rate", "500", "--down", "0.5", "--duration", "0.5"];
    let (good, report) = bench(&[&load, &at[..]].concat());
    assert!(good, "{report}");
    assert_eq!(report["figures"]["delivered"], 750);
    assert!(report["figures"]["caught_up_s"].as_f64().unwrap() > 0.0, "{report}");
}

#[test]
fn users_of_several_instances_get_own_and_broadcast_messages() {
    let redis = Redis::start();
    let secret = "0123456789abcdef0123456789abcdef";
    let settings = [
        ("WSPROXY_ENDPOINTS__EVENTS", "true"),
        ("WSPROXY_JWT__SECRET_KEY", secret),
        ("HEARTBEAT_INTERVAL", "500"),
    ];
    let (one, other) = (Gateway::start(&redis, &settings), Gateway::start(&redis, &settings));
    let servers = format!("{},{}", one.address, other.address);
    let (publish, pids) = (redis.address.to_string(), format!("{},{}", one.pid(), other.pid()));
    let at = ["--servers", &servers, "--publish", &publish, "--pid", &pids, "--secret", secret];
    let load = ["cluster", "--connect-rate", "500", "--from", "10", "--settle", "0.1"];
    let rates = ["--rate", "200", "--broadcast-rate", "5", "--duration", "0.6", "--warmup", "0.2"];
    let (good, report) = bench(&[&load[..], &rates, &at].concat());
    assert!(good, "{report}");
    let of = |name: &str| report["figures"][name].as_u64().unwrap();
    assert_eq!(of("users_delivered"), 120);
    assert_eq!(of("broadcast_delivered"), 3 * 50);
    assert_eq!(of("both_delivered"), 120 + 3 * 50);
    assert_eq!(of("opened"), 40);
    assert!(of("heartbeats_answered") > 0, "{report}");
}

#[test]
fn clients_of_a_killed_instance_spread_over_the_others() {
    let redis = Redis::start();
    let secret = "0123456789abcdef0123456789abcdef";
    let settings = [
        ("WSPROXY_ENDPOINTS__EVENTS", "true"),
        ("WSPROXY_JWT__SECRET_KEY", secret),
        ("HEARTBEAT_INTERVAL", "500"),
    ];
    let instances = [(); 3].map(|()| Gateway::start(&redis, &settings));
    let listed =
        |of: &dyn Fn(&Gateway) -> String| instances.iter().map(of).collect::<Vec<_>>().join(",");
    let servers = listed(&|one| one.address.to_string());
    let (publish, pids) = (redis.address.to_string(), listed(&|one| one.pid().to_string()));
    let at = ["--servers", &servers, "--publish", &publish, "--pid", &pids];
    let load = ["scale", "--connect-rate", "500", "--from", "10", "--settle", "0.1", "--idle", "1"];
    let rates = ["--rate", "200", "--duration", "0.5", "--warmup", "0.2", "--timeout", "20"];
    let users = ["--target", "events", "--secret", secret, "--history", "--broadcast-rate", "5"];
    // The instance that is killed takes no part in the second run.
    let two: Vec<String> =
        [&servers, &pids].map(|list| list.split(',').take(2).collect::<Vec<_>>().join(",")).into();
    let at_two = ["--servers", &two[0], "--publish", &publish, "--pid", &two[1]];
    for (kind, at) in [(&users[..], &at[..]), (&[][..], &at_two[..])] {
        let (good, report) = bench(&[&load[..], &rates, kind, at].concat());
        assert!(good, "{report}");
        let of = |name: &str| report["figures"][name].as_u64().unwrap();
        assert_eq!(of("open_at_the_end"), 50);
        assert_eq!(of("reopened"), of("cut_off"));
        // Less than the time after which a wait gives up.
        assert!(report["figures"]["cut_off_s"].as_f64().unwrap() < 10.0, "{report}");
        assert_eq!(of("users_delivered"), 100);
        assert!(of("after_delivered") >= 100);
        let cpu = &report["figures"]["idle_server_cpu_us_per_connection_second"];
        assert!(cpu.as_f64().unwrap() > 0.0, "{report}");
    }
}

const WITH_HISTORY: [(&str, &str); 1] = [("WSPROXY_SESSIONS__HISTORY", "true")];
