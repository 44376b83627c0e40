//! A restart beside the new process: two processes on one port, or one unix socket that is taken over.

use std::{
    io,
    net::SocketAddr,
    path::PathBuf,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::Duration,
};

use rustix::process::Signal;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::{TcpStream, UnixStream},
    task::JoinSet,
    time::{MissedTickBehavior, interval},
};

use crate::support::{binary::Binary, eventually, raw::UPGRADE, soon};

/// The place of both processes.
#[derive(Clone)]
enum Place {
    Port(SocketAddr),
    Unix(PathBuf),
}

impl Place {
    /// Opens a WebSocket. The error says how the gateway refused.
    async fn come(&self) -> Result<(), String> {
        let opened = match self {
            Self::Port(address) => open(TcpStream::connect(address).await).await,
            Self::Unix(path) => open(UnixStream::connect(path).await).await,
        };
        opened.map_err(|error| error.to_string()).and_then(|status| match status.as_str() {
            "101" => Ok(()),
            status => Err(status.to_owned()),
        })
    }
}

async fn open(socket: io::Result<impl AsyncRead + AsyncWrite + Unpin>) -> io::Result<String> {
    let mut socket = socket?;
    let request = format!("GET /echo HTTP/1.1\r\n{UPGRADE}\r\n");
    socket.write_all(request.as_bytes()).await?;
    let mut head = [0; 12];
    socket.read_exact(&mut head).await?;
    Ok(String::from_utf8_lossy(&head[9..]).into_owned())
}

/// Clients that come at a rate, whatever became of those before them.
struct Crowd {
    answers: Arc<Mutex<Vec<Result<(), String>>>>,
    over: Arc<AtomicBool>,
    task: tokio::task::JoinHandle<()>,
}

impl Crowd {
    fn come_to(place: Place) -> Self {
        let (answers, over) = (Arc::new(Mutex::new(Vec::new())), Arc::new(AtomicBool::new(false)));
        let (told, is_over) = (Arc::clone(&answers), Arc::clone(&over));
        let task = tokio::spawn(async move {
            let mut ticks = interval(Duration::from_secs(1) / PER_SECOND);
            ticks.set_missed_tick_behavior(MissedTickBehavior::Burst);
            let mut clients = JoinSet::new();
            while !is_over.load(Relaxed) {
                ticks.tick().await;
                let (place, told) = (place.clone(), Arc::clone(&told));
                clients.spawn(async move {
                    let answer = place.come().await;
                    told.lock().unwrap().push(answer);
                });
            }
            clients.join_all().await;
        });
        Self { answers, over, task }
    }

    fn count(&self) -> usize {
        self.answers.lock().unwrap().len()
    }

    /// Waits until this many more clients have come.
    async fn more(&self, count: usize) {
        let wanted = self.count() + count;
        eventually("more clients came", || self.count() >= wanted).await;
    }

    /// Ends it; the refusals.
    async fn refusals(self) -> Vec<String> {
        self.over.store(true, Relaxed);
        soon("the last client", self.task).await.unwrap();
        self.answers.lock().unwrap().iter().filter_map(|answer| answer.clone().err()).collect()
    }
}

async fn start(place: Option<&Place>) -> Binary {
    let (port, unix, bind) = match place {
        None => ("0".to_owned(), String::new(), "127.0.0.1"),
        Some(Place::Port(address)) => (address.port().to_string(), String::new(), "127.0.0.1"),
        Some(Place::Unix(path)) => (String::new(), path.to_str().unwrap().to_owned(), ""),
    };
    let environment = [
        ("PORT", port.as_str()),
        ("WSPROXY_SERVER__BIND", bind),
        ("WSPROXY_SERVER__UNIX", &unix),
        ("WSPROXY_SERVER__REUSE_PORT", "true"),
        ("WSPROXY_SERVER__DRAIN_DELAY", ""),
        ("WSPROXY_ENDPOINTS__ECHO", "true"),
        ("LOG_LEVEL", "info"),
    ];
    if unix.is_empty() {
        Binary::start(&environment).await
    } else {
        Binary::start_on_socket(&environment).await
    }
}

async fn restart(mut old: Binary, place: &Place, restarts: usize) {
    let crowd = Crowd::come_to(place.clone());
    for _ in 0..restarts {
        crowd.more(50).await;
        let new = start(Some(place)).await;
        crowd.more(50).await;
        old.signal(Signal::TERM);
        assert!(old.exited().await.success());
        old = new;
    }
    crowd.more(50).await;
    let count = crowd.count();
    let refusals = crowd.refusals().await;
    assert!(refusals.is_empty(), "{} of {count} refused: {refusals:?}", refusals.len());
}

#[tokio::test]
async fn a_restart_on_a_shared_port_refuses_no_client() {
    let old = start(None).await;
    let place = Place::Port(old.address);
    restart(old, &place, 1).await;
}

#[tokio::test]
async fn a_restart_on_a_unix_socket_refuses_no_client() {
    let folder = tempfile::tempdir().unwrap();
    let place = Place::Unix(folder.path().join("wsproxy.sock"));
    let old = start(Some(&place)).await;
    restart(old, &place, 1).await;
}

#[tokio::test]
#[ignore = "takes a minute: run it after a change of the listener"]
async fn many_restarts_on_a_shared_port_refuse_no_client() {
    let old = start(None).await;
    let place = Place::Port(old.address);
    restart(old, &place, 40).await;
}

/// New connections per second.
const PER_SECOND: u32 = 200;
