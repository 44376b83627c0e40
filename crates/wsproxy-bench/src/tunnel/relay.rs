//! A link: passes the bytes of TCP connections on with a delay and at a rate, and can be away for a while.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use clap::Args;
use parking_lot::Mutex;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep, sleep_until};

use super::Buffers;

/// Options of the link.
#[derive(Debug, Args)]
pub struct Relay {
    /// Address to listen at.
    #[arg(long)]
    listen: SocketAddr,
    /// Address that each connection is passed on to.
    #[arg(long)]
    to: SocketAddr,
    /// Address that takes commands, one a line: `away MS` ends all connections and admits none for that long.
    #[arg(long)]
    control: Option<SocketAddr>,
    /// Milliseconds from one end to the other; a round trip takes twice that.
    #[arg(long, default_value_t = 0)]
    delay_ms: u64,
    /// Bytes per second in each direction, of all connections together; 0: no limit.
    #[arg(long, default_value_t = 0)]
    rate: u64,
}

/// One direction of the link, shared by its connections.
#[derive(Debug)]
struct Way {
    delay: Duration,
    rate: u64,
    /// The time until which the bytes that it has taken occupy it.
    busy_until: Mutex<Instant>,
}

/// Passes bytes on until it is killed.
///
/// # Errors
/// An address cannot be bound.
pub fn serve(options: &Relay) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        // A link of a low rate would hide in megabytes of the kernel.
        let receive_bytes = (options.rate > 0 && options.delay_ms == 0).then_some(RECEIVE_BYTES);
        let listener =
            super::listen(options.listen, Buffers { receive: receive_bytes, send: None })?;
        let (away, is_away) = watch::channel(false);
        if let Some(control) = options.control {
            let listener = super::listen(control, Buffers::default())?;
            tokio::spawn(obey(listener, away));
        }
        let way = || {
            let delay = Duration::from_millis(options.delay_ms);
            Arc::new(Way { delay, rate: options.rate, busy_until: Mutex::new(Instant::now()) })
        };
        let (there, back) = (way(), way());
        loop {
            let (near, _) = listener.accept().await?;
            if *is_away.borrow() {
                // An end without bytes, as from a balancer whose servers are gone.
                drop(near);
                continue;
            }
            let (to, there, back) = (options.to, there.clone(), back.clone());
            let mut is_away = is_away.clone();
            let cut = async move { is_away.wait_for(|away| *away).await.is_ok() };
            tokio::spawn(async move {
                tokio::select! {
                    // Either side that fails ends both.
                    _ = connect(near, to, receive_bytes, there, back) => {}
                    _ = cut => {}
                }
            });
        }
    })
}

async fn obey(listener: TcpListener, away: watch::Sender<bool>) {
    while let Ok((stream, _)) = listener.accept().await {
        let (reader, mut writer) = stream.into_split();
        let mut lines = BufReader::new(reader).lines();
        while let Ok(Some(line)) = lines.next_line().await {
            let Some(pause) = line.strip_prefix("away ").and_then(|text| text.parse().ok()) else {
                continue;
            };
            away.send_replace(true);
            // The answer says that the pause has begun.
            if writer.write_all(b"away\n").await.is_err() {
                break;
            }
            sleep(Duration::from_millis(pause)).await;
            away.send_replace(false);
        }
    }
}

async fn connect(
    near: TcpStream,
    to: SocketAddr,
    receive_bytes: Option<u32>,
    there: Arc<Way>,
    back: Arc<Way>,
) -> Result<()> {
    let socket = tokio::net::TcpSocket::new_v4()?;
    if let Some(bytes) = receive_bytes {
        super::narrow(&socket, bytes)?;
    }
    let far = socket.connect(to).await?;
    near.set_nodelay(true)?;
    far.set_nodelay(true)?;
    let (near_reader, near_writer) = near.into_split();
    let (far_reader, far_writer) = far.into_split();
    tokio::try_join!(there.pass(near_reader, far_writer), back.pass(far_reader, near_writer))?;
    Ok(())
}

impl Way {
    /// Passes the bytes of one connection on, and its end.
    async fn pass(&self, mut reader: OwnedReadHalf, mut writer: OwnedWriteHalf) -> Result<()> {
        // With a delay, as much is on its way as the rate brings meanwhile; the bound of the queue is that, in chunks.
        let on_its_way = self.rate as f64 * self.delay.as_secs_f64() / CHUNK_BYTES as f64;
        let (sender, mut due) = mpsc::channel::<(Instant, Vec<u8>)>(on_its_way as usize * 2 + 4);
        let reading = async {
            loop {
                let mut chunk = Vec::with_capacity(CHUNK_BYTES);
                if reader.read_buf(&mut chunk).await? == 0 {
                    // The writer ends once it has passed on what is due.
                    drop(sender);
                    return anyhow::Ok(());
                }
                let sent = self.occupy(chunk.len());
                // Sleeps are in whole milliseconds: a link that is little ahead goes on.
                if sent > Instant::now() + SLACK {
                    sleep_until(sent).await;
                }
                if sender.send((sent + self.delay, chunk)).await.is_err() {
                    return Ok(());
                }
            }
        };
        let writing = async {
            while let Some((at, chunk)) = due.recv().await {
                if at > Instant::now() {
                    sleep_until(at).await;
                }
                writer.write_all(&chunk).await?;
            }
            writer.shutdown().await?;
            anyhow::Ok(())
        };
        tokio::try_join!(reading, writing)?;
        Ok(())
    }

    /// Takes the time that these bytes need; returns when the last of them has left.
    fn occupy(&self, bytes: usize) -> Instant {
        let now = Instant::now();
        if self.rate == 0 {
            return now;
        }
        let mut busy_until = self.busy_until.lock();
        let needed = Duration::from_secs_f64(bytes as f64 / self.rate as f64);
        // A link that woke up late makes up for it: else the sleeps of a busy machine would lower its rate.
        let earliest = now.checked_sub(LATE).unwrap_or(now);
        *busy_until = earliest.max(*busy_until) + needed;
        *busy_until
    }
}

/// The link's own buffer, with the double of [`RECEIVE_BYTES`] that the kernel makes of it.
const CHUNK_BYTES: usize = 8 * 1024;
const RECEIVE_BYTES: u32 = 64 * 1024;
const SLACK: Duration = Duration::from_millis(2);
/// Time that a link which was idle or woke up late may make up for.
const LATE: Duration = Duration::from_millis(4);
