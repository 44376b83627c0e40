//! Limits before and after `101`: who meets one is told, and frees what it had.

use std::time::Duration;

use rustix::process::{Pid, Resource, Rlimit, prlimit};
use tokio_tungstenite::tungstenite::Message;

use crate::support::{
    binary::Binary,
    client::Client,
    eventually,
    gateway::{API_KEY, TestInstance, bearer},
    http,
    raw::Raw,
    soon,
};

#[tokio::test]
async fn a_full_instance_refuses_and_has_room_again_afterwards() {
    let instance = TestInstance::with(|config| config.limits.max_connections = 2).await;
    let mut first = instance.client("a").await;
    let second = instance.client("b").await;
    let token = instance.token("c").await;
    instance.refused("c", &token).await.assert_refused(503, "full");
    instance.refused("c", &token).await.assert_refused(503, "full");
    assert_eq!(instance.refusals("full"), 2.0);
    let ready = instance.get("/ready").await;
    assert_eq!((ready.status, ready.json()["reason"].as_str()), (503, Some("full")));
    instance.assert_serves(&mut first, "a").await;
    second.close().await;
    eventually("a seat is free", || instance.gateway().seats.taken() == 1).await;
    let third = instance.connect("c", &token).await.unwrap();
    drop((first, third));
    instance.wait_empty().await;
    assert_eq!(instance.get("/ready").await.status, 200);
}

#[tokio::test]
async fn refused_handshakes_leave_no_place_behind() {
    let instance = TestInstance::with(|config| config.limits.max_connections = 1).await;
    for _ in 0..20 {
        instance.refused("s", "wrong").await.assert_refused(403, "invalid_token");
        instance.handshake("/agent/ws/s", &[]).await.assert_refused(401, "missing_credentials");
    }
    instance.client("s").await.close().await;
    instance.wait_empty().await;
}

#[tokio::test]
async fn too_many_attempts_get_429_with_retry_after() {
    let instance = TestInstance::with(|config| {
        config.rate_limit.max_requests = 3;
        config.rate_limit.window = Duration::from_secs(90);
    })
    .await;
    let mut client = instance.client("s").await;
    instance.refused("s", "wrong").await.assert_refused(403, "invalid_token");
    instance.refused("s", "wrong").await.assert_refused(403, "invalid_token");
    let token = instance.token("s").await;
    let response = instance.refused("s", &token).await;
    response.assert_refused(429, "rate_limited");
    let seconds: u32 = response.header("retry-after").parse().unwrap();
    assert!((1..=30).contains(&seconds), "{seconds}");
    let text = format!("Try again in {seconds} seconds");
    assert!(response.body.contains(&text), "{response:?}");
    assert_eq!(instance.refusals("rate_limited"), 1.0);
    assert!(instance.has_token("s").await);
    // Connected clients, and requests for other endpoints, are not affected.
    instance.assert_serves(&mut client, "s").await;
    assert_eq!(instance.get("/health").await.status, 200);
}

#[tokio::test]
async fn addresses_behind_trusted_proxies_are_counted_each() {
    let limited = async |trusted: &[&str]| {
        let trusted = trusted.iter().map(|net| net.parse().unwrap()).collect();
        TestInstance::with(|config| {
            config.rate_limit.max_requests = 1;
            config.server.trusted_proxies = trusted;
        })
        .await
    };
    let attempt = async |instance: &TestInstance, name: &str, value: &str| {
        instance.handshake("/agent/ws/s", &[(name, value)]).await.status
    };
    let instance = limited(&["127.0.0.0/8"]).await;
    for (name, value, status) in [
        ("x-forwarded-for", "192.0.2.1", 401),
        ("x-forwarded-for", "192.0.2.1", 429),
        ("x-forwarded-for", "192.0.2.2", 401),
        // What a client wrote itself, left of what the proxy saw, changes nothing.
        ("x-forwarded-for", "198.51.100.7, 192.0.2.1", 429),
        ("forwarded", "for=192.0.2.1;proto=https", 429),
        ("forwarded", "for=\"[2001:db8::1]\"", 401),
        ("forwarded", "for=\"[2001:db8::2]\"", 429),
    ] {
        assert_eq!(attempt(&instance, name, value).await, status, "{name}: {value}");
    }
    let instance = limited(&[]).await;
    assert_eq!(attempt(&instance, "x-forwarded-for", "192.0.2.1").await, 401);
    assert_eq!(attempt(&instance, "x-forwarded-for", "192.0.2.2").await, 429);
}

#[tokio::test]
async fn a_client_that_sends_too_often_is_closed() {
    let instance = TestInstance::with(|config| {
        config.limits.messages_per_second = 1;
        config.limits.message_burst = 5;
    })
    .await;
    let mut other = instance.client("other").await;
    let mut worker = instance.follow("session:s:up").await;
    let mut client = instance.client("s").await;
    for n in 0..5 {
        client.send(n.to_string()).await;
        assert_eq!(worker.next().await, n.to_string());
    }
    let burst = (0..50).fold(Vec::new(), |mut bytes, _| {
        bytes.extend(crate::support::raw::frame(0x81, b"6"));
        bytes
    });
    tokio::io::AsyncWriteExt::write_all(client.stream.get_mut(), &burst).await.unwrap();
    assert_eq!(client.closed().await, (1008, "too many messages".into()));
    instance.wait_ended("sessions", "rate_limited").await;
    instance.assert_serves(&mut other, "other").await;
}

#[tokio::test]
async fn pings_do_not_count_as_messages() {
    let instance = TestInstance::with(|config| {
        config.limits.messages_per_second = 1;
        config.limits.message_burst = 1;
    })
    .await;
    let mut client = instance.echo().await;
    for n in 0..50_u8 {
        client.send_message(Message::Ping(vec![n].into())).await;
        assert_eq!(client.next().await, Message::Pong(vec![n].into()));
    }
    client.send("still here").await;
    assert_eq!(client.text().await, "still here");
}

#[tokio::test]
async fn messages_up_to_the_limit_pass_and_larger_ones_close() {
    let instance = TestInstance::with(|config| config.limits.max_message_bytes = 1000).await;
    let mut other = instance.echo().await;
    let mut client = instance.echo().await;
    client.send("x".repeat(1000)).await;
    assert_eq!(client.text().await.len(), 1000);
    client.send("x".repeat(1001)).await;
    assert_eq!(client.closed().await, (1009, "message too big".into()));
    instance.wait_ended("echo", "too_big").await;
    // A header that promises too much is enough, of one frame or of all fragments together.
    for frames in [
        &[0x82, 0xff, 0, 0, 0, 0, 0x7f, 0xff, 0xff, 0xff, 1, 2, 3, 4][..],
        &[&crate::support::raw::frame(0x02, &[b'x'; 600])[..], &[0x80, 0xfe, 2, 0, 1, 2, 3, 4]]
            .concat(),
    ] {
        let mut raw = Raw::connect(instance.address()).await;
        raw.upgrade("/echo", "").await;
        raw.write(frames).await;
        assert_eq!(raw.close_frame().await.0, 1009);
        raw.end().await;
    }
    eventually("all are counted", || instance.ended("echo", "too_big") == 3.0).await;
    other.send("undisturbed").await;
    assert_eq!(other.text().await, "undisturbed");
}

#[tokio::test]
async fn endless_fragments_are_closed_however_small_they_are() {
    let instance = TestInstance::with(|config| config.limits.max_fragments = 100).await;
    let mut other = instance.echo().await;
    for fragment in [&b""[..], b"x"] {
        let mut raw = Raw::connect(instance.address()).await;
        raw.upgrade("/echo", "").await;
        raw.frame(0x01, fragment).await;
        for _ in 0..99 {
            raw.frame(0x00, fragment).await;
        }
        // A ping in between is answered: so far everything is well.
        raw.frame(0x89, b"?").await;
        assert_eq!(raw.next_frame().await.unwrap().first, 0x8a);
        raw.frame(0x00, fragment).await;
        assert_eq!(raw.close_frame().await, (1009, "too many fragments".into()));
        raw.end().await;
    }
    eventually("both are counted", || instance.ended("echo", "too_many_fragments") == 2.0).await;
    let mut raw = Raw::connect(instance.address()).await;
    raw.upgrade("/echo", "").await;
    raw.frame(0x01, b"0").await;
    for _ in 0..98 {
        raw.frame(0x00, b"x").await;
    }
    raw.frame(0x80, b"1").await;
    assert_eq!(raw.text().await.len(), 100);
    other.send("undisturbed").await;
    assert_eq!(other.text().await, "undisturbed");
}

/// Limits can be as high as conformance suites want them.
#[tokio::test]
async fn limits_can_be_raised_to_16_mib_and_65536_fragments() {
    let instance = TestInstance::with(|config| {
        config.limits.max_message_bytes = 16 << 20;
        config.limits.max_fragments = 65_536;
        config.limits.send_buffer_bytes = 64 << 20;
    })
    .await;
    let mut client = instance.echo().await;
    let large = Message::binary(vec![7; 16 << 20]);
    client.send_message(large.clone()).await;
    assert!(client.next().await == large);
    let mut raw = Raw::connect(instance.address()).await;
    raw.upgrade("/echo", "").await;
    let mut frames = crate::support::raw::frame(0x02, b"x");
    for n in 2..=65_536 {
        let first = if n == 65_536 { 0x80 } else { 0x00 };
        frames.extend(crate::support::raw::frame(first, b"x"));
    }
    raw.write(&frames).await;
    assert_eq!(raw.next_frame().await.unwrap().payload.len(), 65_536);
}

#[tokio::test]
async fn sockets_beyond_the_places_are_refused_without_a_request() {
    let binary = Binary::start_with_files(224, &[("WSPROXY_ENDPOINTS__ECHO", "true")]).await;
    let mut clients = take_all_places(&binary).await;
    assert_eq!(clients.len(), 100);
    let refused = Client::connect(binary.address, "/echo", &[]).await.err().unwrap();
    assert_eq!(refused.as_u16(), 503);
    // Requests of which the body is missing: such sockets are not silent, and do not give way to others.
    let head = format!(
        "POST /api/v1/sessions/s/messages HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\
         Expect: 100-continue\r\nAuthorization: Bearer {API_KEY}\r\n\r\n"
    );
    let (asking, mut one_more) = take_spare_sockets(&binary, &head, 40).await;
    let refused = one_more.response().await;
    refused.assert_refused(503, "full");
    assert_eq!(refused.header("x-content-type-options"), "nosniff");
    one_more.end().await;
    clients[0].send("undisturbed").await;
    assert_eq!(clients[0].text().await, "undisturbed");
    drop(asking);
    assert_recovers(&binary, clients).await;
    let refused = "wsproxy_handshakes_total{endpoint=\"none\",outcome=\"full\"}";
    assert!(binary.metric(refused).await >= 1.0);
}

#[tokio::test]
async fn without_descriptors_the_instance_lives_on_and_recovers() {
    let binary = Binary::start_with_files(100, &[("WSPROXY_ENDPOINTS__ECHO", "true")]).await;
    let mut clients = take_all_places(&binary).await;
    // Fewer than were promised at the start: other processes took them, as where the whole machine has no more.
    let pid = Pid::from_raw(binary.pid().cast_signed());
    let few = Some(u64::try_from(descriptors(&binary) + 2).unwrap());
    prlimit(pid, Resource::Nofile, Rlimit { current: few, maximum: few }).unwrap();
    let mut silent = Vec::new();
    for _ in 0..200 {
        silent.push(Raw::connect(binary.address).await);
    }
    binary.line("Accepting failed; trying again.").await;
    clients[0].send("undisturbed").await;
    assert_eq!(clients[0].text().await, "undisturbed");
    drop(silent);
    assert_recovers(&binary, clients).await;
    assert!(binary.metric("wsproxy_errors_total{kind=\"accept\"}").await >= 1.0);
}

#[tokio::test]
async fn the_admin_port_answers_while_clients_have_everything() {
    let env = [("WSPROXY_ENDPOINTS__ECHO", "true"), ("METRICS_PORT", "0")];
    for files in [80, 256] {
        let mut binary = Binary::start_with_files(files, &env).await;
        let line = binary.line("Listening.").await;
        let clients_address = binary.address;
        let admin = line["admin_address"].as_str().unwrap().parse().unwrap();
        binary.address = admin;
        let most = binary.metric("wsproxy_connections_max").await as usize;
        assert_eq!(line["connections_max"], most);
        let mut clients = Vec::new();
        for _ in 0..most {
            clients.push(Client::connect(clients_address, "/echo", &[]).await.unwrap());
        }
        binary.address = clients_address;
        // Event streams of the API are not here, so sockets to spare are taken by heads that never end.
        let mut silent = Vec::new();
        for _ in 0..300 {
            silent.push(Raw::connect(clients_address).await);
        }
        for path in ["/health", "/ready", "/metrics", "/api/v1/info"] {
            let key = format!("Bearer {API_KEY}");
            let answer = http::request(admin, "GET", path, &[("authorization", &key)], b"").await;
            let full = if path == "/ready" { 503 } else { 200 };
            assert_eq!(answer.status, full, "{path} {}", answer.body);
        }
        clients[most - 1].send("undisturbed").await;
        assert_eq!(clients[most - 1].text().await, "undisturbed");
        assert!(binary.lines("Accepting failed; trying again.").is_empty(), "{}", binary.log());
    }
}

/// As many clients as the instance promises.
async fn take_all_places(binary: &Binary) -> Vec<Client> {
    let most = binary.metric("wsproxy_connections_max").await as usize;
    let mut clients = Vec::new();
    for _ in 0..most {
        clients.push(Client::connect(binary.address, "/echo", &[]).await.unwrap());
    }
    clients
}

/// Sends `head` over about `spare` sockets, until one more is answered without having asked.
async fn take_spare_sockets(binary: &Binary, head: &str, spare: usize) -> (Vec<Raw>, Raw) {
    let mut asking = Vec::new();
    let one_more = loop {
        let mut raw = Raw::connect(binary.address).await;
        let answered = async { raw.read().await > 0 };
        let patience = Duration::from_millis(if asking.len() < spare { 0 } else { 500 });
        if tokio::time::timeout(patience, answered).await == Ok(true) {
            break raw;
        }
        raw.write(head.as_bytes()).await;
        // The gateway has read the head, so that this socket does not give way to the next.
        assert_eq!(raw.response().await.status, 100);
        asking.push(raw);
    };
    assert!((spare..spare + 18).contains(&asking.len()), "{} were taken", asking.len());
    (asking, one_more)
}

fn descriptors(binary: &Binary) -> usize {
    std::fs::read_dir(format!("/proc/{}/fd", binary.pid())).unwrap().count()
}

/// All but one client leave; a new one comes, and descriptors come back.
async fn assert_recovers(binary: &Binary, mut clients: Vec<Client>) {
    clients.drain(1..).for_each(drop);
    let active = "wsproxy_active_connections{endpoint=\"echo\"}";
    soon("their seats are free", async { while binary.metric(active).await != 1.0 {} }).await;
    let token = binary.token("s").await;
    let path = "/agent/ws/s";
    Client::connect(binary.address, path, &bearer(&token)).await.unwrap().close().await;
    eventually("descriptors are given back", || descriptors(binary) < 40).await;
    clients[0].send("still").await;
    assert_eq!(clients[0].text().await, "still");
    assert!(!binary.log().contains("panicked"));
}
