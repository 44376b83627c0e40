//! Requests over a connection of their own, and answers as they are on the wire.

use std::{collections::HashMap, net::SocketAddr};

use super::{
    gateway::{API_KEY, TestInstance},
    raw::{Raw, UPGRADE},
};

/// An answer.
#[derive(Debug, Clone)]
pub struct Response {
    /// The status.
    pub status: u16,
    /// The headers, names in lower case; of repeated ones the last.
    pub headers: HashMap<String, String>,
    /// The body.
    pub body: String,
}

impl Response {
    /// The first response in `bytes`, once it is complete, and its length. One without
    /// `Content-Length` has no body.
    pub fn parse(bytes: &[u8]) -> Option<(Self, usize)> {
        let head = bytes.windows(4).position(|window| window == b"\r\n\r\n")? + 4;
        let text = std::str::from_utf8(&bytes[..head]).unwrap();
        let mut lines = text.trim_end().split("\r\n");
        let status = lines.next().unwrap().split(' ').nth(1).unwrap().parse().unwrap();
        let headers: HashMap<_, _> = lines
            .map(|line| line.split_once(':').unwrap())
            .map(|(name, value)| (name.to_ascii_lowercase(), value.trim().to_owned()))
            .collect();
        let length = headers.get("content-length").map_or(0, |length| length.parse().unwrap());
        let body = bytes.get(head..head + length)?;
        let body = String::from_utf8(body.to_vec()).unwrap();
        Some((Self { status, headers, body }, head + length))
    }

    /// A header; empty where it is not there.
    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", String::as_str)
    }

    /// The body as JSON.
    #[track_caller]
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    /// Asserts that it is a refusal in the shape of the contract: status and `error.code`.
    #[track_caller]
    pub fn assert_refused(&self, status: u16, code: &str) {
        assert_eq!(self.status, status, "{self:?}");
        assert_eq!(self.header("content-type"), "application/json");
        let body = self.json();
        assert_eq!(body["error"]["code"], code);
        assert!(body["error"]["message"].as_str().unwrap().len() > 5);
        let retryable = body["error"]["retryable"].as_bool().unwrap();
        let may_pass = matches!(status, 429 | 503 | 504);
        assert_eq!(may_pass, self.header("retry-after").parse::<u32>().is_ok_and(|s| s >= 1));
        // What may have been done must not be sent again, and what was certainly not done may be.
        let in_doubt = matches!(code, "bus_unavailable" | "deadline");
        assert!(retryable == may_pass || (in_doubt && !retryable) || code == "not_done");
        assert_eq!(status == 401, self.header("www-authenticate").starts_with("Bearer"));
        assert_eq!(status == 426, self.header("sec-websocket-version") == "13");
        assert_eq!(status == 405, self.headers.contains_key("allow"));
    }
}

/// A stream of server-sent events.
pub struct Stream {
    /// Its connection.
    pub raw: Raw,
    /// All that came so far.
    pub seen: String,
}

impl Stream {
    /// Follows a path with the key of the tests.
    pub async fn open(instance: &TestInstance, path: &str) -> Self {
        let mut raw = Raw::connect(instance.admin_address()).await;
        let head = format!("GET {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {API_KEY}\r\n");
        raw.write(format!("{head}\r\n").as_bytes()).await;
        let response = raw.response().await;
        assert_eq!(response.status, 200, "{response:?}");
        assert_eq!(response.header("content-type"), "text/event-stream");
        assert_eq!(response.header("cache-control"), "no-store, no-transform");
        assert_eq!(response.header("x-accel-buffering"), "no");
        Self { raw, seen: String::new() }
    }

    /// Waits until an event has come.
    pub async fn expect(&mut self, event: &str) {
        loop {
            self.seen = String::from_utf8_lossy(self.raw.rest()).into_owned();
            if self.seen.contains(event) {
                return;
            }
            assert!(self.raw.read().await > 0, "{event:?} did not come: {:?}", self.seen);
        }
    }
}

/// Sends a request and reads the answer.
pub async fn request(
    address: SocketAddr,
    method: &str,
    path: &str,
    headers: &[(&str, &str)],
    body: &[u8],
) -> Response {
    let mut raw = Raw::connect(address).await;
    let mut head = format!("{method} {path} HTTP/1.1\r\nHost: test\r\n");
    for (name, value) in headers {
        head += &format!("{name}: {value}\r\n");
    }
    head += &format!("Content-Length: {}\r\n\r\n", body.len());
    raw.write(&[head.as_bytes(), body].concat()).await;
    raw.response().await
}

/// Asks for an upgrade that is refused, and reads the answer.
pub async fn handshake(address: SocketAddr, path: &str, headers: &[(&str, &str)]) -> Response {
    let mut raw = Raw::connect(address).await;
    let mut head = format!("GET {path} HTTP/1.1\r\n{UPGRADE}");
    for (name, value) in headers {
        head += &format!("{name}: {value}\r\n");
    }
    raw.write(format!("{head}\r\n").as_bytes()).await;
    raw.response().await
}

/// The value of a series in the text of `/metrics`; 0 where it is not there.
pub fn metric(text: &str, series: &str) -> f64 {
    let value = text.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
    value.map_or(0.0, |value| value.parse().unwrap())
}
