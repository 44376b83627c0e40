//! An upgraded connection through another instance: raw bytes in both directions until both have ended. Knows no protocol
//! behind the upgrade.

use std::{sync::Arc, time::Duration};

use hyper::upgrade::{OnUpgrade, Upgraded};
use hyper_rustls::MaybeHttpsStream;
use hyper_util::rt::TokioIo;
use socket2::SockRef;
use tokio::{
    io::{AsyncWriteExt as _, copy_bidirectional_with_sizes},
    net::TcpStream,
};
use tracing::debug;
use uuid::Uuid;

use crate::{
    endpoint::tunnel::{access::Access, exchange::Client, refusal::Code},
    http::handshake::websocket,
};

/// Passes bytes on once both connections are free, until both directions have ended or one has failed.
pub(super) async fn run(client: Client, on_upgrade: OnUpgrade, access: Arc<Access>) {
    let Client { on_upgrade: of_client, seat, .. } = client;
    let (socket, peer) =
        tokio::join!(websocket::take_socket(of_client, Uuid::now_v7()), on_upgrade,);
    let (Some((mut socket, early)), Ok(peer)) = (socket, peer) else { return };
    let Some((mut peer, answered)) = parts(peer) else { return };
    let watch = socket.watch_peer().ok();
    let both = async {
        peer.write_all(&early).await?;
        socket.write_all(&answered).await?;
        copy_bidirectional_with_sizes(&mut socket, &mut peer, COPIED_BYTES, COPIED_BYTES).await
    };
    let passed = both.await;
    if let Ok((up, down)) = &passed {
        access.received(*up as usize + early.len());
        access.sent(*down as usize + answered.len());
        access.complete();
    }
    if let Err(error) = passed {
        access.failed(Code::LaneLost);
        // No side may take a part for the whole, nor a failure for an end.
        let _ = watch.as_ref().map(|watch| watch.reset_at_end());
        if let Some(stream) = tcp(peer.inner()) {
            let _ = SockRef::from(stream).set_linger(Some(Duration::ZERO));
        }
        debug!(%error, "An upgraded connection through another instance broke.");
    }
    drop(seat);
}

/// Takes the connection out of the HTTP library, with the bytes that it has read.
fn parts(peer: Upgraded) -> Option<(TokioIo<Peer>, bytes::Bytes)> {
    let parts = peer.downcast::<Peer>().ok()?;
    Some((TokioIo::new(parts.io), parts.read_buf))
}

/// Connection to another instance.
type Peer = MaybeHttpsStream<TokioIo<TcpStream>>;

fn tcp(peer: &Peer) -> Option<&TcpStream> {
    Some(match peer {
        MaybeHttpsStream::Http(stream) => stream.inner(),
        MaybeHttpsStream::Https(stream) => stream.inner().get_ref().0.inner().inner(),
    })
}

/// Bytes of each direction that wait in this process.
const COPIED_BYTES: usize = 16 << 10;
