//! The PROXY protocol: headers in any pieces, forged, late and wrong ones, and the address that counts after them.

use std::{
    net::{Ipv4Addr, SocketAddr},
    time::Duration,
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, copy_bidirectional},
    net::{TcpListener, TcpStream, UnixStream},
};

use crate::support::{
    binary::Binary,
    client::Client,
    eventually,
    gateway::{TestInstance, bearer},
    http,
    raw::{Raw, UPGRADE, frame},
    soon,
    tls::{Files, Made, Tunnel},
};

async fn behind(trusted: &str, change: impl FnOnce(&mut wsproxy::config::Config)) -> TestInstance {
    let trusted = vec![trusted.parse().unwrap()];
    TestInstance::with(|config| {
        config.server.trusted_proxies = trusted;
        config.server.proxy_protocol = true;
        config.rate_limit.max_requests = 1;
        change(config);
    })
    .await
}

fn line(client: &str) -> Vec<u8> {
    format!("PROXY TCP4 {client} 10.0.0.1 4711 80\r\n").into_bytes()
}

fn binary(client: [u8; 4], fields: &[u8]) -> Vec<u8> {
    let addresses = [&client[..], &[10, 0, 0, 1, 0x12, 0x67, 0, 80]].concat();
    let length = u16::try_from(12 + fields.len()).unwrap().to_be_bytes();
    [SIGNATURE, &[0x21, 0x11], &length, &addresses, fields].concat()
}

fn headers(instance: &TestInstance, outcome: &str) -> f64 {
    instance.metric(&format!("wsproxy_proxy_headers_total{{outcome=\"{outcome}\"}}"))
}

/// The status of the answer to an attempt that begins with `header`.
async fn attempt(instance: &TestInstance, header: &[u8], more: &str) -> u16 {
    let mut raw = Raw::connect(instance.address()).await;
    let request = format!("GET /agent/ws/s HTTP/1.1\r\n{UPGRADE}{more}\r\n");
    raw.write(&[header, request.as_bytes()].concat()).await;
    raw.response().await.status
}

#[tokio::test]
async fn the_address_in_the_header_is_counted() {
    let instance = behind("127.0.0.1", |_| {}).await;
    assert_eq!(attempt(&instance, &line("192.0.2.1"), "").await, 401);
    assert_eq!(attempt(&instance, &binary([192, 0, 2, 1], &[]), "").await, 429);
    assert_eq!(attempt(&instance, &binary([192, 0, 2, 2], &[0xea, 0, 1, 7]), "").await, 401);
    // That client is no trusted proxy, so its word about another one counts for nothing.
    let forged = "X-Forwarded-For: 192.0.2.3\r\nForwarded: for=192.0.2.3\r\n";
    assert_eq!(attempt(&instance, &line("192.0.2.2"), forged).await, 429);
    // LOCAL and UNKNOWN leave the address of the socket, which is a trusted proxy's.
    let local = [SIGNATURE, &[0x20, 0, 0, 0]].concat();
    assert_eq!(attempt(&instance, &local, "X-Forwarded-For: 192.0.2.9\r\n").await, 401);
    let unknown = b"PROXY UNKNOWN\r\n";
    assert_eq!(attempt(&instance, unknown, "X-Forwarded-For: 192.0.2.9\r\n").await, 429);
    assert_eq!((headers(&instance, "client"), headers(&instance, "local")), (4.0, 2.0));
}

#[tokio::test]
async fn a_proxy_behind_the_balancer_names_its_client() {
    let instance = behind("127.0.0.1", |config| {
        config.server.trusted_proxies.push("198.51.100.0/24".parse().unwrap());
    })
    .await;
    let attempt = async |client: &str| attempt(&instance, &line("198.51.100.7"), client).await;
    assert_eq!(attempt("X-Forwarded-For: 192.0.2.1\r\n").await, 401);
    assert_eq!(attempt("X-Forwarded-For: 192.0.2.1\r\n").await, 429);
    assert_eq!(attempt("X-Forwarded-For: 192.0.2.2\r\n").await, 401);
}

#[tokio::test]
async fn headers_come_in_any_pieces() {
    let instance = behind("127.0.0.1", |config| config.rate_limit.max_requests = 0).await;
    for header in [line("192.0.2.1"), binary([192, 0, 2, 1], &[4, 0, 3, 1, 2, 3])] {
        for end in 1..header.len() {
            let mut raw = Raw::connect(instance.address()).await;
            raw.write(&header[..end]).await;
            // Long enough for the gateway to look at the part, mostly.
            tokio::task::yield_now().await;
            raw.write(&[&header[end..], REQUEST].concat()).await;
            assert_eq!(raw.response().await.status, 426, "{end}");
        }
    }
    let mut raw = Raw::connect(instance.address()).await;
    for byte in line("192.0.2.1") {
        raw.write(&[byte]).await;
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    raw.write(REQUEST).await;
    assert_eq!(raw.response().await.status, 426);
}

#[tokio::test]
async fn bad_headers_of_a_trusted_proxy_are_refused() {
    let instance = behind("127.0.0.1", |config| {
        config.server.header_timeout = Duration::from_millis(500);
    })
    .await;
    let long_line = [&b"PROXY UNKNOWN "[..], &[b'x'; 200]].concat();
    let long = [SIGNATURE, &[0x21, 0x11, 0xff, 0xff]].concat();
    let checksum = binary([192, 0, 2, 1], &[3, 0, 4, 1, 2, 3, 4]);
    let family = [SIGNATURE, &[0x21, 0x12, 0, 12], &[0; 12]].concat();
    for (first, outcome, word) in [
        (REQUEST, "missing", "missing"),
        (b"\x16\x03\x01\x02\x00", "missing", "missing"),
        (&long_line, "too_long", "too long"),
        (&long, "too_long", "too long"),
        (&checksum, "checksum", "checksum"),
        (&family, "malformed", "family"),
        (b"PROXY TCP4 1.1.1.1 2.2.2.2 80\r\n", "malformed", "ports"),
        (b"PROXY TC", "timeout", "in time"),
        (&SIGNATURE[..5], "timeout", "in time"),
        (b"", "timeout", "in time"),
    ] {
        let before = headers(&instance, outcome);
        let mut raw = Raw::connect(instance.address()).await;
        raw.write(first).await;
        let answer = raw.response().await;
        answer.assert_refused(400, "bad_request");
        assert!(answer.body.contains(word), "{answer:?}");
        soon("the end of the stream", raw.end()).await;
        assert_eq!(headers(&instance, outcome), before + 1.0, "{outcome}");
    }
    // A balancer that only connects, or leaves in the middle.
    for part in [&b""[..], b"PROXY TCP4 1"] {
        let before = headers(&instance, "left");
        let mut socket = TcpStream::connect(instance.address()).await.unwrap();
        socket.write_all(part).await.unwrap();
        drop(socket);
        eventually("its end is counted", || headers(&instance, "left") > before).await;
    }
    instance.wait_empty().await;
}

#[tokio::test]
async fn other_peers_are_served_without_a_header_only() {
    let instance = behind("192.0.2.0/24", |config| config.rate_limit.max_requests = 0).await;
    let mut client = instance.client("s").await;
    instance.assert_serves(&mut client, "s").await;
    // Requests whose beginning is that of a header, in pieces.
    for (first, rest) in [("P", "OST /x HTTP/1.1"), ("\r\n", "GET /x HTTP/1.1")] {
        let mut raw = Raw::connect(instance.address()).await;
        raw.write(first.as_bytes()).await;
        tokio::time::sleep(Duration::from_millis(20)).await;
        raw.write(format!("{rest}\r\nHost: x\r\nContent-Length: 0\r\n\r\n").as_bytes()).await;
        assert_eq!(raw.response().await.status, 404, "{first:?}");
    }
    for header in [line("192.0.2.1"), binary([192, 0, 2, 1], &[])] {
        let before = headers(&instance, "untrusted");
        let mut raw = Raw::connect(instance.address()).await;
        raw.write(&[&header[..], REQUEST].concat()).await;
        let answer = raw.response().await;
        answer.assert_refused(400, "bad_request");
        assert!(answer.body.contains("not among the trusted proxies"), "{answer:?}");
        assert_eq!(headers(&instance, "untrusted"), before + 1.0);
    }
    // Without the key a header is a bad request, too.
    let plain = TestInstance::with(|_| {}).await;
    let mut raw = Raw::connect(plain.address()).await;
    raw.write(&[&line("192.0.2.1"), REQUEST].concat()).await;
    assert_eq!(raw.response().await.status, 400);
}

/// A local port that writes a header before what its clients say, to a port or a unix socket.
async fn proxy(
    header: Vec<u8>,
    port: Option<SocketAddr>,
    path: Option<std::path::PathBuf>,
) -> SocketAddr {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut client, _)) = listener.accept().await {
            let (header, path) = (header.clone(), path.clone());
            tokio::spawn(async move {
                if let Some(port) = port {
                    let mut gateway = TcpStream::connect(port).await?;
                    gateway.write_all(&header).await?;
                    return copy_bidirectional(&mut client, &mut gateway).await;
                }
                let mut gateway = UnixStream::connect(path.unwrap_or_default()).await?;
                gateway.write_all(&header).await?;
                copy_bidirectional(&mut client, &mut gateway).await
            });
        }
    });
    address
}

#[tokio::test]
async fn the_header_comes_before_tls() {
    let made = Made::new();
    let files = Files::new(&made);
    let instance = behind("127.0.0.1", |config| {
        files.put_into(config);
        config.rate_limit.max_requests = 2;
    })
    .await;
    let plain = proxy(line("192.0.2.1"), Some(instance.address()), None).await;
    let tunnel = Tunnel::to(plain, made.trust()).await;
    let token = instance.token("s").await;
    let mut client = Client::connect(tunnel.address, "/agent/ws/s", &bearer(&token)).await.unwrap();
    instance.assert_serves(&mut client, "s").await;
    assert_eq!(http::handshake(tunnel.address, "/agent/ws/s", &[]).await.status, 401);
    assert_eq!(http::handshake(tunnel.address, "/agent/ws/s", &[]).await.status, 429);
    assert_eq!(headers(&instance, "client"), 3.0);
    client.close().await;
}

/// Everything that a client writes until it hears from the server.
fn encrypted(connection: &mut rustls::ClientConnection) -> Vec<u8> {
    let mut bytes = Vec::new();
    while connection.wants_write() {
        connection.write_tls(&mut bytes).unwrap();
    }
    bytes
}

#[tokio::test]
async fn header_tls_and_messages_come_in_two_packets() {
    let made = Made::new();
    let files = Files::new(&made);
    let instance = behind("127.0.0.1", |config| files.put_into(config)).await;
    let token = instance.token("s").await;
    let mut worker = instance.follow("session:s:up").await;
    let mut tls =
        rustls::ClientConnection::new(made.trust(), "localhost".try_into().unwrap()).unwrap();
    let mut raw = Raw::connect(instance.address()).await;
    raw.write(&[line("192.0.2.1"), encrypted(&mut tls)].concat()).await;
    while tls.is_handshaking() {
        assert!(raw.read().await > 0);
        tls.read_tls(&mut &*raw.take()).unwrap();
        tls.process_new_packets().unwrap();
    }
    let head =
        format!("GET /agent/ws/s HTTP/1.1\r\n{UPGRADE}Authorization: Bearer {token}\r\n\r\n");
    let said = [head.as_bytes(), &frame(0x81, b"{\"n\":1}"), &frame(0x81, b"{\"n\":2}")].concat();
    std::io::Write::write_all(&mut tls.writer(), &said).unwrap();
    raw.write(&encrypted(&mut tls)).await;
    assert_eq!([worker.next().await, worker.next().await], ["{\"n\":1}", "{\"n\":2}"]);
    assert_eq!(headers(&instance, "client"), 1.0);
}

#[tokio::test]
async fn clients_that_stay_undecided_cost_no_cpu() {
    let binary = Binary::start(&[
        ("WSPROXY_SERVER__PROXY_PROTOCOL", "true"),
        ("WSPROXY_SERVER__TRUSTED_PROXIES", "192.0.2.0/24"),
        ("WSPROXY_SERVER__HEADER_TIMEOUT", "6s"),
        ("WSPROXY_LIMITS__MAX_CONNECTIONS", "6000"),
        ("LOG_LEVEL", "info"),
    ])
    .await;
    let mut clients = Vec::new();
    for _ in 0..1200 {
        let mut raw = Raw::connect(binary.address).await;
        // The beginning of a header, and of `POST`.
        raw.write(b"P").await;
        clients.push(raw);
    }
    // The port answers when it has accepted those before.
    binary.metric("wsproxy_reload_done_timestamp_seconds").await;
    let before = binary.cpu_time();
    for client in &mut clients {
        client.end().await;
    }
    let used = binary.cpu_time() - before;
    let left = "wsproxy_proxy_headers_total{outcome=\"left\"}";
    assert_eq!(binary.metric(left).await, 1200.0);
    assert!(used < Duration::from_millis(500), "{used:?}");
}

#[tokio::test]
async fn the_header_comes_over_a_unix_socket() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("wsproxy.sock");
    let unix = Some(path.clone());
    let instance = behind("unix:", |config| config.server.unix = unix).await;
    let first = proxy(line("192.0.2.1"), None, Some(path.clone())).await;
    let second = proxy(binary([192, 0, 2, 2], &[]), None, Some(path.clone())).await;
    assert_eq!(http::handshake(first, "/agent/ws/s", &[]).await.status, 401);
    assert_eq!(http::handshake(first, "/agent/ws/s", &[]).await.status, 429);
    assert_eq!(http::handshake(second, "/agent/ws/s", &[]).await.status, 401);
    let mut bare = UnixStream::connect(&path).await.unwrap();
    bare.write_all(REQUEST).await.unwrap();
    let mut answer = String::new();
    soon("the answer", bare.read_to_string(&mut answer)).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 400 "), "{answer}");
    assert_eq!(headers(&instance, "missing"), 1.0);
}

#[tokio::test]
async fn silent_proxies_do_not_hold_up_others() {
    let instance = behind("127.0.0.1", |config| {
        config.limits.max_connections = 16;
        config.rate_limit.max_requests = 0;
    })
    .await;
    let mut silent = Vec::new();
    for n in 0..400 {
        let mut raw = Raw::connect(instance.address()).await;
        if n % 2 == 0 {
            raw.write(b"PROXY TCP4 1").await;
        }
        silent.push(raw);
    }
    let good = proxy(line("192.0.2.1"), Some(instance.address()), None).await;
    let token = instance.token("s").await;
    let mut client = Client::connect(good, "/agent/ws/s", &bearer(&token)).await.unwrap();
    instance.assert_serves(&mut client, "s").await;
}

const REQUEST: &[u8] = b"GET /agent/ws/s HTTP/1.1\r\nHost: x\r\n\r\n";
const SIGNATURE: &[u8] = b"\r\n\r\n\0\r\nQUIT\n";
