//! An upgraded connection: raw bytes in both directions until both have ended, over a lane or another instance. Knows no
//! protocol behind the upgrade.

use std::{io, sync::Arc, time::Duration};

use bytes::{Bytes, BytesMut};
use hyper::upgrade::{OnUpgrade, Upgraded};
use hyper_rustls::MaybeHttpsStream;
use hyper_util::rt::TokioIo;
use socket2::SockRef;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, ReadHalf, WriteHalf},
    net::TcpStream,
};
use tracing::debug;
use uuid::Uuid;
use wsproxy_conn::{
    Socket,
    lane::{Received, StreamReader, StreamWriter},
    socket::watch::{Leaving, PeerWatch},
};

use super::{Client, ends};
use crate::{
    endpoint::tunnel::{access::Access, lanes::Place, refusal::Code},
    http::handshake::websocket,
};

/// Way to the upstream.
pub(in crate::endpoint::tunnel) enum Way {
    /// A stream of a lane: dropping its ends resets it.
    Lane(StreamWriter, StreamReader, Arc<Place>),
    /// A connection to another instance, once the library for HTTP frees it.
    Peer(OnUpgrade),
}

/// Connection to another instance.
type Peer = TokioIo<PeerStream>;

/// The same as the library for HTTP knows it.
type PeerStream = MaybeHttpsStream<TokioIo<TcpStream>>;

/// End of the way that takes the client's bytes.
enum Up {
    Lane(StreamWriter),
    Peer(WriteHalf<Peer>),
}

/// End of the way that brings the upstream's bytes.
enum Down {
    /// With the place of the stream.
    Lane { answer: StreamReader, _place: Arc<Place> },
    /// With bytes that were read and not passed on.
    Peer(ReadHalf<Peer>, BytesMut),
}

/// Passes bytes on once the client's connection is free, until both directions have ended or one has failed.
pub(in crate::endpoint::tunnel) async fn run(client: Client, way: Way, access: Arc<Access>) {
    let Client { on_upgrade, seat, .. } = client;
    let (socket, ends) =
        tokio::join!(websocket::take_socket(on_upgrade, Uuid::now_v7()), ends_of(way));
    let (Some((socket, early)), Some((mut up, mut down))) = (socket, ends) else { return };
    let watch = socket.watch_peer().ok();
    let left = async {
        match &watch {
            Some(watch) => watch.left(Leaving::Fails).await,
            None => std::future::pending().await,
        }
    };
    let (mut reader, mut writer) = tokio::io::split(socket);
    let both = async {
        let sent = pass_up(&mut reader, BytesMut::from(&early[..]), &mut up, &access);
        tokio::try_join!(sent, pass_down(&mut down, &mut writer, &access)).map(|_| ())
    };
    let result = tokio::select! {
        result = both => result,
        () = left => Err(io::ErrorKind::ConnectionReset.into()),
    };
    match result {
        Ok(()) => access.complete(),
        Err(error) => {
            // No side may take a part for the whole, nor a failure for an end.
            let _ = watch.as_ref().map(PeerWatch::reset_at_end);
            reset(up, down);
            debug!(%error, "An upgraded connection broke.");
        }
    }
    drop(seat);
}

/// Returns both ends of a way; `None`: it broke.
async fn ends_of(way: Way) -> Option<(Up, Down)> {
    match way {
        Way::Lane(request, answer, place) => {
            Some((Up::Lane(request), Down::Lane { answer, _place: place }))
        }
        Way::Peer(on_upgrade) => {
            let parts = Upgraded::downcast::<PeerStream>(on_upgrade.await.ok()?).ok()?;
            let (reader, writer) = tokio::io::split(TokioIo::new(parts.io));
            Some((Up::Peer(writer), Down::Peer(reader, BytesMut::from(&parts.read_buf[..]))))
        }
    }
}

/// Ends a way that has not ended well.
fn reset(up: Up, down: Down) {
    if let (Up::Peer(writer), Down::Peer(reader, _)) = (up, down) {
        let peer = reader.unsplit(writer).into_inner();
        let stream = match &peer {
            MaybeHttpsStream::Http(stream) => stream.inner(),
            MaybeHttpsStream::Https(stream) => stream.inner().get_ref().0.inner().inner(),
        };
        let _ = SockRef::from(stream).set_linger(Some(Duration::ZERO));
    }
}

/// Passes the client's bytes on. The end of its direction ends that of the way.
async fn pass_up(
    reader: &mut ReadHalf<Socket>,
    mut buffer: BytesMut,
    up: &mut Up,
    access: &Access,
) -> io::Result<()> {
    loop {
        if !buffer.is_empty() {
            let piece = buffer.split().freeze();
            access.received(piece.len());
            if !up.write(piece).await? {
                return Ok(());
            }
        }
        buffer.reserve(READ_BYTES);
        let read = tokio::select! {
            read = reader.read_buf(&mut buffer) => read?,
            () = up.gone() => return Ok(()),
        };
        if read == 0 {
            return up.finish().await;
        }
    }
}

/// Passes the upstream's bytes on. A clean end ends the client's direction; a failure resets the connection.
async fn pass_down(
    down: &mut Down,
    writer: &mut WriteHalf<Socket>,
    access: &Access,
) -> io::Result<()> {
    while let Some(bytes) = down.next(access).await? {
        writer.write_all(&bytes).await?;
        writer.flush().await?;
        access.sent(bytes.len());
    }
    writer.shutdown().await
}

impl Up {
    /// Puts a piece in. Returns whether the upstream takes more; its own direction goes on where it does not, or has failed.
    async fn write(&mut self, piece: Bytes) -> io::Result<bool> {
        match self {
            Self::Lane(request) => Ok(request.write(piece).await.is_ok()),
            Self::Peer(writer) => {
                writer.write_all(&piece).await?;
                // TLS may hold a part of it.
                writer.flush().await.map(|()| true)
            }
        }
    }

    /// Waits until the upstream takes no more. Of another instance, only the other direction tells.
    async fn gone(&mut self) {
        match self {
            Self::Lane(request) => drop(request.gone().await),
            Self::Peer(_) => std::future::pending().await,
        }
    }

    async fn finish(&mut self) -> io::Result<()> {
        match self {
            Self::Lane(request) => {
                let _ = request.finish();
                Ok(())
            }
            Self::Peer(writer) => writer.shutdown().await,
        }
    }
}

impl Down {
    /// Returns the next bytes; `None`: the end. A failure is noted.
    async fn next(&mut self, access: &Access) -> io::Result<Option<Bytes>> {
        match self {
            Self::Lane { answer, .. } => match answer.read().await {
                Ok(Received::Data(bytes)) => Ok(Some(bytes)),
                Ok(Received::Trailers(_) | Received::End) => Ok(None),
                Err(end) => {
                    access.failed(ends::refusal(&end, false).code);
                    Err(io::Error::other(format!("{end:?}")))
                }
            },
            Self::Peer(reader, buffer) => {
                if buffer.is_empty() {
                    buffer.reserve(READ_BYTES);
                    let read = reader.read_buf(buffer).await;
                    read.inspect_err(|_| access.failed(Code::LaneLost))?;
                }
                Ok((!buffer.is_empty()).then(|| buffer.split().freeze()))
            }
        }
    }
}

/// Bytes of each direction that wait in this process.
const READ_BYTES: usize = 16 << 10;
