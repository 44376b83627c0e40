//! TLS peers whose records carry little or nothing, and records at the end of a connection.

use std::{
    io::{
        ErrorKind::{InvalidData, WouldBlock},
        Read, Write,
    },
    net::TcpStream,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use rustls::{
    ClientConnection, ContentType, Error, SupportedCipherSuite, Tls13CipherSuite,
    crypto::{
        CipherSuiteCommon, CryptoProvider,
        aws_lc_rs::{self, cipher_suite::TLS13_AES_128_GCM_SHA256},
        cipher::{
            AeadKey, Iv, MessageDecrypter, MessageEncrypter, OutboundChunks, OutboundOpaqueMessage,
            OutboundPlainMessage, Tls13AeadAlgorithm, UnsupportedOperationError,
        },
    },
};
use tokio::{net::TcpListener, task::JoinHandle, time::timeout};
use uuid::Uuid;
use wsproxy_conn::{Driver, Link, Profile, Runtime, Socket, clock, socket::tls::TlsSocket};
use wsproxy_proto::{
    rate::Rate,
    ws::frame::{Opcode, client_frame},
};

use crate::{
    dial::tls_with,
    support::{PATIENCE, Process, Recorder, Seen, profile, settle, text, until},
};

/// Opens a connection between our end and a client that blocks.
async fn connect(client: CryptoProvider) -> (Socket, ClientConnection, TcpStream) {
    let (config, trust) = tls_with("localhost", client);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    socket2::SockRef::from(&listener).set_recv_buffer_size(1 << 20).unwrap();
    let address = listener.local_addr().unwrap();
    let peer = thread::spawn(move || {
        let mut stream = TcpStream::connect(address).unwrap();
        // The last bytes must not wait until our end reads the others.
        stream.set_nodelay(true).unwrap();
        let mut tls = ClientConnection::new(trust, "localhost".try_into().unwrap()).unwrap();
        tls.set_buffer_limit(None);
        tls.complete_io(&mut stream).unwrap();
        (tls, stream)
    });
    let (stream, _) = listener.accept().await.unwrap();
    let socket = TlsSocket::server(stream, config).await.unwrap();
    let (tls, stream) = peer.join().unwrap();
    (socket.into(), tls, stream)
}

fn send(tls: &mut ClientConnection, stream: &mut TcpStream) -> std::io::Result<()> {
    while tls.wants_write() {
        tls.write_tls(stream)?;
    }
    Ok(())
}

/// Sends what is encrypted, while our end may read.
async fn send_all(
    mut tls: ClientConnection,
    mut stream: TcpStream,
) -> (ClientConnection, TcpStream) {
    let sending = tokio::task::spawn_blocking(move || {
        send(&mut tls, &mut stream).unwrap();
        (tls, stream)
    });
    sending.await.unwrap()
}

#[tokio::test]
async fn one_read_takes_a_bounded_part_of_tiny_records() {
    let (socket, mut tls, stream) = connect(aws_lc_rs::default_provider()).await;
    let sent: Vec<u8> = (0..11_000_u32).map(|n| (n % 251) as u8).collect();
    for byte in &sent {
        tls.writer().write_all(&[*byte]).unwrap();
    }
    let _peer = send_all(tls, stream).await;
    let (mut received, mut buffer) = (Vec::new(), vec![0; 64 * 1024]);
    while received.len() < sent.len() {
        let readable = std::future::poll_fn(|cx| socket.poll_read_ready(cx));
        timeout(PATIENCE, readable).await.expect("nothing comes").unwrap();
        match socket.try_read(&mut buffer) {
            Ok(count) => {
                assert!((1..4000).contains(&count), "{count} bytes at once");
                received.extend_from_slice(&buffer[..count]);
            }
            Err(error) => assert_eq!(error.kind(), WouldBlock),
        }
    }
    assert!(received == sent);
}

#[tokio::test]
async fn bytes_before_a_bad_record_are_read() {
    let (socket, mut tls, mut stream) = connect(aws_lc_rs::default_provider()).await;
    tls.writer().write_all(b"last words").unwrap();
    let mut sent = Vec::new();
    tls.write_tls(&mut sent).unwrap();
    // A record that no key of ours made, in the same segment.
    sent.extend([&[23, 3, 3, 0, 40][..], &[7; 40]].concat());
    stream.write_all(&sent).unwrap();
    let mut buffer = [0; 64];
    let mut read = async || loop {
        timeout(PATIENCE, std::future::poll_fn(|cx| socket.poll_read_ready(cx))).await.unwrap()?;
        match socket.try_read(&mut buffer) {
            Err(error) if error.kind() == WouldBlock => {}
            result => return result,
        }
    };
    assert_eq!(read().await.unwrap(), 10);
    assert_eq!(read().await.unwrap_err().kind(), InvalidData);
    assert!(buffer.starts_with(b"last words"));
}

#[tokio::test]
async fn the_goodbye_waits_until_the_kernel_takes_it() {
    let (socket, mut tls, mut stream) = connect(aws_lc_rs::default_provider()).await;
    let mut written = 0;
    while let Ok(count) = socket.try_write(&[7; 10_000]) {
        written += count;
    }
    let finish = std::future::poll_fn(|cx| socket.poll_finish_writing(cx));
    let mut finish = std::pin::pin!(finish);
    assert!(poll_once(finish.as_mut()).is_pending(), "the kernel takes no more");
    let peer = thread::spawn(move || {
        let mut received = Vec::new();
        let told = rustls::Stream::new(&mut tls, &mut stream).read_to_end(&mut received);
        told.map(|_| received.len())
    });
    timeout(PATIENCE, finish).await.unwrap();
    let received = tokio::task::spawn_blocking(|| peer.join()).await.unwrap().unwrap();
    // The last byte of a record counts as written only when the kernel has all of it.
    assert!([written, written + 1].contains(&received.expect("the end is told")));
}

/// Polls a future once.
fn poll_once<F: Future>(future: std::pin::Pin<&mut F>) -> std::task::Poll<F::Output> {
    future.poll(&mut std::task::Context::from_waker(std::task::Waker::noop()))
}

#[tokio::test]
async fn a_record_that_waits_can_be_freed_for_the_budget() {
    let (socket, _tls, _stream) = connect(aws_lc_rs::default_provider()).await;
    let runtime = Runtime::new(0, clock::now());
    let link =
        Link::new(Uuid::new_v4(), None, profile().into(), Arc::clone(&runtime), clock::now());
    let seen = Arc::<Seen>::default();
    let recorder = Recorder(Arc::clone(&seen));
    let task = tokio::spawn(Driver::new(Arc::clone(&link), socket, None, recorder, &[]));
    while runtime.budget.used() == 0 {
        link.push(text(&"x".repeat(9000)), clock::now());
        link.flush(clock::now());
    }
    // No frame waits but one that is partly written, and its record.
    assert!(link.queued_bytes() < 9100 && runtime.budget.used() > 9000);
    runtime.tick(clock::now());
    assert_eq!(runtime.budget.used(), 0);
    timeout(PATIENCE, task).await.unwrap().unwrap();
    assert_eq!(seen.end(), Some(("slow_consumer", 1008, false)));
}

/// Connection whose encrypted end is driven.
struct Driven {
    link: Arc<Link>,
    seen: Arc<Seen>,
    task: JoinHandle<()>,
}

impl Driven {
    fn new(socket: Socket, profile: Profile) -> Self {
        let (profile, runtime) = (Arc::new(profile), Arc::clone(&Process::new().runtime));
        let link = Link::new(Uuid::new_v4(), None, profile, runtime, clock::now());
        let seen = Arc::<Seen>::default();
        let recorder = Recorder(Arc::clone(&seen));
        let task = tokio::spawn(Driver::new(Arc::clone(&link), socket, None, recorder, &[]));
        Self { link, seen, task }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn endless_records_without_contents_end_the_connection() {
    let (socket, mut tls, mut stream) = connect(emptying()).await;
    let Driven { link, seen, task } = Driven::new(socket, profile());
    let peer = thread::spawn(move || {
        let started = Instant::now();
        while started.elapsed() < PATIENCE {
            for _ in 0..31 {
                tls.refresh_traffic_keys().unwrap();
            }
            tls.writer().write_all(&EMPTIED).unwrap();
            if send(&mut tls, &mut stream).is_err() {
                return true;
            }
        }
        false
    });
    let pushes = thread::spawn(move || {
        for _ in 0..100 {
            link.push(text("x"), clock::now());
            link.flush(clock::now());
        }
    });
    timeout(PATIENCE, task).await.expect("the connection does not end").unwrap();
    pushes.join().unwrap();
    assert!(peer.join().unwrap(), "the peer is not cut off");
    assert_eq!(seen.end(), Some(("gone", 1006, false)));
}

/// The first read after the pause takes a part of them only.
#[tokio::test]
async fn tiny_records_that_came_during_a_pause_are_no_burst() {
    let (socket, mut tls, stream) = connect(aws_lc_rs::default_provider()).await;
    let rate = Rate::new(100_000, 1000, 20).into();
    let Driven { link, seen, .. } = Driven::new(socket, Profile { rate, ..profile() });
    // The kernel holds more for a reader that has read much.
    let large = client_frame(Opcode::Binary, &[7; 500_000], false, [3; 4]);
    tls.writer().write_all(&large).unwrap();
    let (mut tls, stream) = send_all(tls, stream).await;
    until("it came", || seen.messages.lock().len() == 1).await;
    seen.set_bus_full(true);
    settle().await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    for _ in 0..COUNT {
        let frame = client_frame(Opcode::Text, b"1", false, [3; 4]);
        tls.writer().write_all(&frame).unwrap();
    }
    let _peer = send_all(tls, stream).await;
    assert_eq!(seen.messages.lock().len(), 1);
    seen.set_bus_full(false);
    until("all came", || link.is_closing() || seen.messages.lock().len() == 1 + COUNT).await;
    assert!(!link.is_closing(), "after {} messages", seen.messages.lock().len());
}

/// Cryptography that sends a record of [`EMPTIED`] without contents.
fn emptying() -> CryptoProvider {
    let SupportedCipherSuite::Tls13(suite) = TLS13_AES_128_GCM_SHA256 else { panic!("not 1.3") };
    let suite = Tls13CipherSuite {
        common: CipherSuiteCommon { ..suite.common },
        hkdf_provider: suite.hkdf_provider,
        aead_alg: Box::leak(Box::new(Emptying(suite.aead_alg))),
        quic: None,
    };
    let cipher_suites = vec![SupportedCipherSuite::Tls13(Box::leak(Box::new(suite)))];
    CryptoProvider { cipher_suites, ..aws_lc_rs::default_provider() }
}

struct Emptying<T>(T);

impl Tls13AeadAlgorithm for Emptying<&'static dyn Tls13AeadAlgorithm> {
    fn encrypter(&self, key: AeadKey, iv: Iv) -> Box<dyn MessageEncrypter> {
        Box::new(Emptying(self.0.encrypter(key, iv)))
    }

    fn decrypter(&self, key: AeadKey, iv: Iv) -> Box<dyn MessageDecrypter> {
        self.0.decrypter(key, iv)
    }

    fn key_len(&self) -> usize {
        self.0.key_len()
    }

    fn extract_keys(
        &self,
        key: AeadKey,
        iv: Iv,
    ) -> Result<rustls::ConnectionTrafficSecrets, UnsupportedOperationError> {
        self.0.extract_keys(key, iv)
    }
}

impl MessageEncrypter for Emptying<Box<dyn MessageEncrypter>> {
    fn encrypt(
        &mut self,
        mut message: OutboundPlainMessage<'_>,
        sequence: u64,
    ) -> Result<OutboundOpaqueMessage, Error> {
        if message.typ == ContentType::ApplicationData && message.payload.to_vec() == EMPTIED {
            message.payload = OutboundChunks::new_empty();
        }
        self.0.encrypt(message, sequence)
    }

    fn encrypted_payload_len(&self, length: usize) -> usize {
        self.0.encrypted_payload_len(length)
    }
}

/// Messages whose records are more than one read takes, and that the kernel holds for a reader that pauses.
const COUNT: usize = 3500;

/// Contents whose record is sent empty.
const EMPTIED: [u8; 3] = *b"\0\0\0";
