//! Connections that we dial, in plain and over TLS, to a server of another library.

use std::{
    future::pending,
    sync::{Arc, atomic::Ordering::SeqCst},
    time::Duration,
};

use futures_util::{SinkExt, StreamExt};
use rcgen::{CertifiedKey, generate_simple_self_signed};
use rustls::{
    ClientConfig, RootCertStore, ServerConfig,
    crypto::{CryptoProvider, aws_lc_rs},
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    task::JoinHandle,
    time::timeout,
};
use tokio_rustls::TlsAcceptor;
use tokio_tungstenite::{WebSocketStream, accept_async, tungstenite::Message};
use uuid::Uuid;
use wsproxy_conn::{
    Driver, Link, Profile, Socket, clock,
    dial::{DialError, Dialled, Server, handshake},
    link::Queued,
    socket::tls::TlsSocket,
};
use wsproxy_proto::{
    disconnect::Disconnect,
    ws::{
        client::ClientRequest,
        frame::{Kind, Role},
        handshake::read_upgrade,
    },
};

use crate::support::{PATIENCE, Process, Recorder, Seen, profile, settle, until};

/// Configurations of a server, and of a client that trusts its certificate, which is for `name`.
fn tls_for(name: &str) -> (Arc<ServerConfig>, Arc<ClientConfig>) {
    tls_with(name, aws_lc_rs::default_provider())
}

/// Configurations as of [`tls_for`], with the client's cryptography.
pub(crate) fn tls_with(
    name: &str,
    client: CryptoProvider,
) -> (Arc<ServerConfig>, Arc<ClientConfig>) {
    let CertifiedKey { cert, signing_key } = generate_simple_self_signed([name.into()]).unwrap();
    let certificate = CertificateDer::from_pem_slice(cert.pem().as_bytes()).unwrap();
    let key = PrivateKeyDer::from_pem_slice(signing_key.serialize_pem().as_bytes()).unwrap();
    let server = ServerConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![certificate.clone()], key)
        .unwrap();
    let mut roots = RootCertStore::empty();
    roots.add(certificate).unwrap();
    let client = ClientConfig::builder_with_provider(Arc::new(client))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    (Arc::new(server), Arc::new(client))
}

fn request() -> ClientRequest {
    let (host, path) = ("localhost".parse().unwrap(), "/".parse().unwrap());
    ClientRequest::new(host, path, *Uuid::new_v4().as_bytes())
}

async fn listen() -> (TcpListener, Server) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let server = Server {
        host: "localhost".into(),
        port: listener.local_addr().unwrap().port(),
        tls: None,
        timeout: PATIENCE,
        unacknowledged_max: Duration::from_secs(90),
    };
    (listener, server)
}

/// Our end of a connection that we dialled.
struct Ours {
    link: Arc<Link>,
    seen: Arc<Seen>,
    task: JoinHandle<()>,
}

fn drive(process: &Process, dialled: Dialled, role: Role) -> Ours {
    let profile = Arc::new(Profile { role, ..profile() });
    let runtime = Arc::clone(&process.runtime);
    let link = Link::new(Uuid::new_v4(), None, profile, runtime, clock::now());
    let seen = Arc::<Seen>::default();
    let Dialled { socket, deflate, leftover, .. } = dialled;
    let recorder = Recorder(Arc::clone(&seen));
    let driver = Driver::new(Arc::clone(&link), socket, deflate, recorder, &leftover);
    Ours { link, seen, task: tokio::spawn(driver) }
}

impl Ours {
    fn push(&self, payload: &[u8]) -> Queued {
        let frame = self.link.frame(Kind::Binary, payload);
        let queued = self.link.push(frame, clock::now());
        self.link.flush(clock::now());
        queued
    }

    async fn ends(self) -> (&'static str, u16, bool) {
        timeout(PATIENCE, self.task).await.expect("the connection does not end").unwrap();
        self.seen.end().unwrap()
    }
}

trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}
type Peer = WebSocketStream<Box<dyn Stream>>;

/// A driven connection to a server of another library, in plain or over TLS.
async fn open(process: &Process, encrypted: bool) -> (Ours, Peer) {
    let (listener, mut server) = listen().await;
    let (acceptor, trust) = tls_for("localhost");
    if encrypted {
        server.tls = Some(trust);
    }
    let accept = async {
        let (stream, _) = listener.accept().await.unwrap();
        socket2::SockRef::from(&stream).set_send_buffer_size(16 * 1024).unwrap();
        let stream: Box<dyn Stream> = match encrypted {
            true => Box::new(TlsAcceptor::from(acceptor).accept(stream).await.unwrap()),
            false => Box::new(stream),
        };
        accept_async(stream).await.unwrap()
    };
    let request = request();
    let (dialled, peer) = tokio::join!(server.dial(&request), accept);
    (drive(process, dialled.unwrap(), Role::Client), peer)
}

#[tokio::test]
async fn dialled_connection_talks_and_closes() {
    for encrypted in [false, true] {
        let mut process = Process::new();
        let (ours, mut peer) = open(&process, encrypted).await;
        ours.push(b"from us");
        assert_eq!(peer.next().await.unwrap().unwrap(), Message::binary(&b"from us"[..]));
        peer.send(Message::text("from them")).await.unwrap();
        peer.send(Message::Ping("p".into())).await.unwrap();
        assert_eq!(peer.next().await.unwrap().unwrap(), Message::Pong("p".into()));
        assert_eq!(ours.seen.messages.lock()[..], [(Kind::Text, b"from them".to_vec())]);
        // Silence makes us ask, with a frame that the server takes.
        process.pass_seconds(31);
        assert_eq!(peer.next().await.unwrap().unwrap(), Message::Ping("".into()));
        ours.link.finish(&Disconnect::RESTART, clock::now());
        let Message::Close(Some(close)) = peer.next().await.unwrap().unwrap() else { panic!() };
        assert_eq!(u16::from(close.code), 1012);
        while peer.next().await.is_some_and(|result| result.is_ok()) {}
        assert_eq!(ours.ends().await, ("restart", 1012, false));
    }
}

#[tokio::test]
async fn server_closes_a_dialled_connection() {
    for encrypted in [false, true] {
        let (ours, mut peer) = open(&Process::new(), encrypted).await;
        peer.close(None).await.unwrap();
        while peer.next().await.is_some_and(|result| result.is_ok()) {}
        assert_eq!(ours.ends().await, ("normal", 1005, true));
        let (ours, peer) = open(&Process::new(), encrypted).await;
        drop(peer);
        assert_eq!(ours.ends().await, ("gone", 1006, false));
    }
}

#[tokio::test]
async fn slow_server_gets_everything_in_order() {
    for encrypted in [false, true] {
        let process = Process::new();
        let (ours, mut peer) = open(&process, encrypted).await;
        let mut sent = Vec::new();
        while ours.link.queued_bytes() < 1_000_000 {
            let payload = vec![sent.len() as u8; sent.len() * 97 % 40_000];
            assert_ne!(ours.push(&payload), Queued::Ending);
            sent.push(payload);
        }
        settle().await;
        assert!(process.runtime.budget.used() >= 900_000);
        for payload in sent {
            let heard = timeout(PATIENCE, peer.next()).await.unwrap().unwrap().unwrap();
            assert!(heard.into_data() == payload);
        }
        assert_eq!(ours.link.queued_bytes(), 0);
    }
}

#[tokio::test]
async fn frames_that_are_dropped_leave_the_encrypted_stream_whole() {
    let process = Process::new();
    let (ours, mut peer) = open(&process, true).await;
    let mut sent = 0_u32;
    while ours.link.queued_bytes() < 500_000 {
        // Small ones, so that records end anywhere.
        ours.push(&sent.to_be_bytes().repeat(1 + sent as usize % 9));
        sent += 1;
    }
    for round in 0..100 {
        ours.link.push_keyed(1, ours.link.frame(Kind::Binary, &[round]), clock::now());
    }
    ours.link.disconnect(&Disconnect::BACKEND, clock::now());
    let mut heard = 0;
    loop {
        match timeout(PATIENCE, peer.next()).await.unwrap().unwrap().unwrap() {
            Message::Binary(bytes) => {
                assert_eq!(bytes[..4], u32::to_be_bytes(heard));
                heard += 1;
            }
            Message::Close(close) => break assert_eq!(u16::from(close.unwrap().code), 4004),
            other => panic!("{other:?}"),
        }
    }
    assert!((1..sent).contains(&heard), "{heard} of {sent}");
}

#[tokio::test]
async fn last_encrypted_record_is_sent_though_the_socket_was_full() {
    let (config, trust) = tls_for("localhost");
    for count in 1..40 {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        socket2::SockRef::from(&listener).set_recv_buffer_size(4096).unwrap();
        let accept = async {
            let (stream, _) = listener.accept().await.unwrap();
            accept_async(TlsAcceptor::from(Arc::clone(&config)).accept(stream).await.unwrap()).await
        };
        let request = request();
        let dial = async {
            let stream = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
            socket2::SockRef::from(&stream).set_send_buffer_size(4096).unwrap();
            let name = "localhost".try_into().unwrap();
            let socket = TlsSocket::client(stream, Arc::clone(&trust), name).await.unwrap();
            handshake(socket.into(), &request).await
        };
        let (dialled, peer) = tokio::join!(dial, accept);
        let ours = drive(&Process::new(), dialled.unwrap(), Role::Client);
        for _ in 0..count {
            ours.push(&[1; 1500]);
        }
        let mut peer = peer.unwrap();
        for number in 1..=count {
            let heard = timeout(PATIENCE, peer.next()).await;
            assert!(heard.is_ok(), "message {number} of {count} does not come");
        }
    }
}

#[tokio::test]
async fn many_messages_from_an_encrypted_server_arrive() {
    let process = Process::new();
    let (ours, mut peer) = open(&process, true).await;
    let large = vec![7; 900_000];
    for number in 0..200_u32 {
        peer.feed(Message::binary(number.to_be_bytes().repeat(2000))).await.unwrap();
        if number % 50 == 0 {
            peer.feed(Message::binary(large.clone())).await.unwrap();
        }
    }
    peer.flush().await.unwrap();
    until("all have come", || ours.seen.messages.lock().len() == 204).await;
    let messages = ours.seen.messages.lock();
    let numbers = messages.iter().filter(|(_, payload)| payload.len() == 8000);
    assert!(numbers.zip(0_u32..).all(|((_, payload), i)| payload[..4] == i.to_be_bytes()));
}

#[tokio::test]
async fn both_ends_are_ours_over_tls() {
    let (listener, mut server) = listen().await;
    let (config, trust) = tls_for("localhost");
    server.tls = Some(trust);
    let process = Process::new();
    let accept = async {
        let (stream, _) = listener.accept().await.unwrap();
        let socket = Socket::from(TlsSocket::server(stream, config).await.unwrap());
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            std::future::poll_fn(|cx| socket.poll_read_ready(cx)).await.unwrap();
            let mut buffer = [0; 1024];
            let count = socket.try_read(&mut buffer).unwrap_or(0);
            head.extend_from_slice(&buffer[..count]);
        }
        let head = String::from_utf8(head).unwrap();
        let headers = head.lines().filter_map(|line| line.split_once(": "));
        let headers: http::HeaderMap =
            headers.map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap())).collect();
        let upgrade = read_upgrade(&http::Method::GET, http::Version::HTTP_11, &headers);
        let accept = upgrade.unwrap().accept;
        let answer = format!(
            "HTTP/1.1 101 x\r\nUpgrade: websocket\r\nConnection: upgrade\r\nSec-WebSocket-Accept: {accept}\r\n\r\n"
        );
        assert_eq!(socket.try_write(answer.as_bytes()).unwrap(), answer.len());
        socket
    };
    let request = request();
    let (dialled, socket) = tokio::join!(server.dial(&request), accept);
    let accepted = Dialled { socket, deflate: None, subprotocol: None, leftover: vec![] };
    let theirs = drive(&process, accepted, Role::Server);
    let ours = drive(&process, dialled.unwrap(), Role::Client);
    theirs.seen.echoes.store(true, SeqCst);
    for number in 0..100_u8 {
        ours.push(&vec![number; usize::from(number) * 300]);
    }
    until("all came back", || ours.seen.messages.lock().len() == 100).await;
    let messages = ours.seen.messages.lock().clone();
    assert!(
        messages
            .iter()
            .zip(0_u8..)
            .all(|((_, payload), i)| *payload == vec![i; usize::from(i) * 300])
    );
    ours.link.finish(&Disconnect::NORMAL, clock::now());
    assert_eq!(theirs.ends().await, ("normal", 1000, true));
    assert_eq!(ours.ends().await, ("normal", 1000, false));
}

#[tokio::test]
async fn certificate_that_is_not_trusted_is_refused() {
    let (listener, mut server) = listen().await;
    let accept = |config: Arc<ServerConfig>| {
        let listener = &listener;
        async move {
            let (stream, _) = listener.accept().await.unwrap();
            assert!(TlsAcceptor::from(config).accept(stream).await.is_err());
        }
    };
    let request = request();
    // For another name; then of another authority.
    let (config, trust) = tls_for("example.org");
    server.tls = Some(trust);
    let (dialled, ()) = tokio::join!(server.dial(&request), accept(config));
    assert!(matches!(dialled, Err(DialError::Tls(_))), "{dialled:?}");
    server.tls = Some(tls_for("localhost").1);
    let (dialled, ()) = tokio::join!(server.dial(&request), accept(tls_for("localhost").0));
    assert!(matches!(dialled, Err(DialError::Tls(_))), "{dialled:?}");
    server.host = "not a name".into();
    assert!(matches!(server.dial(&request).await, Err(DialError::BadHost)));
}

#[tokio::test]
async fn silent_server_is_given_up_in_time() {
    let (listener, mut server) = listen().await;
    server.timeout = Duration::from_millis(50);
    tokio::spawn(async move {
        let mut silent: Vec<TcpStream> = Vec::new();
        loop {
            silent.push(listener.accept().await.unwrap().0);
        }
    });
    let request = request();
    for tls in [None, Some(tls_for("localhost").1)] {
        server.tls = tls;
        assert!(matches!(server.dial(&request).await, Err(DialError::TimedOut)));
    }
}

#[tokio::test]
async fn refusal_and_nonsense_open_nothing() {
    let request = request();
    for (answer, refused) in [
        ("HTTP/1.1 401 Unauthorized\r\nRetry-After: 3\r\n\r\n", Some(401)),
        ("SSH-2.0-OpenSSH_9.9\r\n\r\n", None),
        ("", None),
    ] {
        let (listener, server) = listen().await;
        let accept = async {
            let (mut stream, _) = listener.accept().await.unwrap();
            stream.read_buf(&mut Vec::new()).await.unwrap();
            stream.write_all(answer.as_bytes()).await.unwrap();
        };
        let (dialled, ()) = tokio::join!(server.dial(&request), accept);
        match dialled.unwrap_err() {
            DialError::Refused { status, headers } => {
                assert_eq!(
                    (Some(status.as_u16()), &headers["retry-after"]),
                    (refused, &"3".parse().unwrap())
                );
            }
            DialError::Answer(_) | DialError::Socket(_) => assert_eq!(refused, None),
            other => panic!("{other}"),
        }
    }
    let (listener, server) = listen().await;
    drop(listener);
    assert!(matches!(server.dial(&request).await, Err(DialError::Socket(_))));
}

#[tokio::test]
async fn handshake_goes_over_a_socket_that_there_is() {
    let (ours, theirs) = tokio::net::UnixStream::pair().unwrap();
    let accept = async { accept_async(theirs).await.unwrap() };
    let request = request();
    let (dialled, mut peer) = tokio::join!(handshake(ours.into(), &request), accept);
    let ours = drive(&Process::new(), dialled.unwrap(), Role::Client);
    ours.push(b"hello");
    assert_eq!(peer.next().await.unwrap().unwrap(), Message::binary(&b"hello"[..]));
    // A dropped future leaves nothing open.
    let (ours, mut theirs) = tokio::net::UnixStream::pair().unwrap();
    let silent = timeout(Duration::from_millis(10), handshake(ours.into(), &request)).await;
    assert!(silent.is_err());
    let read = async { theirs.read_to_end(&mut Vec::new()).await.unwrap() };
    tokio::select! { _ = read => {}, () = pending() => {} }
}
