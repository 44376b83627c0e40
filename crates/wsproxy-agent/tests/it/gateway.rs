//! Imitation of a gateway: a listener that does the handshake, and then the gateway's side of a lane.

use std::{sync::Arc, time::Duration};

use http::HeaderMap;
use rustls::ServerConfig;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpListener,
    task::JoinHandle,
};
use wsproxy_conn::{
    Socket,
    lane::{self, LaneEnd, LaneHandle, LaneSettings},
    socket::tls::TlsSocket,
};
use wsproxy_proto::{
    tunnel::memory::{Memory, MemoryLimits},
    ws::handshake::read_upgrade,
};

use crate::support::{listen, within};

/// Listener of a gateway.
pub(crate) struct Gateway {
    listener: TcpListener,
    tls: Option<Arc<ServerConfig>>,
    pub(crate) port: u16,
}

/// Handshake that waits for its answer.
pub(crate) struct Handshake {
    socket: Socket,
    pub(crate) request_line: String,
    pub(crate) headers: HeaderMap,
}

/// Gateway's side of a lane.
pub(crate) struct GatewayLane {
    pub(crate) handle: LaneHandle,
    pub(crate) task: JoinHandle<LaneEnd>,
}

impl Gateway {
    pub(crate) async fn new() -> Self {
        let listener = listen().await;
        let port = listener.local_addr().unwrap().port();
        Self { listener, tls: None, port }
    }

    pub(crate) async fn with_tls(tls: Arc<ServerConfig>) -> Self {
        Self { tls: Some(tls), ..Self::new().await }
    }

    /// Waits for the next handshake.
    pub(crate) async fn handshake(&self) -> Handshake {
        let (socket, _) = within(self.listener.accept()).await.unwrap();
        let mut socket: Socket = match self.tls.clone() {
            Some(tls) => within(TlsSocket::server(socket, tls)).await.unwrap().into(),
            None => socket.into(),
        };
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(within(socket.read_u8()).await.unwrap());
        }
        let head = String::from_utf8(head).unwrap();
        let mut lines = head.lines();
        let request_line = lines.next().unwrap().to_owned();
        let headers = lines.filter_map(|line| line.split_once(": "));
        let headers =
            headers.map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap())).collect();
        Handshake { socket, request_line, headers }
    }

    /// Accepts the next lane, and waits until it is ready.
    pub(crate) async fn lane(&self) -> GatewayLane {
        self.handshake().await.accept(LaneSettings::default()).await
    }
}

impl Handshake {
    pub(crate) async fn accept(mut self, settings: LaneSettings) -> GatewayLane {
        let upgrade = read_upgrade(&http::Method::GET, http::Version::HTTP_11, &self.headers);
        let accept = upgrade.unwrap().accept;
        let answer = format!(
            "HTTP/1.1 101 x\r\nUpgrade: websocket\r\nConnection: upgrade\r\n\
             Sec-WebSocket-Protocol: wsproxy.tunnel.v1\r\nSec-WebSocket-Accept: {accept}\r\n\r\n"
        );
        self.socket.write_all(answer.as_bytes()).await.unwrap();
        let memory: Arc<Memory> = Memory::new(MemoryLimits::default());
        let (driver, handle) = lane::gateway(self.socket, &[], settings, memory).unwrap();
        let task = tokio::spawn(driver);
        within(handle.ready()).await.unwrap();
        GatewayLane { handle, task }
    }

    /// Refuses the lane, with further lines of the head.
    pub(crate) async fn refuse(mut self, status: u16, lines: &str) {
        let answer = format!("HTTP/1.1 {status} x\r\nContent-Length: 0\r\n{lines}\r\n");
        self.socket.write_all(answer.as_bytes()).await.unwrap();
        let _ = tokio::time::timeout(Duration::from_secs(1), self.socket.read_u8()).await;
    }
}
