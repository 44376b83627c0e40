//! Ends of a lane that the peer causes: rules that it breaks, silence, and a lost socket.

use std::time::Duration;

use bytes::Bytes;
use socket2::SockRef;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::sleep,
};
use wsproxy_conn::{
    clock::{self, Micros},
    lane::{LaneEnd, LaneSettings, Received, WriteError},
};
use wsproxy_proto::{
    tunnel::{
        MESSAGE_BYTES_MAX, WINDOW_MAX,
        code::Code,
        event::End,
        frame::{Data, DataFlag, Frame, StreamFrame},
        hello::Hello,
        lane::LaneError,
    },
    ws::frame::{Opcode, server_frame},
};

use super::{
    pair::{Pair, head, read_all, request, short, tcp, within},
    peer::{Peer, hello, masked, message},
};
use crate::support::{PATIENCE, settle, until};

#[tokio::test]
async fn messages_that_the_protocol_forbids_close_with_1002() {
    let ping = message(&Frame::Ping(1));
    let never_opened = Frame::Stream(7, StreamFrame::Credit(1));
    for (what, bytes) in [
        ("text", masked(Opcode::Text, b"{}")),
        ("a partial frame", masked(Opcode::Binary, &ping[..ping.len() - 1])),
        ("a partial header", masked(Opcode::Binary, &ping[..3])),
        ("an empty message", masked(Opcode::Binary, b"")),
        ("a message that is too large", masked(Opcode::Binary, &vec![0; MESSAGE_BYTES_MAX + 1])),
        ("a frame without a mask", server_frame(Opcode::Binary, &ping, false).to_vec()),
        ("a reserved opcode", vec![0x83, 0x80, 0, 0, 0, 0]),
        ("a second HELLO", masked(Opcode::Binary, &message(&hello()))),
        ("a stream that was never opened", masked(Opcode::Binary, &message(&never_opened))),
    ] {
        let mut peer = Peer::ready(&LaneSettings::default()).await;
        let mut opened = peer.lane.open(&request(true)).unwrap();
        peer.hears_open().await;
        peer.socket.write_all(&bytes).await.unwrap();
        // The stream ends before the connection does.
        let lost = End::LaneLost { not_dispatched: false };
        assert_eq!(within(opened.answer.head()).await, Err(lost), "{what}");
        drop(opened);
        let (code, reason, end) = peer.ends_closed().await;
        assert_eq!((code, &*reason), (1002, "protocol"), "{what}: {end:?}");
    }
}

#[tokio::test]
async fn a_lanes_socket_keeps_little_unsent() {
    let (ours, theirs) = tcp().await;
    let [ours, theirs] = [ours, theirs].map(|stream| {
        let stream = stream.into_std().unwrap();
        let same = stream.try_clone().unwrap();
        (TcpStream::from_std(stream).unwrap(), same)
    });
    let settings = LaneSettings::default();
    let pair = Pair::over(ours.0.into(), theirs.0.into(), &settings).await;
    for socket in [ours.1, theirs.1] {
        let socket = SockRef::from(&socket);
        assert!(socket.tcp_nodelay().unwrap());
        assert_eq!(socket.tcp_notsent_lowat().unwrap(), 64 << 10);
        assert_eq!(socket.tcp_user_timeout().unwrap(), Some(2 * settings.write_timeout));
    }
    drop(pair);
}

#[tokio::test]
async fn a_message_that_is_still_coming_is_no_silence() {
    let settings = short(Duration::from_millis(50), Duration::from_millis(300));
    let mut peer = Peer::ready(&settings).await;
    let start = clock::now();
    for byte in masked(Opcode::Binary, &[0; 100]) {
        peer.socket.write_all(&[byte]).await.unwrap();
        sleep(Duration::from_millis(10)).await;
        if clock::now().since(start) > Duration::from_millis(600).into() {
            break;
        }
    }
    assert_eq!(peer.lane.status().end, None);
}

#[tokio::test]
async fn a_first_frame_that_is_not_hello_closes_with_1002() {
    let mut peer = Peer::new(&LaneSettings::default(), &[]).await;
    peer.says_frame(&Frame::Ping(1)).await;
    let (code, reason, end) = peer.ends_closed().await;
    assert_eq!((code, &*reason), (1002, "protocol"));
    assert!(matches!(end, LaneEnd::Broken(LaneError::Order(_))), "{end:?}");
}

#[tokio::test]
async fn data_beyond_the_credit_closes_with_1002() {
    let mut peer = Peer::ready(&LaneSettings::default()).await;
    let opened = peer.lane.open(&request(true)).unwrap();
    let number = peer.hears_open().await;
    peer.says_frame(&Frame::Stream(number, StreamFrame::Head(head(200, false)))).await;
    for _ in 0..3 {
        let data = Data { bytes: &[7; 16 << 10], flag: DataFlag::None };
        peer.says_frame(&Frame::Stream(number, StreamFrame::Data(data))).await;
    }
    until("the lane has ended", || peer.lane.status().end.is_some()).await;
    drop(opened);
    let closed = peer.ends_closed().await;
    let expected = (1002, "flow_control".into(), LaneEnd::Broken(LaneError::FlowControl));
    assert_eq!(closed, expected);
}

#[tokio::test]
async fn a_peer_without_hello_is_closed_in_time() {
    let mut settings = LaneSettings::default();
    settings.protocol.hello_timeout = 100_000;
    let peer = Peer::new(&settings, &[]).await;
    assert_eq!(within(peer.lane.ready()).await, Err(LaneEnd::HelloTimeout));
    let closed = peer.ends_closed().await;
    assert_eq!(closed, (1002, "hello_timeout".into(), LaneEnd::HelloTimeout));
}

#[tokio::test]
async fn a_silent_peer_ends_the_lane() {
    let settings = short(Duration::from_millis(50), Duration::from_millis(200));
    let peer = Peer::ready(&settings).await;
    let mut opened = peer.lane.open(&request(true)).unwrap();
    let lost = End::LaneLost { not_dispatched: false };
    assert_eq!(within(opened.answer.head()).await, Err(lost));
    assert_eq!(within(peer.task).await.unwrap(), LaneEnd::Silent);
    // More than one ping was written meanwhile.
    assert!(peer.lane.numbers().bytes_sent > 100);
}

#[tokio::test]
async fn pings_keep_a_quiet_lane_alive() {
    let (ping, silence_max) = (Duration::from_millis(50), Duration::from_millis(400));
    let mut pair = Pair::with(&short(ping, silence_max)).await;
    let start = clock::now();
    while clock::now().since(start) < (2 * silence_max).into() {
        sleep(ping).await;
    }
    assert!(pair.gateway.status().round_trip.is_some(), "no PONG came");
    let (_opened, _accepted) = pair.stream(true).await;
}

#[tokio::test]
async fn a_pause_of_the_process_is_not_silence() {
    let (ping, silence_max) = (Duration::from_millis(50), Duration::from_millis(500));
    let mut pair = Pair::with(&short(ping, silence_max)).await;
    // Neither lane runs meanwhile.
    std::thread::sleep(silence_max + ping);
    let before = pair.gateway.numbers().bytes_received;
    until("the agent has sent something", || pair.gateway.numbers().bytes_received > before).await;
    let (_opened, _accepted) = pair.stream(true).await;
}

#[tokio::test]
async fn a_write_without_progress_ends_the_lane() {
    let settings =
        LaneSettings { write_timeout: Duration::from_millis(150), ..LaneSettings::default() };
    let wide = Frame::Hello(Hello { window: WINDOW_MAX, ..Hello::default() });
    let peer = Peer::new(&settings, &masked(Opcode::Binary, &message(&wide))).await;
    let mut opened = peer.lane.open(&request(false)).unwrap();
    // The peer reads nothing.
    let error = within(async {
        loop {
            if let Err(error) = opened.request.write(vec![7; 1 << 20].into()).await {
                return error;
            }
        }
    })
    .await;
    assert_eq!(error, WriteError::Ended(End::LaneLost { not_dispatched: false }));
    assert_eq!(within(peer.task).await.unwrap(), LaneEnd::Stalled);
}

#[tokio::test]
async fn a_process_that_pauses_again_and_again_finds_a_silent_peer() {
    let silence_max = Duration::from_millis(100);
    let peer = Peer::ready(&short(Duration::from_millis(40), silence_max)).await;
    let start = clock::now();
    while peer.lane.status().end.is_none() {
        assert!(clock::now().since(start) < PATIENCE.into(), "the lane does not end");
        std::thread::sleep(silence_max / 2);
        settle().await;
    }
    assert_eq!(within(peer.task).await.unwrap(), LaneEnd::Silent);
}

#[tokio::test]
async fn a_slow_write_with_progress_goes_on() {
    let write_timeout = Duration::from_millis(300);
    let settings = LaneSettings { write_timeout, ..LaneSettings::default() };
    let wide = Frame::Hello(Hello { window: WINDOW_MAX, ..Hello::default() });
    let mut peer = Peer::new(&settings, &masked(Opcode::Binary, &message(&wide))).await;
    let mut opened = peer.lane.open(&request(false)).unwrap();
    let writing = tokio::spawn(async move {
        while opened.request.write(vec![7; 1 << 20].into()).await.is_ok() {}
    });
    let (start, mut buffer) = (clock::now(), vec![0; 256 << 10]);
    while clock::now().since(start) < (3 * write_timeout).into() {
        assert!(within(peer.socket.read(&mut buffer)).await.unwrap() > 0);
        sleep(Duration::from_millis(3)).await;
    }
    assert_eq!(peer.lane.status().end, None);
    assert!(!writing.is_finished());
}

#[tokio::test]
async fn a_drain_ends_in_time_though_nothing_can_be_written() {
    let mut settings =
        LaneSettings { close_timeout: Duration::from_millis(100), ..LaneSettings::default() };
    settings.protocol.ping = 40_000;
    let wide = Frame::Hello(Hello { window: WINDOW_MAX, ..Hello::default() });
    let peer = Peer::new(&settings, &masked(Opcode::Binary, &message(&wide))).await;
    let mut opened = peer.lane.open(&request(false)).unwrap();
    let writing = tokio::spawn(async move {
        while opened.request.write(vec![7; 1 << 20].into()).await.is_ok() {}
        opened.request.ended().await
    });
    let mut sent = 0;
    // The socket takes no more.
    while sent == 0 || sent < peer.lane.numbers().bytes_sent {
        sent = peer.lane.numbers().bytes_sent;
        settle().await;
    }
    peer.lane.drain(Code::Restarting, Micros(50_000));
    assert_eq!(within(writing).await.unwrap(), End::LaneLost { not_dispatched: false });
    // The close frame cannot be written either.
    assert_eq!(within(peer.task).await.unwrap(), LaneEnd::Drained(Code::Restarting));
}

#[tokio::test]
async fn a_close_frame_is_not_overtaken_by_a_reset_of_the_socket() {
    let mut peer = Peer::ready(&LaneSettings::default()).await;
    let late = masked(Opcode::Binary, &vec![0; 50_000]);
    // A ping behind the end is not answered.
    let ping = masked(Opcode::Ping, b"");
    let bytes = [&masked(Opcode::Text, b"{}")[..], &ping, &late, &late, &late, &late].concat();
    peer.socket.write_all(&bytes).await.unwrap();
    assert_eq!(within(peer.lane.ended()).await, LaneEnd::Text);
    peer.socket.write_all(&late).await.unwrap();
    assert_eq!(peer.ends_closed().await, (1002, "protocol".into(), LaneEnd::Text));
}

#[tokio::test]
async fn a_peer_that_does_not_close_is_left() {
    let settings =
        LaneSettings { close_timeout: Duration::from_millis(100), ..LaneSettings::default() };
    let mut peer = Peer::ready(&settings).await;
    peer.says(Opcode::Text, b"{}").await;
    assert_eq!(within(peer.task).await.unwrap(), LaneEnd::Text);
}

#[tokio::test]
async fn an_acceptor_that_waits_learns_of_the_end() {
    let mut pair = Pair::new().await;
    let waiting = tokio::spawn(async move { pair.acceptor.accept().await.is_none() });
    until("the acceptor waits", || pair.agent.status().peer.is_some()).await;
    pair.tasks[0].abort();
    assert!(within(waiting).await.unwrap());
}

#[tokio::test]
async fn websocket_pings_are_answered_and_a_close_frame_is_echoed() {
    let settings = LaneSettings { close_timeout: 2 * PATIENCE, ..LaneSettings::default() };
    let mut peer = Peer::ready(&settings).await;
    peer.says(Opcode::Pong, b"").await;
    peer.says(Opcode::Ping, b"payload").await;
    assert_eq!(peer.hears_control().await, (Opcode::Pong, b"payload".to_vec()));
    let code = 1001_u16.to_be_bytes();
    peer.says(Opcode::Close, &code).await;
    assert_eq!(peer.hears_control().await, (Opcode::Close, code.to_vec()));
    // The peer's socket is still open.
    assert_eq!(within(peer.task).await.unwrap(), LaneEnd::Closed(1001));
}

#[tokio::test]
async fn a_message_in_any_pieces_is_one_message() {
    let mut peer = Peer::ready(&LaneSettings::default()).await;
    let mut opened = peer.lane.open(&request(true)).unwrap();
    let number = peer.hears_open().await;
    let mut answer = message(&Frame::Stream(number, StreamFrame::Head(head(200, false))));
    let data = Data { bytes: b"body", flag: DataFlag::End };
    answer.extend(message(&Frame::Stream(number, StreamFrame::Data(data))));
    for byte in masked(Opcode::Binary, &answer) {
        peer.socket.write_all(&[byte]).await.unwrap();
        tokio::task::yield_now().await;
    }
    assert_eq!(within(opened.answer.head()).await.unwrap().status, 200);
    assert_eq!(read_all(&mut opened.answer).await.unwrap().0, b"body");
}

#[tokio::test]
async fn a_lost_socket_ends_each_stream_and_tells_which_were_dispatched() {
    let mut pair = Pair::new().await;
    let (mut dispatched, mut accepted) = pair.stream(false).await;
    let (mut complete, mut answered) = pair.stream(true).await;
    answered.answer.send_head(&head(200, false)).unwrap();
    answered.answer.put(Bytes::from_static(b"whole")).unwrap();
    answered.answer.finish().unwrap();
    assert_eq!(within(complete.request.ended()).await, End::Complete);
    // The driver does not run between this and its end.
    let mut unsent = pair.open(true);
    pair.tasks[0].abort();
    assert!(within(&mut pair.tasks[0]).await.is_err());
    let lost = |not_dispatched| End::LaneLost { not_dispatched };
    assert_eq!(within(dispatched.answer.head()).await, Err(lost(false)));
    assert_eq!(within(dispatched.request.gone()).await, WriteError::Ended(lost(false)));
    assert_eq!(within(unsent.answer.head()).await, Err(lost(true)));
    assert_eq!(within(unsent.request.ended()).await, lost(true));
    // Bytes of a complete stream are still there.
    assert_eq!(within(complete.answer.head()).await.unwrap().status, 200);
    assert_eq!(read_all(&mut complete.answer).await.unwrap().0, b"whole");

    assert_eq!(within(pair.agent.ended()).await, LaneEnd::Left);
    assert_eq!(within(accepted.body.read()).await, Err(lost(false)));
    assert_eq!(within(accepted.answer.gone()).await, WriteError::Ended(lost(false)));
    assert_eq!(answered.body.read().await, Ok(Received::End));
    assert!(within(pair.acceptor.accept()).await.is_none());
    let version = pair.agent.status().version;
    pair.agent.drain(Code::Restarting, Micros(0));
    assert_eq!(pair.agent.status().version, version);
    assert_eq!(pair.gateway.status().end, Some(LaneEnd::Dropped));
    assert!(pair.gateway.open(&request(true)).is_err());
    drop((dispatched, complete, unsent, accepted, answered));
    pair.is_empty().await;
}
