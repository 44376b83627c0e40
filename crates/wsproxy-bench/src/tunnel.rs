//! The parts around a tunnel for HTTP: the service behind it, plain proxies to compare with, a slow link, a client.

pub mod client;
pub mod marks;
pub mod proxy;
pub mod relay;
pub mod upstream;

use std::net::SocketAddr;

use anyhow::{Context, Result};
use tokio::net::{TcpListener, TcpSocket};

/// Listens with a long backlog, since hundreds of clients connect at once.
///
/// # Errors
/// The address cannot be bound.
fn listen(at: SocketAddr, buffers: Buffers) -> Result<TcpListener> {
    let socket = TcpSocket::new_v4()?;
    socket.set_reuseaddr(true)?;
    // Before the connections are there: they inherit them.
    if let Some(bytes) = buffers.receive {
        socket.set_recv_buffer_size(bytes)?;
    }
    if let Some(bytes) = buffers.send {
        socket.set_send_buffer_size(bytes)?;
    }
    socket.bind(at).with_context(|| format!("cannot listen at {at}"))?;
    Ok(socket.listen(BACKLOG)?)
}

/// Sizes of the kernel's buffers of each connection, in bytes; the kernel's own choice where there is none.
#[derive(Debug, Clone, Copy, Default)]
struct Buffers {
    receive: Option<u32>,
    send: Option<u32>,
}

const BACKLOG: u32 = 4096;
