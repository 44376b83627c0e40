//! Lanes that end politely: GOAWAY, a drain with its time, and handles that are dropped.

use bytes::Bytes;
use wsproxy_conn::{
    clock::Micros,
    lane::{LaneEnd, LaneSettings},
};
use wsproxy_proto::tunnel::{
    code::Code,
    event::End,
    frame::{GoAway, Health, Open},
    lane::OpenError,
};

use super::{
    pair::{Pair, head, read_all, request, within},
    peer::Peer,
};
use crate::support::until;

#[tokio::test]
async fn a_gateway_drains_after_its_streams() {
    let mut pair = Pair::new().await;
    let (mut opened, mut accepted) = pair.stream(true).await;
    pair.gateway.drain(Code::Restarting, MINUTE);
    assert_eq!(pair.gateway.open(&request(true)).unwrap_err(), OpenError::Draining);
    let go_away = within(pair.agent.going_away()).await.unwrap();
    let expected = GoAway { last_stream: 1, code: Code::Restarting, drain_ms: 60_000 };
    assert_eq!(go_away, expected);
    accepted.answer.send_head(&head(200, false)).unwrap();
    accepted.answer.put(Bytes::from_static(b"late")).unwrap();
    accepted.answer.finish().unwrap();
    assert_eq!(within(opened.answer.head()).await.unwrap().status, 200);
    assert!(pair.gateway.status().end.is_none() && pair.gateway.status().is_draining);
    assert_eq!(read_all(&mut opened.answer).await.unwrap().0, b"late");
    let expected = [LaneEnd::Drained(Code::Restarting), LaneEnd::GoneAway(Code::Restarting)];
    assert_eq!(pair.ends().await, expected);
    pair.is_empty().await;
}

#[tokio::test]
async fn a_drain_ends_in_time_with_its_streams() {
    let mut settings = LaneSettings::default();
    settings.protocol.ping = 40_000;
    let mut pair = Pair::with(&settings).await;
    let (mut opened, mut accepted) = pair.stream(true).await;
    pair.gateway.drain(Code::Superseded, Micros(50_000));
    // A later wish does not give the streams more time.
    pair.gateway.drain(Code::Superseded, MINUTE);
    let lost = End::LaneLost { not_dispatched: false };
    assert_eq!(within(opened.answer.head()).await, Err(lost.clone()));
    assert_eq!(within(accepted.answer.ended()).await, lost);
    let expected = [LaneEnd::Drained(Code::Superseded), LaneEnd::GoneAway(Code::Superseded)];
    assert_eq!(pair.ends().await, expected);
}

#[tokio::test]
async fn a_superseded_agent_is_closed_as_replaced() {
    let peer = Peer::ready(&LaneSettings::default()).await;
    peer.lane.drain(Code::Superseded, MINUTE);
    let closed = peer.ends_closed().await;
    assert_eq!(closed, (4001, "replaced".into(), LaneEnd::Drained(Code::Superseded)));
}

#[tokio::test]
async fn streams_above_an_agents_goaway_were_not_dispatched() {
    let mut pair = Pair::new().await;
    let (opened, mut accepted) = pair.stream(true).await;
    pair.agent.drain(Code::Restarting, MINUTE);
    // GOAWAY is on its way when the gateway opens this stream.
    let mut above = pair.open(false);
    assert_eq!(within(above.answer.head()).await, Err(End::GoneAway(Code::Restarting)));
    assert!(within(above.request.ended()).await.is_not_dispatched());
    assert_eq!(pair.gateway.open(&request(true)).unwrap_err(), OpenError::Draining);
    accepted.answer.send_head(&head(204, true)).unwrap();
    let expected = [LaneEnd::GoneAway(Code::Restarting), LaneEnd::Drained(Code::Restarting)];
    assert_eq!(pair.ends().await, expected);
    drop((opened, above, accepted));
    pair.is_empty().await;
}

#[tokio::test]
async fn an_acceptor_that_is_dropped_refuses_its_streams() {
    let pair = Pair::new().await;
    let mut opened = pair.open(true);
    until("OPEN has come", || pair.agent.numbers().streams == 1).await;
    let Pair { acceptor, gateway, tasks: [ours, theirs], .. } = pair;
    drop(acceptor);
    let end = within(opened.answer.head()).await.unwrap_err();
    assert!(matches!(&end, End::Reset(reset) if reset.code == Code::Refused), "{end:?}");
    assert!(end.is_not_dispatched());
    drop(opened);
    assert_eq!(within(theirs).await.unwrap(), LaneEnd::Drained(Code::Restarting));
    assert_eq!(within(ours).await.unwrap(), LaneEnd::GoneAway(Code::Restarting));
    assert_eq!(gateway.numbers().streams, 0);
}

#[tokio::test]
async fn dropping_every_handle_ends_the_tasks() {
    let mut pair = Pair::new().await;
    let (opened, accepted) = pair.stream(true).await;
    let Pair { gateway, agent, acceptor, tasks: [ours, theirs], memories } = pair;
    drop((gateway.clone(), gateway));
    drop((opened, accepted, agent));
    assert_eq!(within(ours).await.unwrap(), LaneEnd::Drained(Code::Restarting));
    assert_eq!(within(theirs).await.unwrap(), LaneEnd::GoneAway(Code::Restarting));
    drop(acceptor);
    assert!(memories.iter().all(|memory| memory.streams() == 0));
}

#[tokio::test]
async fn health_of_an_agent_reaches_the_gateway() {
    let pair = Pair::new().await;
    let seen = pair.gateway.status();
    assert_eq!(seen.health, None);
    let health = Health {
        upstream_ok: true,
        upstream_round_trip_us: 250,
        streams: 3,
        memory_bytes: 1 << 30,
        disk_free_bytes: 1 << 40,
        text: "fine",
    };
    pair.agent.set_health(&health);
    let status = within(pair.gateway.changed(seen.version)).await;
    let heard = status.health.unwrap();
    assert_eq!(
        (heard.upstream_ok, heard.upstream_round_trip_us, &*heard.text),
        (true, 250, "fine")
    );
}

#[tokio::test]
async fn the_last_stream_number_drains_the_lane() {
    let mut settings = LaneSettings::default();
    settings.protocol.first_stream = (1 << 31) - 1;
    let mut pair = Pair::with(&settings).await;
    let (mut opened, mut accepted) = pair.stream(true).await;
    assert_eq!(within(pair.agent.going_away()).await.unwrap().code, Code::Restarting);
    let again = Open { retried: true, ..request(true) };
    assert_eq!(pair.gateway.open(&again).unwrap_err(), OpenError::Draining);
    accepted.answer.send_head(&head(204, true)).unwrap();
    assert_eq!(within(opened.answer.head()).await.unwrap().status, 204);
    drop((opened, accepted));
    let expected = [LaneEnd::Drained(Code::Restarting), LaneEnd::GoneAway(Code::Restarting)];
    assert_eq!(pair.ends().await, expected);
    pair.is_empty().await;
}

const MINUTE: Micros = Micros(60_000_000);
