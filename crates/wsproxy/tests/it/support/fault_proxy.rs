//! A TCP proxy that is slow, deaf or rude on demand.

use std::{
    net::{Shutdown, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicU16, Ordering},
    },
    time::Duration,
};

use socket2::SockRef;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{
        TcpListener, TcpStream,
        tcp::{ReadHalf, WriteHalf},
    },
    sync::watch,
};
use tokio_util::task::AbortOnDropHandle;

/// Forwards connections to a target; dropping it cuts them all.
pub struct FaultProxy {
    address: SocketAddr,
    state: watch::Sender<State>,
    target: Arc<AtomicU16>,
    _accepting: AbortOnDropHandle<()>,
}

/// Faults of the network. [`Faults::default`] is a network without faults.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Faults {
    /// Every piece is late by so much.
    pub delay: Duration,
    /// Pieces are no larger than this; 0: as they come.
    pub piece_bytes: usize,
    /// Nothing goes from the client to the target; connections stay open.
    pub stall_up: bool,
    /// Nothing goes from the target to the client; connections stay open.
    pub stall_down: bool,
    /// New connections are accepted and closed at once.
    pub refuse: bool,
}

#[derive(Clone, Copy, Default)]
struct State {
    faults: Faults,
    /// Connections made before this number was raised are ended as `cut` says.
    generation: u64,
    cut: Cut,
}

/// End of all connections.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Cut {
    /// With a RST.
    #[default]
    Reset,
    /// The client reads the end; what it writes still arrives.
    HalfClose,
}

impl FaultProxy {
    /// A proxy on a free port in front of a local one.
    pub async fn start(target_port: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (state, watched) = watch::channel(State::default());
        let target = Arc::new(AtomicU16::new(target_port));
        let target_port = target.clone();
        let accepting = async move {
            let mut connections = tokio::task::JoinSet::new();
            while let Ok((client, _)) = listener.accept().await {
                if watched.borrow().faults.refuse {
                    continue;
                }
                let target = ([127, 0, 0, 1], target_port.load(Ordering::Relaxed)).into();
                connections.spawn(forward(client, target, watched.clone()));
                while connections.try_join_next().is_some() {}
            }
        };
        let accepting = AbortOnDropHandle::new(tokio::task::spawn(accepting));
        Self { address, state, target, _accepting: accepting }
    }

    /// The port that clients connect to.
    pub fn port(&self) -> u16 {
        self.address.port()
    }

    /// Sends connections that are made from now on to another local port.
    pub fn retarget(&self, port: u16) {
        self.target.store(port, Ordering::Relaxed);
    }

    /// Changes what is wrong, for open connections too.
    pub fn set(&self, faults: Faults) {
        self.state.send_modify(|now| now.faults = faults);
    }

    /// Ends every open connection.
    pub fn cut(&self, cut: Cut) {
        self.state.send_modify(|now| {
            now.cut = cut;
            now.generation += 1;
        });
    }
}

async fn forward(mut client: TcpStream, target: SocketAddr, state: watch::Receiver<State>) {
    let Ok(mut target) = TcpStream::connect(target).await else { return };
    client.set_nodelay(true).unwrap();
    target.set_nodelay(true).unwrap();
    let mut watched = state.clone();
    let born = watched.borrow_and_update().generation;
    let cut = {
        let (client_reads, client_writes) = client.split();
        let (target_reads, target_writes) = target.split();
        let up = pump(client_reads, target_writes, state.clone(), true);
        let down = pump(target_reads, client_writes, state.clone(), false);
        tokio::select! {
            _ = async { tokio::join!(up, down) } => return,
            now = watched.wait_for(|state| state.generation > born) => {
                let Ok(now) = now else { return };
                now.cut
            }
        }
    };
    match cut {
        Cut::Reset => SockRef::from(&client).set_linger(Some(Duration::ZERO)).unwrap(),
        Cut::HalfClose => {
            let _ = SockRef::from(&client).shutdown(Shutdown::Write);
            pump(client.split().0, target.split().1, state, true).await;
        }
    }
}

/// Copies one direction until its end, which it passes on.
async fn pump(
    mut from: ReadHalf<'_>,
    mut to: WriteHalf<'_>,
    mut state: watch::Receiver<State>,
    upward: bool,
) {
    let mut buffer = vec![0; 64 * 1024];
    loop {
        let now = state.borrow_and_update().faults;
        if if upward { now.stall_up } else { now.stall_down } {
            match state.changed().await {
                Ok(()) => continue,
                Err(_) => return,
            }
        }
        let piece = if now.piece_bytes == 0 { buffer.len() } else { now.piece_bytes };
        let read = tokio::select! {
            read = from.read(&mut buffer[..piece]) => read,
            changed = state.changed() => match changed {
                Ok(()) => continue,
                Err(_) => return,
            },
        };
        let Ok(read @ 1..) = read else { break };
        if !now.delay.is_zero() {
            tokio::time::sleep(now.delay).await;
        }
        if to.write_all(&buffer[..read]).await.is_err() {
            break;
        }
    }
    let _ = to.shutdown().await;
}
