//! Tests of the place where an instance listens, and of the clients and proxies there.

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
    assert_eq!(delay("[server]\nreuse_port = false"), 3);
    assert_eq!(delay("[server]\nreuse_port = true"), 0);
    assert_eq!(delay("[server]\nreuse_port = true\ndrain_delay = 3"), 3);
}

#[test]
fn clients_that_share_an_address_are_warned_of() {
    let warnings = |text: &str| {
        let jwt =
            "[jwt]\nsecret_key = '0123456789abcdef0123456789abcdef'\n[endpoints]\nrooms = true\n";
        load_file(&format!("{jwt}{text}")).unwrap().warnings
    };
    let warned = warnings("");
    assert!(
        warned[0].starts_with("server.trusted_proxies is not set: behind a proxy"),
        "{warned:?}"
    );
    assert!(warned[0].contains("60 attempts to open a room in 60s"), "{warned:?}");
    for thought_of in [
        "[server]\ntrusted_proxies = []",
        "[server]\ntrusted_proxies = ['10.0.0.0/8']",
        "[server]\nbind = '127.0.0.1'",
        "[rate_limit]\nmax_requests = 0",
    ] {
        assert!(warnings(thought_of).is_empty(), "{thought_of}");
    }
    assert!(load_file("").unwrap().warnings.is_empty());
}

#[test]
fn agents_on_a_public_address_without_tls_are_warned_of() {
    let warnings =
        |text: &str| load_file(&format!("endpoints.agents = true\n{text}")).unwrap().warnings;
    for open in ["", "server.bind = '192.0.2.1'", "server.trusted_proxies = []"] {
        let warned = warnings(open);
        assert_eq!(warned.len(), 1, "{open}: {warned:?}");
        assert!(warned[0].contains("the secrets of users' agents cross the network"), "{warned:?}");
    }
    let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let [cert, key] = ["cert.pem", "key.pem"].map(|name| folder.path().join(name));
    std::fs::write(&cert, made.cert.pem()).unwrap();
    std::fs::write(&key, made.signing_key.serialize_pem()).unwrap();
    let encrypted = format!("[tls]\ncertificate = '{}'\nkey = '{}'", cert.display(), key.display());
    for covered in [
        "server.bind = '127.0.0.1'",
        "server.bind = '::ffff:127.0.0.1'",
        "server.unix = '/tmp/wsproxy.sock'",
        "server.trusted_proxies = ['10.0.0.0/8']",
        &encrypted,
    ] {
        assert!(warnings(covered).is_empty(), "{covered}");
    }
}
