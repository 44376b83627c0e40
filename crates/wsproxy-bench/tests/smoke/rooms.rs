//! Members of rooms, against a gateway as a process.

use crate::bench;
use crate::servers::{Gateway, Redis};

#[test]
fn members_of_rooms_see_the_last_move_of_each_other() {
    let redis = Redis::start();
    let gateway = Gateway::start(&redis, &IN_DEVELOPMENT);
    let (server, publish) = (gateway.address.to_string(), redis.address.to_string());
    let pid = gateway.pid().to_string();
    let at = ["--server", &server, "--publish", &publish, "--pid", &pid];
    let load = ["rooms", "moves", "--rooms", "5", "--duration", "1", "--warmup", "0.2"];
    for form in [&[][..], &["--single"]] {
        let (good, report) = bench(&[&load, form, &at].concat());
        assert!(good, "{report}");
        let figures = &report["figures"];
        assert_eq!(figures["lost"], 0);
        assert!(figures["deliveries_per_s"].as_f64().unwrap() > 0.0, "{report}");
        assert!(figures["move_p99_ms"].as_f64().unwrap() > 0.0, "{report}");
        assert!(figures["redis_commands_per_s"].as_f64().unwrap() > 0.0, "{report}");
    }
}

/// Members name themselves, all of them from a few addresses.
const IN_DEVELOPMENT: [(&str, &str); 3] = [
    ("WSPROXY_ENDPOINTS__ROOMS", "true"),
    ("WSPROXY_ROOMS__DEVELOPMENT", "true"),
    ("WSPROXY_RATE_LIMIT__MAX_REQUESTS", "0"),
];
