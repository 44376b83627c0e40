//! An upgraded connection: raw bytes in both directions until both have ended. Knows no protocol behind the upgrade.

use std::{io, sync::Arc};

use bytes::BytesMut;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, ReadHalf, WriteHalf};
use tracing::debug;
use uuid::Uuid;
use wsproxy_conn::{
    Socket,
    lane::{Received, StreamReader, StreamWriter},
    socket::watch::{Leaving, PeerWatch},
};

use super::Client;
use crate::{
    endpoint::tunnel::{access::Access, lanes::Place},
    http::handshake::websocket,
};

/// Passes bytes on once the client's connection is free, until both directions have ended or one has failed.
pub(super) async fn run(
    client: Client,
    request: StreamWriter,
    answer: StreamReader,
    place: Arc<Place>,
    access: Arc<Access>,
) {
    let Client { on_upgrade, seat, .. } = client;
    // Dropping the stream's ends resets it.
    let Some((socket, early)) = websocket::take_socket(on_upgrade, Uuid::now_v7()).await else {
        return;
    };
    let watch = socket.watch_peer().ok();
    let left = async {
        match &watch {
            Some(watch) => watch.left(Leaving::Fails).await,
            None => std::future::pending().await,
        }
    };
    let (reader, writer) = tokio::io::split(socket);
    let both = async {
        let up = up(reader, BytesMut::from(&early[..]), request, &access);
        tokio::try_join!(up, down(answer, writer, &access))
    };
    let result = tokio::select! {
        result = both => result.map(|((), writer)| Some(writer)),
        () = left => Ok(None),
    };
    match result {
        Ok(writer) => {
            if writer.is_some() {
                access.complete();
            }
            drop(writer);
        }
        Err(error) => {
            // No peer may take a part for the whole.
            let _ = watch.as_ref().map(PeerWatch::reset_at_end);
            debug!(%error, cluster = %place.lane.name.cluster, "An upgraded connection broke.");
        }
    }
    drop((seat, place));
}

/// Passes the client's bytes on. The end of its direction ends that of the stream.
async fn up(
    mut reader: ReadHalf<Socket>,
    mut buffer: BytesMut,
    mut request: StreamWriter,
    access: &Access,
) -> io::Result<()> {
    loop {
        if !buffer.is_empty() {
            let piece = buffer.split().freeze();
            access.received(piece.len());
            if request.write(piece).await.is_err() {
                // The upstream takes no more; its own direction goes on, or has failed.
                return Ok(());
            }
        }
        buffer.reserve(READ_BYTES);
        let read = tokio::select! {
            read = reader.read_buf(&mut buffer) => read?,
            _ = request.gone() => return Ok(()),
        };
        if read == 0 {
            let _ = request.finish();
            return Ok(());
        }
    }
}

/// Passes the upstream's bytes on. A clean end ends the client's direction; a failure resets the connection.
async fn down(
    mut answer: StreamReader,
    mut writer: WriteHalf<Socket>,
    access: &Access,
) -> io::Result<WriteHalf<Socket>> {
    loop {
        match answer.read().await {
            Ok(Received::Data(bytes)) => {
                writer.write_all(&bytes).await?;
                access.sent(bytes.len());
            }
            Ok(Received::Trailers(_) | Received::End) => {
                writer.shutdown().await?;
                return Ok(writer);
            }
            Err(end) => return Err(io::Error::other(format!("{end:?}"))),
        }
    }
}

const READ_BYTES: usize = 16 << 10;
