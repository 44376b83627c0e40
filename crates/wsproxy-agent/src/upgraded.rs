//! Upgraded connection: raw bytes in both directions between the lane and the upstream. Knows no protocol in them.

use std::time::Duration;

use bytes::{Bytes, BytesMut};
use hyper::upgrade::{Parts, Upgraded};
use hyper_util::rt::TokioIo;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, ReadHalf, WriteHalf},
    time::timeout,
};
use wsproxy_conn::lane::{Received, StreamReader, StreamWriter};
use wsproxy_proto::tunnel::{code::Code, event::End};

use crate::{access::Record, failure::Failure, upstream::wire::Wire};

/// Carries bytes until both directions have ended. The end of one direction is passed on, and the other one goes on.
///
/// # Errors
/// [`Failure::Gone`]: the client or the lane. [`Code::UpstreamReset`]: the upstream's connection broke.
pub(crate) async fn carry(
    upgraded: Upgraded,
    mut up: StreamReader,
    down: &mut StreamWriter,
    record: &Record,
) -> Result<(), Failure> {
    let parts = upgraded.downcast::<TokioIo<Wire>>();
    let parts = parts.map_err(|_| reset("the upgraded connection is not that of the upstream"))?;
    let Parts { io, read_buf, .. } = parts;
    let (reader, writer) = tokio::io::split(io.into_inner());
    let sending = send(&mut up, writer, record);
    let receiving = receive(read_buf, reader, down, record);
    tokio::pin!(sending, receiving);
    tokio::select! {
        sent = &mut sending => {
            sent?;
            receiving.await
        }
        received = &mut receiving => {
            received?;
            // The client has ended its direction, and the upstream has yet to take the last bytes.
            timeout(LAST_BYTES_TIMEOUT, sending).await.unwrap_or(Err(Failure::Gone))
        }
    }
}

async fn send(
    up: &mut StreamReader,
    mut writer: WriteHalf<Wire>,
    record: &Record,
) -> Result<(), Failure> {
    loop {
        match up.read().await {
            Ok(Received::Data(bytes)) => {
                record.add_up(bytes.len());
                writer.write_all(&bytes).await.map_err(|_| broken())?;
                writer.flush().await.map_err(|_| broken())?;
            }
            Ok(Received::End | Received::Trailers(_)) => {
                return writer.shutdown().await.map_err(|_| broken());
            }
            Err(_) => return Err(Failure::Gone),
        }
    }
}

async fn receive(
    early: Bytes,
    mut reader: ReadHalf<Wire>,
    down: &mut StreamWriter,
    record: &Record,
) -> Result<(), Failure> {
    let mut piece = early;
    let mut buffer = BytesMut::new();
    loop {
        if !piece.is_empty() {
            record.add_down(piece.len());
            down.write(std::mem::take(&mut piece)).await.map_err(|_| Failure::Gone)?;
        }
        buffer.reserve(PIECE_BYTES);
        let count = tokio::select! {
            biased;
            _ = down.gone() => return Err(Failure::Gone),
            count = reader.read_buf(&mut buffer) => count.map_err(|_| broken())?,
        };
        if count == 0 {
            down.finish().map_err(|_| Failure::Gone)?;
            // A client that leaves while it sends is noticed here.
            return match down.ended().await {
                End::Complete => Ok(()),
                _ => Err(Failure::Gone),
            };
        }
        piece = buffer.split().freeze();
    }
}

fn broken() -> Failure {
    reset("the upstream's connection broke")
}

fn reset(message: &str) -> Failure {
    Failure::new(Code::UpstreamReset, message)
}

/// Upper bound of one read from the upstream: one frame of the lane.
const PIECE_BYTES: usize = 16 << 10;

/// Time for the upstream to take what the client sent last.
const LAST_BYTES_TIMEOUT: Duration = Duration::from_secs(60);
