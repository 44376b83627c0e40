//! Upstream that a test writes by hand: every byte of its answers.

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};

use crate::support::{listen, within};

/// Listener of an upstream.
pub(crate) struct Upstream {
    pub(crate) listener: TcpListener,
    pub(crate) port: u16,
}

/// Connection of the agent to its upstream.
pub(crate) struct Request {
    pub(crate) socket: TcpStream,
}

impl Upstream {
    pub(crate) async fn new() -> Self {
        let listener = listen().await;
        let port = listener.local_addr().unwrap().port();
        Self { listener, port }
    }

    /// Waits for the next connection.
    pub(crate) async fn accept(&self) -> Request {
        let (socket, _) = within(self.listener.accept()).await.unwrap();
        Request { socket }
    }

    /// Waits for the next connection, and reads the head of its first request.
    pub(crate) async fn request(&self) -> (String, Request) {
        let mut request = self.accept().await;
        (request.head().await, request)
    }
}

impl Request {
    /// Reads the head of the next request, in lower case.
    pub(crate) async fn head(&mut self) -> String {
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(within(self.socket.read_u8()).await.unwrap());
        }
        String::from_utf8(head).unwrap().to_lowercase()
    }

    pub(crate) async fn expect(&mut self, text: &str) {
        let mut bytes = vec![0; text.len()];
        within(self.socket.read_exact(&mut bytes)).await.unwrap();
        assert_eq!(String::from_utf8(bytes).unwrap(), text);
    }

    pub(crate) async fn write(&mut self, text: &str) {
        self.socket.write_all(text.as_bytes()).await.unwrap();
    }

    /// Waits until the agent closed the connection, and drops bytes before that.
    pub(crate) async fn is_closed(&mut self) {
        let mut buffer = [0; 4096];
        while let Ok(1..) = within(self.socket.read(&mut buffer)).await {}
    }

    /// Drops the connection with a reset of TCP.
    pub(crate) fn reset(self) {
        socket2::SockRef::from(&self.socket).set_linger(Some(std::time::Duration::ZERO)).unwrap();
    }
}
