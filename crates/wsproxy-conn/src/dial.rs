//! Dials a WebSocket server: TCP, TLS where it is asked for, and the opening handshake, within a time. Knows no URLs
//! and no retries.

use std::{future::poll_fn, io, sync::Arc, time::Duration};

use http::{HeaderMap, StatusCode};
use rustls::{ClientConfig, pki_types::ServerName};
use tokio::{net::TcpStream, time::timeout};
use wsproxy_proto::ws::{
    client::{ClientRequest, Response, ResponseError, read_response},
    deflate::Params,
};

use crate::socket::{Socket, tls::TlsSocket};

/// A server to dial.
#[derive(Debug, Clone)]
pub struct Server {
    /// Name or address. The server's certificate must be for it.
    pub host: String,
    /// TCP port.
    pub port: u16,
    /// Configuration of TLS, with the trusted certificates. `None`: the connection is not encrypted.
    pub tls: Option<Arc<ClientConfig>>,
    /// Time within which the connection must be open.
    pub timeout: Duration,
    /// See [`Socket::prepare`].
    pub unacknowledged_max: Duration,
}

/// A WebSocket connection that is open, for a link and a driver of the client role.
#[derive(Debug)]
pub struct Dialled {
    /// The socket.
    pub socket: Socket,
    /// The parameters of compression, where the server took the offer.
    pub deflate: Option<Params>,
    /// The subprotocol that the server chose.
    pub subprotocol: Option<String>,
    /// Bytes that came behind the server's answer.
    pub leftover: Vec<u8>,
}

/// Reason why a connection was not opened.
#[derive(Debug, thiserror::Error)]
pub enum DialError {
    /// It was not open in time.
    #[error("the connection was not open in time")]
    TimedOut,
    /// No TCP connection, or a socket that failed.
    #[error("{0}")]
    Socket(#[from] io::Error),
    /// The host is no name for which there can be a certificate.
    #[error("the host is no name for TLS")]
    BadHost,
    /// The server's certificate, or its TLS, is not accepted.
    #[error("TLS: {0}")]
    Tls(io::Error),
    /// The server refused the handshake.
    #[error("the server answered {status}")]
    Refused {
        /// Status of the server's answer.
        status: StatusCode,
        /// Headers of the server's answer.
        headers: Box<HeaderMap>,
    },
    /// The server's answer cannot be trusted.
    #[error(transparent)]
    Answer(#[from] ResponseError),
}

impl Server {
    /// Opens a connection. Whatever is open is closed where the future is dropped.
    ///
    /// # Errors
    /// See [`DialError`].
    pub async fn dial(&self, request: &ClientRequest) -> Result<Dialled, DialError> {
        let open = async {
            let socket = self.connect().await?;
            socket.prepare(self.unacknowledged_max)?;
            handshake(socket, request).await
        };
        timeout(self.timeout, open).await.unwrap_or(Err(DialError::TimedOut))
    }

    async fn connect(&self) -> Result<Socket, DialError> {
        let Some(config) = &self.tls else {
            return Ok(TcpStream::connect((&*self.host, self.port)).await?.into());
        };
        let name = ServerName::try_from(self.host.clone()).map_err(|_| DialError::BadHost)?;
        let stream = TcpStream::connect((&*self.host, self.port)).await?;
        let encrypted = TlsSocket::client(stream, Arc::clone(config), name).await;
        Ok(encrypted.map_err(DialError::Tls)?.into())
    }
}

/// Opens a connection over a socket that there is. Set a deadline.
///
/// # Errors
/// See [`DialError`].
pub async fn handshake(socket: Socket, request: &ClientRequest) -> Result<Dialled, DialError> {
    write_all(&socket, &request.build()).await?;
    let mut head = Vec::new();
    loop {
        read_more(&socket, &mut head).await?;
        match read_response(&head, request)? {
            Response::Incomplete => {}
            Response::Accepted { deflate, subprotocol, consumed } => {
                let leftover = head.split_off(consumed);
                return Ok(Dialled { socket, deflate, subprotocol, leftover });
            }
            Response::Refused { status, headers, .. } => {
                return Err(DialError::Refused { status, headers: Box::new(headers) });
            }
        }
    }
}

async fn write_all(socket: &Socket, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        poll_fn(|cx| socket.poll_write_ready(cx)).await?;
        match socket.try_write(bytes) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(count) => bytes = &bytes[count..],
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

async fn read_more(socket: &Socket, head: &mut Vec<u8>) -> io::Result<()> {
    let mut buffer = [0; 4096];
    loop {
        poll_fn(|cx| socket.poll_read_ready(cx)).await?;
        match socket.try_read(&mut buffer) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => {
                head.extend_from_slice(&buffer[..count]);
                return Ok(());
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
}
