//! A client of HTTP/1.1 that costs little: bodies are counted and not kept.

use std::net::SocketAddr;

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};

/// The way to the service.
#[derive(Debug, Clone, Args)]
pub struct Site {
    /// Address of the server in front of the service.
    #[arg(long)]
    pub server: SocketAddr,
    /// Path in front of the service's own, such as `/clusters/c1/proxy`.
    #[arg(long, default_value = "")]
    pub prefix: String,
    /// Token for the server.
    #[arg(long)]
    pub token: Option<String>,
}

/// One connection. Invariant: it keeps at most a head, and what came behind that.
#[derive(Debug)]
pub(crate) struct Connection {
    stream: TcpStream,
    input: Vec<u8>,
}

/// The head of an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Head {
    pub(crate) status: u16,
    /// Bytes of the body; `None` for chunks and for bodies that end with the connection.
    pub(crate) length: Option<u64>,
    /// The gateway's reason for a refusal.
    pub(crate) reason: Option<String>,
    /// Set where the connection ends behind this answer.
    pub(crate) closes: bool,
}

impl Site {
    /// Returns the same service without the server in front.
    pub(crate) fn direct(upstream: SocketAddr) -> Self {
        Self { server: upstream, prefix: String::new(), token: None }
    }

    /// Connects.
    pub(crate) async fn connect(&self) -> Result<Connection> {
        let stream = TcpStream::connect(self.server).await?;
        stream.set_nodelay(true)?;
        Ok(Connection { stream, input: Vec::new() })
    }

    /// Connects with a receive buffer that is soon full.
    pub(crate) async fn connect_narrow(&self) -> Result<Connection> {
        let socket = TcpSocket::new_v4()?;
        socket.set_recv_buffer_size(NARROW_BYTES)?;
        let stream = socket.connect(self.server).await?;
        Ok(Connection { stream, input: Vec::new() })
    }

    /// Writes the head of a request as text; `body_bytes` where there is a body.
    pub(crate) fn request(&self, method: &str, path: &str, body_bytes: Option<u64>) -> String {
        let Self { server, prefix, token } = self;
        let mut head = format!("{method} {prefix}{path} HTTP/1.1\r\nHost: {server}\r\n");
        if let Some(token) = token {
            head += &format!("Authorization: Bearer {token}\r\n");
        }
        if let Some(bytes) = body_bytes {
            head += &format!("Content-Length: {bytes}\r\n");
        }
        head + "\r\n"
    }
}

impl Connection {
    /// Sends a GET and reads the whole answer, which has to say its length.
    pub(crate) async fn get(&mut self, request: &str) -> Result<Head> {
        self.send(request.as_bytes()).await?;
        let head = self.head().await?;
        self.skip(head.length.context("an answer without a length")?).await?;
        Ok(head)
    }

    /// Sends a GET and returns the body of the answer, which has to say its length.
    pub(crate) async fn text(&mut self, request: &str) -> Result<String> {
        self.send(request.as_bytes()).await?;
        let head = self.head().await?;
        ensure!(head.status == 200, "the answer is {}", head.status);
        let length = head.length.context("an answer without a length")? as usize;
        while self.input.len() < length {
            self.fill().await?;
        }
        let rest = self.input.split_off(length);
        Ok(String::from_utf8(std::mem::replace(&mut self.input, rest))?)
    }

    /// Sends bytes.
    pub(crate) async fn send(&mut self, bytes: &[u8]) -> Result<()> {
        Ok(self.stream.write_all(bytes).await?)
    }

    /// Reads the head of an answer.
    pub(crate) async fn head(&mut self) -> Result<Head> {
        loop {
            if let Some(at) = self.input.windows(4).position(|window| window == b"\r\n\r\n") {
                let head = Head::parse(&self.input[..at])?;
                self.input.drain(..at + 4);
                return Ok(head);
            }
            ensure!(self.input.len() < HEAD_BYTES_MAX, "a head without an end");
            self.fill().await?;
        }
    }

    async fn fill(&mut self) -> Result<()> {
        self.input.reserve(SMALL_READ_BYTES);
        if self.stream.read_buf(&mut self.input).await? == 0 {
            bail!("the connection ended");
        }
        Ok(())
    }

    /// Reads this many bytes of a body.
    pub(crate) async fn skip(&mut self, bytes: u64) -> Result<()> {
        let kept = bytes.min(self.input.len() as u64);
        self.input.drain(..kept as usize);
        let mut left = bytes - kept;
        if left == 0 {
            return Ok(());
        }
        let mut scratch = vec![0; READ_BYTES.min(left as usize)];
        while left > 0 {
            let most = scratch.len().min(left as usize);
            let read = self.stream.read(&mut scratch[..most]).await?;
            ensure!(read > 0, "the body ended {left} bytes early");
            left -= read as u64;
        }
        Ok(())
    }

    /// Reads what there is of a body without end, at most as much as `scratch` holds; returns the number of bytes.
    pub(crate) async fn some(&mut self, scratch: &mut [u8]) -> Result<usize> {
        if !self.input.is_empty() {
            return Ok(std::mem::take(&mut self.input).len());
        }
        let read = self.stream.read(scratch).await?;
        ensure!(read > 0, "the connection ended");
        Ok(read)
    }
}

impl Head {
    fn parse(bytes: &[u8]) -> Result<Self> {
        let text = str::from_utf8(bytes).context("a head that is no text")?;
        let mut lines = text.split("\r\n");
        let status = lines.next().and_then(|line| line.split(' ').nth(1)?.parse().ok());
        let mut head = Self {
            status: status.context("no status")?,
            length: None,
            reason: None,
            closes: false,
        };
        for line in lines {
            let Some((name, value)) = line.split_once(':') else { continue };
            let value = value.trim();
            match name.to_ascii_lowercase().as_str() {
                "content-length" => head.length = Some(value.parse().context("a length")?),
                "x-wsproxy-error" => head.reason = Some(value.to_owned()),
                "connection" => head.closes = value.eq_ignore_ascii_case("close"),
                _ => {}
            }
        }
        Ok(head)
    }
}

const NARROW_BYTES: u32 = 8 * 1024;
const SMALL_READ_BYTES: usize = 2 * 1024;
pub(crate) const READ_BYTES: usize = 128 * 1024;
const HEAD_BYTES_MAX: usize = 64 * 1024;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heads_tell_status_length_and_reason() {
        let text = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 12\r\nX-Wsproxy-Error: overloaded\r\n\
                     Connection: close";
        let head = Head::parse(text).unwrap();
        assert_eq!((head.status, head.length, head.closes), (503, Some(12), true));
        assert_eq!(head.reason.as_deref(), Some("overloaded"));
        assert!(Head::parse(b"HTTP/1.1").is_err());
        assert_eq!(Head::parse(b"HTTP/1.1 200 OK").unwrap().length, None);
    }
}
