//! Tests of the place where an instance listens.

use super::*;

#[test]
fn a_unix_socket_excludes_an_address_that_is_set() {
    let text = "[server]\nunix = '/run/a.sock'\nport = 80\nbind = '::'";
    let problems = load_file(text).unwrap_err().0;
    assert_eq!(problems.len(), 2, "{problems:?}");
    let port = problems[0].to_string();
    let expected = ":3: server.port = 80: must not be set beside server.unix = \"/run/a.sock\"";
    assert!(port.contains(expected), "{port}");
    assert!(problems[1].to_string().contains(":4: server.bind = \"::\": must not be"));
    let env = load_env([("PORT", "80"), ("WSPROXY_SERVER__UNIX", "/run/a.sock")]);
    assert!(problem(env).contains("PORT"));
    let fine = load_file("[server]\nunix = '/run/a.sock'\n[admin]\nport = 8080").unwrap();
    assert_eq!(fine.config.server.unix_mode, 0o660);
}

#[test]
fn an_instance_that_shares_its_port_drains_at_once() {
    let delay = |text| load_file(text).unwrap().config.server.drain_delay.as_secs();
    assert_eq!(delay("[server]\nreuse_port = false"), 5);
    assert_eq!(delay("[server]\nreuse_port = true"), 0);
    assert_eq!(delay("[server]\nreuse_port = true\ndrain_delay = 3"), 3);
}
