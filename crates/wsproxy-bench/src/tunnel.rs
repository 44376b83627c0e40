//! The parts around a tunnel for HTTP: the service behind it, plain proxies to compare with, a slow link, a client.

pub mod client;
pub mod marks;
pub mod proxy;
pub mod relay;
pub mod upstream;

use std::net::SocketAddr;

use anyhow::{Context, Result};
use socket2::SockRef;
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
        narrow(&socket, bytes)?;
    }
    if let Some(bytes) = buffers.send {
        socket.set_send_buffer_size(bytes)?;
    }
    socket.bind(at).with_context(|| format!("cannot listen at {at}"))?;
    Ok(socket.listen(BACKLOG)?)
}

/// Bounds the bytes that wait in the kernel to be read, with segments as small as those of a real line: one of the
/// loopback's, 64 KiB, would fill such a buffer alone, and both ends would wait for each other's timers.
fn narrow(socket: &TcpSocket, receive_bytes: u32) -> Result<()> {
    socket.set_recv_buffer_size(receive_bytes)?;
    SockRef::from(socket).set_tcp_mss(SEGMENT_BYTES)?;
    Ok(())
}

/// Sizes of the kernel's buffers of each connection, in bytes; the kernel's own choice where there is none.
#[derive(Debug, Clone, Copy, Default)]
struct Buffers {
    receive: Option<u32>,
    send: Option<u32>,
}

const BACKLOG: u32 = 4096;
const SEGMENT_BYTES: u32 = 1448;
