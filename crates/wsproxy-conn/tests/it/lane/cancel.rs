//! Streams that one side gives up, in each state: the other side learns of it, and nothing is left.

use bytes::Bytes;
use wsproxy_conn::lane::{AcceptedStream, OpenedStream, Received, WriteError};
use wsproxy_proto::tunnel::{
    code::Code,
    event::{End, ResetByPeer},
    frame::{Open, Reset},
};

use super::pair::{Pair, head, read_all, read_some, request, within};
use crate::support::until;

fn code(end: &End) -> Code {
    match end {
        End::Reset(reset) => reset.code,
        other => panic!("{other:?}"),
    }
}

fn ended(error: &WriteError) -> Code {
    match error {
        WriteError::Ended(end) => code(end),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_stream_that_is_not_accepted_yet_is_cancelled() {
    let mut pair = Pair::new().await;
    let opened = pair.open(true);
    until("OPEN has come", || pair.agent.numbers().streams == 1).await;
    drop(opened);
    pair.is_empty().await;
    let (_opened, accepted) = pair.stream(true).await;
    assert_eq!(accepted.answer.number(), 3, "the cancelled stream was accepted");
}

#[tokio::test]
async fn a_client_that_leaves_before_the_head_cancels() {
    let mut pair = Pair::new().await;
    for part in 0..2 {
        let (opened, mut accepted) = pair.stream(false).await;
        // Either half of the stream.
        let OpenedStream { mut request, mut answer } = opened;
        if part == 0 {
            drop(answer);
            let error = within(request.gone()).await;
            assert_eq!(error, WriteError::Ended(End::ResetHere(Code::Cancelled)));
            assert_eq!(request.put(Bytes::from_static(b"x")), Err(error));
        } else {
            drop(request);
            let error = within(answer.head()).await.unwrap_err();
            assert_eq!(error, End::ResetHere(Code::Cancelled));
            assert_eq!(within(answer.read()).await, Err(error));
        }
        assert_eq!(ended(&within(accepted.answer.gone()).await), Code::Cancelled);
        assert_eq!(code(&within(accepted.body.read()).await.unwrap_err()), Code::Cancelled);
        let sent = accepted.answer.send_head(&head(200, true));
        assert_eq!(ended(&sent.unwrap_err()), Code::Cancelled);
        pair.is_empty().await;
    }
}

#[tokio::test]
async fn a_client_that_leaves_wakes_a_writer_without_credit() {
    let mut pair = Pair::new().await;
    let (mut opened, mut accepted) = pair.stream(true).await;
    accepted.answer.send_head(&head(200, false)).unwrap();
    let writing = tokio::spawn(async move { accepted.answer.write(vec![7; 300_000].into()).await });
    assert_eq!(within(opened.answer.head()).await.unwrap().status, 200);
    read_some(&mut opened.answer, 20_000).await;
    until("the window is full", || pair.gateway.numbers().buffered_bytes >= 16 << 10).await;
    drop(opened);
    assert_eq!(ended(&within(writing).await.unwrap().unwrap_err()), Code::Cancelled);
    pair.is_empty().await;
}

#[tokio::test]
async fn a_client_that_leaves_ends_a_slow_upload() {
    let mut pair = Pair::new().await;
    let (mut opened, mut accepted) = pair.stream(false).await;
    opened.request.put(Bytes::from_static(b"part")).unwrap();
    assert_eq!(read_some(&mut accepted.body, 4).await, b"part");
    let (read, ()) = tokio::join!(within(accepted.body.read()), async { drop(opened) });
    assert_eq!(code(&read.unwrap_err()), Code::Cancelled);
    drop(accepted);
    pair.is_empty().await;
}

#[tokio::test]
async fn a_client_that_leaves_an_upgraded_stream_ends_both_directions() {
    let mut pair = Pair::new().await;
    let mut opened = pair.gateway.open(&Open { upgrade: true, ..request(false) }).unwrap();
    let mut accepted = pair.accept().await;
    accepted.answer.send_head(&head(101, false)).unwrap();
    assert_eq!(within(opened.answer.head()).await.unwrap().status, 101);
    drop(opened.answer);
    assert_eq!(ended(&within(accepted.answer.gone()).await), Code::Cancelled);
    assert_eq!(code(&within(accepted.body.read()).await.unwrap_err()), Code::Cancelled);
    drop((opened.request, accepted));
    pair.is_empty().await;
}

#[tokio::test]
async fn an_agent_that_gives_up_breaks_the_answer() {
    let mut pair = Pair::new().await;
    for has_head in [false, true] {
        let (mut opened, mut accepted) = pair.stream(true).await;
        if has_head {
            accepted.answer.send_head(&head(200, false)).unwrap();
            accepted.answer.put(Bytes::from_static(b"part")).unwrap();
            assert_eq!(within(opened.answer.head()).await.unwrap().status, 200);
            assert_eq!(read_some(&mut opened.answer, 4).await, b"part");
        }
        drop(accepted.answer);
        let end = if has_head {
            within(opened.answer.read()).await.unwrap_err()
        } else {
            within(opened.answer.head()).await.unwrap_err()
        };
        let End::Reset(reset) = end else { panic!("{end:?}") };
        assert_eq!((reset.code, reset.head_sent), (Code::Cancelled, has_head));
        assert!(!reset.not_dispatched);
    }
    pair.is_empty().await;
}

#[tokio::test]
async fn an_agents_reason_reaches_the_gateway() {
    let mut pair = Pair::new().await;
    let (mut opened, accepted) = pair.stream(true).await;
    let reset = Reset {
        not_dispatched: true,
        retry_after_ms: 1500,
        message: "connection refused",
        ..Reset::new(Code::UpstreamConnect)
    };
    let AcceptedStream { answer, mut body, .. } = accepted;
    answer.reset(&reset);
    let expected = End::Reset(ResetByPeer {
        code: Code::UpstreamConnect,
        not_dispatched: true,
        head_sent: false,
        retry_after_ms: 1500,
        message: "connection refused".into(),
    });
    assert_eq!(within(opened.answer.head()).await, Err(expected));
    // The body of the request was whole.
    assert_eq!(within(body.read()).await, Ok(Received::End));
    drop((opened, body));
    pair.is_empty().await;
}

#[tokio::test]
async fn an_early_answer_stops_the_upload_and_is_whole() {
    let mut pair = Pair::new().await;
    let (mut opened, mut accepted) = pair.stream(false).await;
    accepted.answer.send_head(&head(413, false)).unwrap();
    accepted.answer.put(Bytes::from_static(b"too large")).unwrap();
    accepted.answer.finish().unwrap();
    let uploading = tokio::spawn(async move {
        let written = opened.request.write(vec![7; 300_000].into()).await;
        assert_eq!(opened.request.put(Bytes::from_static(b"x")), written);
        written
    });
    read_some(&mut accepted.body, 10_000).await;
    drop(accepted.body);
    assert_eq!(within(uploading).await.unwrap(), Err(WriteError::Stopped));
    assert_eq!(within(opened.answer.head()).await.unwrap().status, 413);
    assert_eq!(read_all(&mut opened.answer).await.unwrap().0, b"too large");
    assert_eq!(within(accepted.answer.ended()).await, End::Complete);
    pair.is_empty().await;
}

#[tokio::test]
async fn a_stop_wakes_a_writer_with_nothing_to_write() {
    let mut pair = Pair::new().await;
    let (mut opened, mut accepted) = pair.stream(false).await;
    let waiting = tokio::spawn(async move {
        let gone = opened.request.gone().await;
        (gone, opened)
    });
    drop(accepted.body);
    let (gone, mut opened) = within(waiting).await.unwrap();
    assert_eq!(gone, WriteError::Stopped);
    assert_eq!(opened.request.finish(), Err(WriteError::Stopped));
    drop(opened.request);
    accepted.answer.send_head(&head(200, true)).unwrap();
    assert_eq!(within(opened.answer.head()).await.unwrap().status, 200);
    pair.is_empty().await;
}

#[tokio::test]
async fn a_slow_reader_can_be_reset_for_its_place() {
    let mut pair = Pair::new().await;
    let (mut opened, mut accepted) = pair.stream(true).await;
    accepted.answer.send_head(&head(200, false)).unwrap();
    accepted.answer.put(vec![7; 100_000].into()).unwrap();
    assert_eq!(within(opened.answer.head()).await.unwrap().status, 200);
    until("bytes wait", || pair.gateway.slowest().is_some()).await;
    let (number, _) = pair.gateway.slowest().unwrap();
    pair.gateway.reset(number, &Reset::new(Code::SlowReader));
    assert_eq!(within(opened.answer.read()).await, Err(End::ResetHere(Code::SlowReader)));
    assert_eq!(ended(&within(accepted.answer.gone()).await), Code::SlowReader);
    pair.is_empty().await;
}
