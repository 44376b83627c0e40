//! Behaviour that only TCP has: resets, and options of the socket.

use std::{
    sync::{Arc, atomic::Ordering::SeqCst},
    time::Duration,
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpSocket, TcpStream},
    task::JoinHandle,
    time::timeout,
};
use uuid::Uuid;
use wsproxy_conn::{Driver, Link, Socket, clock, link::Queued};
use wsproxy_proto::{
    disconnect::Disconnect,
    ws::frame::{Opcode, client_frame},
};

use crate::support::{PATIENCE, Process, Recorder, Seen, close_code, frames, profile, text, until};

struct Tcp {
    link: Arc<Link>,
    seen: Arc<Seen>,
    peer: TcpStream,
    task: JoinHandle<()>,
}

/// Opens a driven connection over loopback with small buffers.
async fn connect(process: &Process) -> Tcp {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(8192).unwrap();
    let peer = socket.connect(listener.local_addr().unwrap()).await.unwrap();
    let (accepted, _) = listener.accept().await.unwrap();
    socket2::SockRef::from(&accepted).set_send_buffer_size(8192).unwrap();
    let socket = Socket::from(accepted);
    socket.prepare(Duration::from_secs(90)).unwrap();
    let Socket::Tcp(stream) = &socket else { panic!("not TCP") };
    assert!(stream.nodelay().unwrap());
    let (profile, runtime) = (Arc::new(profile()), Arc::clone(&process.runtime));
    let link = Link::new(Uuid::new_v4(), None, profile, runtime, clock::now());
    let seen = Arc::<Seen>::default();
    let recorder = Recorder(Arc::clone(&seen));
    let task = tokio::spawn(Driver::new(Arc::clone(&link), socket, None, recorder, &[]));
    Tcp { link, seen, peer, task }
}

async fn read_to_end(peer: &mut TcpStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    let read = timeout(PATIENCE, peer.read_to_end(&mut bytes)).await;
    read.expect("the stream does not end").expect("the stream is reset");
    bytes
}

#[tokio::test]
async fn a_close_frame_is_not_overtaken_by_a_reset() {
    for violation in [true, false] {
        let mut tcp = connect(&Process::new()).await;
        if violation {
            tcp.peer.write_all(&[0x83, 0x80, 0, 0, 0, 0]).await.unwrap();
        } else {
            tcp.link.disconnect(&Disconnect::BACKEND, clock::now());
        }
        let late = client_frame(Opcode::Binary, &[1; 10_000], false, [0; 4]);
        for _ in 0..100 {
            tcp.peer.write_all(&late).await.unwrap();
        }
        tcp.peer.write_all(&client_frame(Opcode::Close, &[], false, [0; 4])).await.unwrap();
        if violation {
            tcp.peer.shutdown().await.unwrap();
        }
        let (heard, rest) = frames(&read_to_end(&mut tcp.peer).await);
        assert_eq!((heard.len(), rest), (1, 0));
        assert_eq!(close_code(&heard[0]), if violation { 1002 } else { 4004 });
        timeout(PATIENCE, tcp.task).await.expect("the connection does not end").unwrap();
        assert!(tcp.seen.messages.lock().is_empty());
    }
}

#[tokio::test]
async fn reset_ends_a_blocked_connection() {
    let process = Process::new();
    let tcp = connect(&process).await;
    while tcp.link.queued_bytes() < 200_000 {
        assert_ne!(tcp.link.push(text(&"x".repeat(5000)), clock::now()), Queued::Ending);
        tcp.link.flush(clock::now());
    }
    assert!(process.runtime.budget.used() >= 200_000);
    // Unread bytes make the kernel answer with a reset.
    drop(tcp.peer);
    until("it ends", || tcp.task.is_finished()).await;
    assert_eq!(tcp.seen.end().unwrap(), ("gone", 1006, false));
    assert_eq!(process.runtime.budget.used(), 0);
}

#[tokio::test]
async fn client_that_reads_again_gets_all_in_order() {
    let mut tcp = connect(&Process::new()).await;
    for i in 0..500 {
        let message = format!("{i} {}", "x".repeat(i * 7));
        assert_ne!(tcp.link.push(text(&message), clock::now()), Queued::Ending);
        if i % 3 == 0 {
            tcp.link.flush(clock::now());
        }
    }
    tcp.link.finish(&Disconnect::RESTART, clock::now());
    let mut bytes = Vec::new();
    while frames(&bytes).0.len() < 501 {
        assert!(timeout(PATIENCE, tcp.peer.read_buf(&mut bytes)).await.unwrap().unwrap() > 0);
    }
    let (heard, _) = frames(&bytes);
    for (i, (_, payload)) in heard[..500].iter().enumerate() {
        assert!(payload.starts_with(format!("{i} ").as_bytes()));
    }
    assert_eq!(close_code(&heard[500]), 1012);
    tcp.peer.write_all(&client_frame(Opcode::Close, &[], false, [0; 4])).await.unwrap();
    assert!(read_to_end(&mut tcp.peer).await.is_empty());
    assert_eq!(tcp.link.profile().stats.messages_sent.load(SeqCst), 500);
}
