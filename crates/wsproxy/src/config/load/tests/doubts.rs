//! Tests of warnings about values that are probably not meant.

use super::{load_env, load_file};

#[test]
fn variables_that_are_probably_not_meant_are_warned_of() {
    for (name, value, warning) in [
        ("REDIS_URL_FILE", "", "REDIS_URL_FILE is empty, so it does not set redis.url."),
        ("REDIS_URL", "", "REDIS_URL is empty, so it does not set redis.url."),
        ("SECRET_KEY_FILE", "", "SECRET_KEY_FILE is empty, so it does not set jwt.secret_key."),
        ("WSPROXY_CONFIG", "", "WSPROXY_CONFIG is empty, so no file is read."),
        ("REDIS_URI", "redis://h", "REDIS_URI is not read by wsproxy; did you mean REDIS_URL?"),
        ("redis_url", "redis://h", "redis_url is not read by wsproxy; did you mean REDIS_URL?"),
        (
            "REDIS_URL_FIEL",
            "/x",
            "REDIS_URL_FIEL is not read by wsproxy; did you mean REDIS_URL_FILE?",
        ),
        (
            "HEARTBEAT_INTERVAL",
            "300",
            "HEARTBEAT_INTERVAL = 300 is 300 milliseconds; write 300s for seconds.",
        ),
    ] {
        assert_eq!(load_env([(name, value)]).unwrap().warnings, [warning]);
    }
    for usual in [
        ("REDIS_PORT", "tcp://10.0.0.1:6379"),
        ("REDIS_HOST", "h"),
        ("SERVER_IP", "10.0.0.1"),
        ("HEARTBEAT_INTERVAL", "15000"),
        ("PORT", ""),
    ] {
        assert!(load_env([usual]).unwrap().warnings.is_empty(), "{usual:?}");
    }
    let both = load_env([("REDIS_URI", "redis://h"), ("REDIS_URL", "redis://h")]).unwrap();
    assert!(both.warnings.is_empty(), "{:?}", both.warnings);
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
