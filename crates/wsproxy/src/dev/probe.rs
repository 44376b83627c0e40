//! A client that proves with one message that the gateway works: connects, sends, receives, closes.

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use anyhow::{Context, bail, ensure};
use http::{HeaderValue, header};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};
use wsproxy_proto::ws::{
    client::{ClientRequest, Response, read_response},
    frame::{Opcode, client_frame, close_payload, decode_header},
};

/// Sends `ping` to the session's worker and returns the time until its `pong`.
pub(super) async fn round_trip(
    address: SocketAddr,
    path: &str,
    token: &str,
) -> anyhow::Result<Duration> {
    let mut stream = TcpStream::connect(address).await.context("cannot connect")?;
    stream.set_nodelay(true)?;
    let host = HeaderValue::from_str(&address.to_string())?;
    let bearer = HeaderValue::from_str(&format!("Bearer {token}"))?;
    let request = ClientRequest::new(host, path.parse()?, rand::random())
        .header(header::AUTHORIZATION, bearer);
    stream.write_all(&request.build()).await?;
    let mut received = Vec::new();
    let head = loop {
        match read_response(&received, &request)? {
            Response::Incomplete => read(&mut stream, &mut received).await?,
            Response::Refused { status, .. } => bail!("the handshake was answered with {status}"),
            Response::Accepted { consumed, .. } => break consumed,
        }
    };
    received.drain(..head);

    let asked = Instant::now();
    send(&mut stream, Opcode::Text, br#"{"type":"ping"}"#).await?;
    let answer = message(&mut stream, &mut received).await?;
    let took = asked.elapsed();
    let parsed: serde_json::Value = serde_json::from_slice(&answer).unwrap_or_default();
    ensure!(parsed["type"] == "pong", "the answer is {}", String::from_utf8_lossy(&answer));
    send(&mut stream, Opcode::Close, close_payload(1000, "").as_ref()).await?;
    // The gateway answers the close frame and ends the connection.
    while stream.read_buf(&mut received).await? > 0 {
        ensure!(received.len() <= BYTES_MAX, "the gateway does not stop sending");
    }
    Ok(took)
}

async fn send(stream: &mut TcpStream, opcode: Opcode, payload: &[u8]) -> anyhow::Result<()> {
    let frame = client_frame(opcode, payload, false, rand::random());
    Ok(stream.write_all(&frame).await?)
}

/// Reads the next frame, which is a whole message: the messages here are too short for fragments.
async fn message(stream: &mut TcpStream, received: &mut Vec<u8>) -> anyhow::Result<Vec<u8>> {
    loop {
        if let Some((header, at)) =
            decode_header(received).map_err(|why| anyhow::anyhow!(why.reason))?
        {
            let end = at + usize::try_from(header.payload_len)?;
            if received.len() >= end {
                ensure!(header.opcode == Opcode::Text, "a {:?} frame came", header.opcode);
                let frame: Vec<u8> = received.drain(..end).collect();
                return Ok(frame[at..].to_vec());
            }
        }
        read(stream, received).await?;
    }
}

async fn read(stream: &mut TcpStream, received: &mut Vec<u8>) -> anyhow::Result<()> {
    ensure!(received.len() < BYTES_MAX, "the answer is too long");
    if stream.read_buf(received).await? == 0 {
        bail!("the gateway closed the connection");
    }
    Ok(())
}

/// Longest answer to the handshake, and longest message.
const BYTES_MAX: usize = 16 * 1024;
