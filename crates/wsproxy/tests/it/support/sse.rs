//! A client of server-sent events that sees every byte: chunks, compression, blocks.

use std::{io::Write, net::SocketAddr};

use flate2::write::GzDecoder;
use serde_json::Value;

use super::{gateway::TestInstance, http::Response, raw::Raw};

/// An open event stream.
pub struct Events {
    /// Its connection.
    pub raw: Raw,
    /// The head of the answer.
    pub head: Response,
    /// Bytes of the body on the wire, without the framing of chunks.
    pub body_bytes: usize,
    wire: Vec<u8>,
    text: Vec<u8>,
    gzip: Option<Gzip>,
    over: bool,
}

/// An inflater that gives back nothing until a sync marker has come, as Go's does.
struct Gzip {
    decoder: GzDecoder<Vec<u8>>,
    /// The last bytes that came.
    tail: Vec<u8>,
}

/// One event.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Event {
    /// `id:`
    pub id: Option<String>,
    /// `event:`; empty for an ordinary one.
    pub kind: String,
    /// All lines of `data:`; `None` where there is none.
    pub data: Option<String>,
}

impl Events {
    /// Asks for events; a refusal is its answer.
    pub async fn open(
        address: SocketAddr,
        path: &str,
        headers: &[(&str, &str)],
    ) -> Result<Self, Response> {
        Self::open_on(Raw::connect(address).await, path, headers).await
    }

    /// The same on a connection.
    pub async fn open_on(
        mut raw: Raw,
        path: &str,
        headers: &[(&str, &str)],
    ) -> Result<Self, Response> {
        let mut head =
            format!("GET {path} HTTP/1.1\r\nHost: test\r\nAccept: text/event-stream\r\n");
        for (name, value) in headers {
            head += &format!("{name}: {value}\r\n");
        }
        raw.write(format!("{head}\r\n").as_bytes()).await;
        let head = raw.response().await;
        if head.status != 200 {
            return Err(head);
        }
        assert_eq!(head.header("content-type"), "text/event-stream");
        assert_eq!(head.header("cache-control"), "no-store, no-transform");
        assert_eq!(head.header("x-accel-buffering"), "no");
        assert_eq!(head.header("transfer-encoding"), "chunked");
        let gzip = (head.header("content-encoding") == "gzip").then(Gzip::new);
        let (wire, text) = (Vec::new(), Vec::new());
        Ok(Self { raw, head, body_bytes: 0, wire, text, gzip, over: false })
    }

    /// A client of a session, with a fresh token and these headers.
    pub async fn session(instance: &TestInstance, session: &str, headers: &[(&str, &str)]) -> Self {
        let token = instance.token(session).await;
        let path = format!("/agent/ws/{session}?token={token}");
        Self::open(instance.address(), &path, headers).await.expect("the token is right")
    }

    /// The next line.
    pub async fn line(&mut self) -> String {
        loop {
            if let Some(end) = self.text.iter().position(|byte| *byte == b'\n') {
                let line = self.text.drain(..=end).take(end).collect();
                return String::from_utf8(line).unwrap();
            }
            assert!(!self.over, "the stream ended");
            self.read().await;
        }
    }

    /// The milliseconds that the stream is told to wait before it comes back: its first line.
    pub async fn retry(&mut self) -> u64 {
        let line = self.line().await;
        let retry = line.strip_prefix("retry: ").unwrap_or_else(|| panic!("{line:?}"));
        retry.parse().unwrap()
    }

    /// The next block, without the empty line that ends it; `None` at the proper end of the body.
    pub async fn block(&mut self) -> Option<String> {
        loop {
            if let Some(end) = self.text.windows(2).position(|two| two == b"\n\n") {
                let block = self.text.drain(..end + 2).take(end).collect();
                return Some(String::from_utf8(block).unwrap());
            }
            if self.over {
                assert!(self.text.is_empty(), "half an event");
                return None;
            }
            self.read().await;
        }
    }

    /// The next event, comments and `retry:` passed over.
    pub async fn event(&mut self) -> Option<Event> {
        loop {
            let block = self.block().await?;
            let (mut event, mut lines) = (Event::default(), Vec::new());
            for line in block.lines() {
                match line.split_once(": ") {
                    Some(("id", id)) => event.id = Some(id.into()),
                    Some(("event", kind)) => event.kind = kind.into(),
                    Some(("data", data)) => lines.push(data),
                    Some(("retry", _)) | None => {}
                    Some(other) => panic!("{other:?}"),
                }
            }
            event.data = (!lines.is_empty()).then(|| lines.join("\n"));
            if event != Event::default() {
                return Some(event);
            }
        }
    }

    /// The data of the next event that is no position; it must be an ordinary one.
    pub async fn data(&mut self) -> String {
        loop {
            let event = self.event().await.expect("the stream goes on");
            if event.kind == "position" {
                continue;
            }
            assert_eq!(event.kind, "");
            return event.data.expect("an event has data");
        }
    }

    /// The same, as JSON.
    pub async fn json(&mut self) -> Value {
        serde_json::from_str(&self.data().await).unwrap()
    }

    /// Code and reason of the next event, which must be the last one, and the end of the body behind it.
    pub async fn closed(&mut self) -> (u16, String) {
        let event = self.event().await.expect("a close event");
        assert_eq!(event.kind, "close", "{event:?}");
        let data: Value = serde_json::from_str(&event.data.unwrap()).unwrap();
        assert_eq!(self.block().await, None);
        self.raw.end().await;
        let code = data["code"].as_u64().unwrap().try_into().unwrap();
        (code, data["reason"].as_str().unwrap().to_owned())
    }

    /// Unpacks what came; reads once where that has brought nothing.
    async fn read(&mut self) {
        let before = self.text.len();
        self.wire.extend(self.raw.take());
        while let Some((chunk, used)) = chunk(&self.wire) {
            self.wire.drain(..used);
            self.over = chunk.is_empty();
            self.body_bytes += chunk.len();
            match &mut self.gzip {
                None => self.text.extend(chunk),
                Some(gzip) => gzip.read(&chunk, &mut self.text, self.over),
            }
            if self.over {
                return;
            }
        }
        if self.text.len() == before {
            let count = self.raw.read().await;
            assert!(count > 0, "cut off: {:?}", String::from_utf8_lossy(&self.text));
        }
    }
}

impl Gzip {
    fn new() -> Self {
        Self { decoder: GzDecoder::new(Vec::new()), tail: Vec::new() }
    }

    /// Adds to `text` what can be read. At the end checksum and length must be right.
    fn read(&mut self, chunk: &[u8], text: &mut Vec<u8>, is_over: bool) {
        self.decoder.write_all(chunk).unwrap();
        self.decoder.flush().unwrap();
        self.tail.extend_from_slice(chunk);
        self.tail.drain(..self.tail.len().saturating_sub(4));
        if is_over {
            self.decoder.try_finish().unwrap();
        }
        if is_over || self.tail == [0, 0, 0xff, 0xff] {
            text.append(self.decoder.get_mut());
        }
    }
}

/// A whole chunk, and its length on the wire.
fn chunk(wire: &[u8]) -> Option<(Vec<u8>, usize)> {
    let line = wire.windows(2).position(|two| two == b"\r\n")?;
    let length = usize::from_str_radix(std::str::from_utf8(&wire[..line]).unwrap(), 16).unwrap();
    let used = line + 2 + length + 2;
    let chunk = wire.get(line + 2..used)?;
    assert!(chunk.ends_with(b"\r\n"));
    Some((chunk[..length].to_vec(), used))
}
