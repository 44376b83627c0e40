//! Tests of `wsproxy dev` as a user runs it: terminal, page and demo worker.
#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::TcpStream,
    process::{Child, Command, Stdio},
    sync::mpsc::{self, Receiver},
    time::Duration,
};

use rustix::process::{Pid, Signal, kill_process};

/// The running program and the lines that it prints.
struct Dev {
    child: Child,
    lines: Receiver<String>,
    proof: String,
    address: String,
}

impl Dev {
    fn start() -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_wsproxy"));
        command.args(["dev", "--port", "0"]).env_clear().stdin(Stdio::null());
        // Both streams in one pipe, in the order in which a terminal shows them.
        let (out, end) = std::io::pipe().unwrap();
        command.stdout(end.try_clone().unwrap()).stderr(end);
        let child = command.spawn().unwrap();
        // The command has the writing ends of the pipe, which would keep it open.
        drop(command);
        let out = BufReader::new(out);
        let (sender, lines) = mpsc::sync_channel(64);
        std::thread::spawn(move || {
            out.lines().map_while(Result::ok).for_each(|line| drop(sender.send(line)));
        });
        let mut dev = Self { child, lines, proof: String::new(), address: String::new() };
        dev.proof = dev.line("message through:");
        let open = dev.line("Open ");
        dev.address = open.split("http://").nth(1).unwrap().trim_end_matches('/').to_owned();
        dev
    }

    /// Returns the next line that begins with `start`.
    fn line(&self, start: &str) -> String {
        loop {
            let line = self.lines.recv_timeout(DEADLINE).unwrap();
            if line.starts_with(start) {
                return line;
            }
        }
    }

    /// Sends a request; returns status and body of the answer.
    fn ask(&self, method: &str, path: &str, host: &str, body: &str) -> (u16, String) {
        let mut stream = TcpStream::connect(&self.address).unwrap();
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        let length = body.len();
        write!(stream, "{method} {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n{body}").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        (head.split(' ').nth(1).unwrap().parse().unwrap(), body.to_owned())
    }
}

impl Drop for Dev {
    fn drop(&mut self) {
        // The process may have ended already, if the test has waited for that.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn a_message_goes_through_and_a_signal_ends_it() {
    let mut dev = Dev::start();
    let proof = dev.proof.clone();
    assert!(proof.starts_with("message through: client -> worker -> client in "), "{proof}");
    let pid = Pid::from_raw(dev.child.id().cast_signed()).unwrap();
    kill_process(pid, Signal::TERM).unwrap();
    assert_eq!(dev.child.wait().unwrap().code(), Some(0));
}

#[test]
fn the_terminal_ends_with_the_address() {
    let dev = Dev::start();
    // Log lines of sessions do not follow the address.
    assert_eq!(dev.ask("POST", "/dev/session", "localhost", "").0, 201);
    assert_eq!(dev.ask("GET", "/demo/ws/s", "localhost", "").0, 426);
    let after = dev.lines.recv_timeout(Duration::from_millis(500));
    assert!(after.is_err(), "{after:?}");
}

#[test]
fn a_session_can_be_left_to_another_worker() {
    let dev = Dev::start();
    let (status, body) = dev.ask("GET", "/dev/key", "localhost", "");
    let key: serde_json::Value = serde_json::from_str(&body).unwrap();
    let key = key["api_key"].as_str().unwrap();
    assert!(status == 200 && key.len() > 40);
    assert_eq!(dev.ask("GET", "/dev/key", "evil.example", "").0, 403);
    let (status, body) =
        dev.ask("POST", "/dev/session", "localhost", r#"{"session_id":"s","agent_id":"mine"}"#);
    assert!(status == 201 && body.contains(r#""agent_id":"mine""#), "{body}");
    assert_eq!(dev.ask("POST", "/dev/session", "localhost", r#"{"agent_id":"other"}"#).0, 400);
    let bearer = format!("localhost\r\nAuthorization: Bearer {key}");
    let (status, body) = dev.ask("POST", "/api/v1/sessions/s/messages", &bearer, r#""hello""#);
    assert_eq!((status, body.as_str()), (200, r#"{"receivers":0}"#));
    assert_eq!(dev.ask("GET", "/api/v1/info", &bearer, "").0, 403, "the key is for sessions");
}

#[test]
fn only_pages_of_this_machine_get_a_token() {
    let dev = Dev::start();
    let (status, body) = dev.ask("POST", "/dev/session", &dev.address, "");
    assert_eq!(status, 201);
    let session: serde_json::Value = serde_json::from_str(&body).unwrap();
    assert!(session["agent_id"] == "demo" && session["token"].as_str().unwrap().len() > 40);
    for path in ["/", "/dev/page.js", "/dev/page.css", "/dev/rooms", "/dev/rooms.js"] {
        assert_eq!(dev.ask("GET", path, "localhost", "").0, 200, "{path}");
        assert_eq!(dev.ask("GET", path, "evil.example", "").0, 403, "{path}");
    }
    assert_eq!(dev.ask("POST", "/dev/session", "evil.example", "").0, 403);
    // A foreign page whose host name points here gets no token either.
    let paths = ["/health", "/ready", "/metrics", "/api/v1/openapi.json", "/demo/ws/s", "/nothing"];
    for path in paths {
        let (status, body) = dev.ask("GET", path, "evil.example", "");
        assert!(status == 403 && body.contains("host_not_allowed"), "{path}: {status} {body}");
    }
    for (path, status) in [("/health", 200), ("/metrics", 200), ("/demo/ws/s", 426)] {
        for host in ["localhost", "127.0.0.1:1", "[::1]", &dev.address] {
            assert_eq!(dev.ask("GET", path, host, "").0, status, "{path} {host}");
        }
    }
    assert_eq!(dev.ask("POST", "/dev/session", "localhost", r#"{"session_id":"a b"}"#).0, 400);
    assert_eq!(dev.ask("POST", "/dev/session", "localhost", "{").0, 400);
    assert_eq!(dev.ask("GET", "/dev/session", "localhost", "").0, 405);
    assert_eq!(dev.ask("GET", "/favicon.ico", "localhost", "").0, 204);
    let cut = dev.ask("POST", "/dev/cut", "localhost", r#"{"session_id":"s-absent"}"#);
    assert_eq!(cut, (200, r#"{"cut":0}"#.to_owned()));
    assert_eq!(dev.ask("POST", "/dev/cut", "localhost", "").0, 400);
}

#[test]
fn a_visitor_of_rooms_names_itself_on_this_machine() {
    let dev = Dev::start();
    let (status, body) = dev.ask("POST", "/dev/rooms/member", "localhost", r#"{"user_id":"ann"}"#);
    let member: serde_json::Value = serde_json::from_str(&body).unwrap();
    assert!(status == 201 && member["user_id"] == "ann" && member["token"].is_null(), "{body}");
    for body in ["", "{}", r#"{"user_id":"a b"}"#] {
        assert_eq!(dev.ask("POST", "/dev/rooms/member", "localhost", body).0, 400, "{body}");
    }
    let absent = r#"{"room_id":"lobby","client_id":"c"}"#;
    let cut = dev.ask("POST", "/dev/rooms/cut", "localhost", absent);
    assert_eq!(cut, (200, r#"{"cut":0}"#.to_owned()));
    assert_eq!(dev.ask("POST", "/dev/rooms/cut", "localhost", "").0, 400);
    for path in ["/dev/rooms/member", "/dev/rooms/cut"] {
        assert_eq!(dev.ask("POST", path, "evil.example", absent).0, 403, "{path}");
    }
    assert_eq!(dev.ask("GET", "/ws/lobby?user_id=ann", "localhost", "").0, 426);
}

const DEADLINE: Duration = Duration::from_secs(20);
