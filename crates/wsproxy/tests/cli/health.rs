//! `wsproxy health`, and `wsproxy reload` as far as it needs no instance.

use std::{
    io::{Read, Write},
    net::TcpListener,
    thread,
};

use super::{files, free_port, stderr, wsproxy};

#[test]
fn an_instance_that_is_not_there_is_not_healthy() {
    let output = wsproxy(&["health"], &[("PORT", &free_port())]);
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("is not healthy"));
}

#[test]
fn health_opens_no_file_that_may_be_replaced() {
    let (_folder, file) = files();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port().to_string();
    let instance = thread::spawn(move || {
        for _ in 0..2 {
            let (mut socket, _) = listener.accept().unwrap();
            assert!(socket.read(&mut [0; 1024]).unwrap() > 0);
            socket.write_all(b"HTTP/1.1 200 OK\r\n\r\n").unwrap();
        }
    });
    for bad in ["empty", "missing"] {
        let bad = file(bad);
        let keys = serde_json::json!([{ "name": "a", "secret_file": bad, "scopes": ["events"] }]);
        let env = [
            ("METRICS_PORT", port.as_str()),
            ("WSPROXY_TLS__CERTIFICATE", &file("certificate")),
            ("WSPROXY_TLS__KEY", &bad),
            ("WSPROXY_API__KEY", &keys.to_string()),
            ("WSPROXY_API__KEYS_FILE", &bad),
        ];
        assert_eq!(wsproxy(&["config", "check"], &env).status.code(), Some(78));
        let health = wsproxy(&["health"], &env);
        assert_eq!((health.status.code(), stderr(&health)), (Some(0), ""));
    }
    instance.join().unwrap();
}
