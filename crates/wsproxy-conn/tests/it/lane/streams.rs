//! Streams of two lanes: bytes both ways, heads, trailers, half-closed streams, and readers that stall.

use bytes::Bytes;
use rustls::crypto::aws_lc_rs;
use wsproxy_conn::{
    Socket,
    lane::{AcceptedStream, LaneSettings, OpenedStream, Received, WriteError},
    socket::tls::TlsSocket,
};
use wsproxy_proto::tunnel::{event::End, frame::Open, headers::HeaderBlock, lane::OpenError};

use super::{
    pair::{Pair, Random, head, read_all, read_some, request, tcp, within, write_all},
    peer::Peer,
};
use crate::{dial::tls_with, support::until};

/// Request, answer, and whether the answer has trailers.
#[derive(Clone)]
struct Bodies(Bytes, Bytes, bool);

/// Exchanges bodies of random lengths on several streams at once.
async fn exchange(mut pair: Pair, length_max: usize) {
    let mut tasks = Vec::new();
    for seed in 1..=8 {
        let (opened, accepted) = pair.stream(false).await;
        let mut random = Random(seed);
        let [up, down] = [(); 2].map(|()| {
            let length = random.below(length_max);
            random.body(length)
        });
        let bodies = Bodies(up, down, seed % 2 == 0);
        tasks.push(tokio::spawn(ask(opened, bodies.clone(), Random(seed + 100))));
        tasks.push(tokio::spawn(answer(accepted, bodies, Random(seed + 200))));
    }
    for task in tasks {
        task.await.unwrap();
    }
    pair.is_empty().await;
}

async fn ask(stream: OpenedStream, bodies: Bodies, mut random: Random) {
    let (OpenedStream { mut request, mut answer }, Bodies(up, down, has_trailers)) =
        (stream, bodies);
    let upload = async {
        write_all(&mut request, up, &mut random).await.unwrap();
        request.finish().unwrap();
        assert_eq!(within(request.ended()).await, End::Complete);
    };
    let download = async {
        assert_eq!(within(answer.head()).await.unwrap().status, 200);
        let (body, trailers) = read_all(&mut answer).await.unwrap();
        assert!(body == down && trailers == has_trailers, "the answer is another one");
        assert_eq!(answer.read().await, Ok(Received::End));
    };
    tokio::join!(upload, download);
}

async fn answer(stream: AcceptedStream, bodies: Bodies, mut random: Random) {
    let (AcceptedStream { request, mut body, mut answer }, Bodies(up, down, has_trailers)) =
        (stream, bodies);
    assert_eq!((&request.method[..], &request.path[..]), (&b"POST"[..], &b"/path?query"[..]));
    answer.send_head(&head(200, false)).unwrap();
    let upload = async {
        let (body, trailers) = read_all(&mut body).await.unwrap();
        assert!(body == up && !trailers, "the request is another one");
    };
    let download = async {
        write_all(&mut answer, down, &mut random).await.unwrap();
        let mut trailers = HeaderBlock::new();
        trailers.push(b"x-sum", b"1").unwrap();
        if has_trailers {
            answer.finish_with_trailers(trailers.headers()).unwrap();
        } else {
            answer.finish().unwrap();
        }
        assert_eq!(within(answer.ended()).await, End::Complete);
    };
    tokio::join!(upload, download);
}

#[tokio::test]
async fn bodies_arrive_whole_on_one_thread() {
    exchange(Pair::new().await, 400_000).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bodies_arrive_whole_on_two_threads() {
    exchange(Pair::new().await, 400_000).await;
}

#[tokio::test]
async fn bodies_arrive_whole_over_tls() {
    let (server, client) = tls_with("gateway.test", aws_lc_rs::default_provider());
    let (ours, theirs) = tcp().await;
    let ours = TlsSocket::server(ours, server);
    let theirs = TlsSocket::client(theirs, client, "gateway.test".try_into().unwrap());
    let (ours, theirs) = tokio::join!(ours, theirs);
    let (ours, theirs): (Socket, Socket) = (ours.unwrap().into(), theirs.unwrap().into());
    exchange(Pair::over(ours, theirs, &LaneSettings::default()).await, 200_000).await;
}

#[tokio::test]
async fn bodies_arrive_whole_over_unix_sockets() {
    let (ours, theirs) = tokio::net::UnixStream::pair().unwrap();
    let pair = Pair::over(ours.into(), theirs.into(), &LaneSettings::default()).await;
    exchange(pair, 200_000).await;
}

#[tokio::test]
async fn a_head_with_status_100_comes_before_the_final_one() {
    let mut pair = Pair::new().await;
    let (mut opened, mut accepted) = pair.stream(false).await;
    accepted.answer.send_head(&head(100, false)).unwrap();
    assert_eq!(within(opened.answer.head()).await.unwrap().status, 100);
    opened.request.put(Bytes::from_static(b"body")).unwrap();
    opened.request.finish().unwrap();
    assert_eq!(read_all(&mut accepted.body).await.unwrap().0, b"body");
    accepted.answer.send_head(&head(204, true)).unwrap();
    assert_eq!(within(opened.answer.head()).await.unwrap().status, 204);
    assert_eq!(read_all(&mut opened.answer).await.unwrap(), (Vec::new(), false));
    pair.is_empty().await;
}

#[tokio::test]
async fn an_answer_without_a_body_leaves_the_upload_alone() {
    let mut pair = Pair::new().await;
    let (OpenedStream { mut request, mut answer }, accepted) = pair.stream(false).await;
    let AcceptedStream { mut body, answer: mut writer, .. } = accepted;
    writer.send_head(&head(200, true)).unwrap();
    drop(writer);
    assert_eq!(within(answer.head()).await.unwrap().status, 200);
    drop(answer);
    let long = Random(1).body(200_000);
    let sent = long.clone();
    let uploading = async {
        write_all(&mut request, sent, &mut Random(2)).await.unwrap();
        request.finish().unwrap();
        within(request.ended()).await
    };
    let (end, read) = tokio::join!(uploading, read_all(&mut body));
    assert_eq!(end, End::Complete);
    assert!(read.unwrap().0 == long);
    drop((request, body));
    pair.is_empty().await;
}

#[tokio::test]
async fn the_body_of_a_head_that_was_not_looked_at_is_empty() {
    let mut pair = Pair::new().await;
    let (mut opened, mut accepted) = pair.stream(true).await;
    let reading = tokio::spawn(async move { opened.answer.read().await });
    accepted.answer.send_head(&head(204, true)).unwrap();
    assert_eq!(within(reading).await.unwrap(), Ok(Received::End));
    pair.is_empty().await;
}

#[tokio::test]
async fn calls_out_of_order_change_nothing() {
    let mut pair = Pair::new().await;
    let (mut opened, mut accepted) = pair.stream(true).await;
    assert_eq!(accepted.body.read().await, Ok(Received::End));
    assert_eq!(opened.request.finish(), Err(WriteError::Order));
    assert_eq!(accepted.answer.ready().await, Ok(()));
    assert_eq!(accepted.answer.put(Bytes::from_static(b"x")), Err(WriteError::Order));
    assert_eq!(opened.request.send_head(&head(200, false)), Err(WriteError::Order));
    accepted.answer.send_head(&head(200, false)).unwrap();
    assert_eq!(accepted.answer.send_head(&head(200, false)), Err(WriteError::Order));
    accepted.answer.put(vec![1; 100_000].into()).unwrap();
    assert_eq!(accepted.answer.put(Bytes::from_static(b"x")), Err(WriteError::Order));
    assert_eq!(accepted.answer.finish(), Err(WriteError::Order));
    let taken = tokio::join!(read_some(&mut opened.answer, 100_000), accepted.answer.ready());
    assert!(taken.0 == vec![1; 100_000] && taken.1.is_ok());
    accepted.answer.finish().unwrap();
    assert_eq!(read_all(&mut opened.answer).await.unwrap().0, b"");
    pair.is_empty().await;
}

#[tokio::test]
async fn an_upgraded_stream_is_half_closed_both_ways() {
    for gateway_first in [true, false] {
        let mut pair = Pair::new().await;
        let open = Open { upgrade: true, ..request(false) };
        let OpenedStream { request: mut up, answer: mut down } = pair.gateway.open(&open).unwrap();
        // Bytes right behind either head.
        up.put(Bytes::from_static(b"early")).unwrap();
        let AcceptedStream { request, mut body, mut answer } = pair.accept().await;
        assert!(request.upgrade);
        answer.send_head(&head(101, false)).unwrap();
        answer.put(Bytes::from_static(b"hello")).unwrap();
        assert_eq!(read_some(&mut body, 5).await, b"early");
        assert_eq!(within(down.head()).await.unwrap().status, 101);
        assert_eq!(read_some(&mut down, 5).await, b"hello");
        let ((first, first_end), (second, second_end)) = if gateway_first {
            ((&mut up, &mut body), (&mut answer, &mut down))
        } else {
            ((&mut answer, &mut down), (&mut up, &mut body))
        };
        first.finish().unwrap();
        assert_eq!(within(first_end.read()).await, Ok(Received::End));
        for _ in 0..3 {
            second.put(Bytes::from_static(b"more")).unwrap();
            assert_eq!(read_some(second_end, 4).await, b"more");
        }
        second.finish().unwrap();
        assert_eq!(within(second_end.read()).await, Ok(Received::End));
        assert_eq!(within(first.ended()).await, End::Complete);
        assert_eq!(within(second.ended()).await, End::Complete);
        pair.is_empty().await;
    }
}

#[tokio::test]
async fn a_stalled_reader_does_not_stop_a_fast_one() {
    let mut pair = Pair::new().await;
    let (mut stalled, mut accepted) = pair.stream(true).await;
    accepted.answer.send_head(&head(200, false)).unwrap();
    let long = Random(1).body(600_000);
    let sent = long.clone();
    let writing = tokio::spawn(async move {
        write_all(&mut accepted.answer, sent, &mut Random(2)).await.unwrap();
        accepted.answer.finish().unwrap();
    });
    within(stalled.answer.head()).await.unwrap();
    let (mut fast, mut accepted) = pair.stream(true).await;
    accepted.answer.send_head(&head(200, false)).unwrap();
    let body = Random(3).body(3_000_000);
    let (sent, mut random) = (body.clone(), Random(4));
    let upload = async {
        write_all(&mut accepted.answer, sent, &mut random).await.unwrap();
        accepted.answer.finish().unwrap();
    };
    let (_, read) = tokio::join!(upload, read_all(&mut fast.answer));
    assert!(read.unwrap().0 == body);
    // The stalled stream holds its window at one side, and its queue at the other.
    until("the window is full", || pair.gateway.numbers().buffered_bytes >= 32 << 10).await;
    assert!(pair.gateway.numbers().buffered_bytes <= 48 << 10);
    assert!(pair.agent.numbers().buffered_bytes <= 32 << 10);
    assert!(!writing.is_finished());
    let slowest = pair.gateway.slowest().map(|(number, _)| number);
    assert_eq!(slowest, Some(stalled.answer.number()));
    assert!(read_all(&mut stalled.answer).await.unwrap().0 == long);
    writing.await.unwrap();
    pair.is_empty().await;
}

#[tokio::test]
async fn a_full_lane_opens_no_stream() {
    let mut settings = LaneSettings::default();
    settings.protocol.streams_max = 3;
    let mut pair = Pair::with(&settings).await;
    let mut opened: Vec<_> = (0..3).map(|_| pair.open(true)).collect();
    assert_eq!(pair.gateway.open(&request(true)).unwrap_err(), OpenError::Full);
    assert_eq!(pair.agent.open(&request(true)).unwrap_err(), OpenError::NotReady);
    let mut accepted = pair.accept().await;
    accepted.answer.send_head(&head(200, true)).unwrap();
    assert_eq!(within(opened[0].answer.head()).await.unwrap().status, 200);
    opened.push(pair.open(true));
    drop((opened, accepted));
    pair.is_empty().await;
}

#[tokio::test]
async fn frames_of_several_streams_are_gathered_in_one_message() {
    let mut peer = Peer::ready(&LaneSettings::default()).await;
    let mut streams = Vec::new();
    for _ in 0..3 {
        streams.push(peer.lane.open(&request(true)).unwrap());
        // With few streams, each frame goes at once.
        assert_eq!(peer.hears_opens(1).await, [1]);
    }
    for _ in 0..3 {
        streams.push(peer.lane.open(&request(true)).unwrap());
        // The lane's task runs, and then this one.
        tokio::task::yield_now().await;
        streams.push(peer.lane.open(&request(true)).unwrap());
        assert_eq!(peer.hears_opens(2).await, [2]);
    }
}
