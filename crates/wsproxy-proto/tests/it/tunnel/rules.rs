//! Rule by rule: a lane beside a peer that keeps or breaks them.

use bytes::Bytes;
use wsproxy_proto::tunnel::{
    WINDOW_MAX,
    code::Code,
    event::{End, Event},
    frame::{DataFlag, Frame, GoAway, Health, Open, Pong, Reset, StreamFrame},
    headers::{HeaderBlock, Headers},
    hello::Hello,
    lane::{Lane, LaneConfig, LaneError, OpenError, Role, SendError, Taken},
    memory::MemoryLimits,
};

use super::{
    pair::request,
    peer::{Said, Tested, head, memory},
};

#[test]
fn hello_comes_first_and_once() {
    let ping = Frame::Ping(1);
    let newer = Frame::Hello(Hello { versions: (2, 2), ..Hello::default() });
    for first in [ping, newer] {
        let lane = Lane::new(Role::Agent, LaneConfig::default(), memory(1 << 20), 0);
        let mut tested = Tested { lane, now: 0 };
        assert!(matches!(tested.say(first), Err(LaneError::Order(_))));
        assert!(tested.lane.is_over());
    }
    let mut tested = Tested::new(Role::Agent);
    assert!(matches!(tested.say(Frame::Hello(Hello::default())), Err(LaneError::Order(_))));
}

#[test]
fn no_stream_is_opened_before_hello() {
    let mut lane = Lane::new(Role::Gateway, LaneConfig::default(), memory(1 << 20), 0);
    assert_eq!(lane.open(0, &request()), Err(OpenError::NotReady));
    assert_eq!(Tested::new(Role::Agent).lane.open(0, &request()), Err(OpenError::NotReady));
}

#[test]
fn frames_of_the_wrong_side_or_of_no_stream_end_the_lane() {
    let health = Health {
        upstream_ok: true,
        upstream_round_trip_us: 0,
        streams: 0,
        memory_bytes: 0,
        disk_free_bytes: 0,
        text: "",
    };
    let open = StreamFrame::Open(request());
    let credit = StreamFrame::Credit(1);
    for (role, frame) in [
        (Role::Agent, Frame::Health(health)),
        (Role::Agent, Frame::Stream(1, StreamFrame::Head(head(200, true)))),
        (Role::Agent, Frame::Stream(2, open)),
        (Role::Agent, Frame::Stream(3, credit)),
        (Role::Agent, Frame::Stream(2, credit)),
        (Role::Gateway, Frame::Stream(1, open)),
        (Role::Gateway, Frame::Stream(3, credit)),
        // It is not written yet.
        (Role::Gateway, Frame::Stream(1, credit)),
    ] {
        let mut tested = Tested::new(role);
        if role == Role::Gateway {
            assert_eq!(tested.lane.open(0, &request()), Ok(1));
        } else {
            tested.say_of(1, StreamFrame::Open(Open { end: false, ..request() })).unwrap();
        }
        assert!(matches!(tested.say(frame), Err(LaneError::Order(_))), "{frame:?}");
    }
}

#[test]
fn numbers_of_streams_rise() {
    let mut tested = Tested::new(Role::Agent);
    tested.say_of(5, StreamFrame::Open(request())).unwrap();
    // The number was left out.
    tested.say_of(3, StreamFrame::Credit(1)).unwrap();
    for number in [5, 3] {
        let mut again = Tested::new(Role::Agent);
        again.say_of(5, StreamFrame::Open(request())).unwrap();
        let said = again.say_of(number, StreamFrame::Open(request()));
        assert!(matches!(said, Err(LaneError::Order(_))));
    }
}

#[test]
fn more_data_than_credit_ends_the_lane() {
    let mut tested = Tested::new(Role::Agent);
    tested.say_of(1, StreamFrame::Open(Open { end: false, ..request() })).unwrap();
    tested.data(1, &[0; 16 << 10], DataFlag::None).unwrap();
    tested.data(1, &[0; 16 << 10], DataFlag::None).unwrap();
    tested.events();
    assert_eq!(tested.data(1, &[0], DataFlag::None), Err(LaneError::FlowControl));
    let lost = End::LaneLost { not_dispatched: false };
    assert_eq!(tested.events(), [Event::Ended(1, lost)]);
    assert!(matches!(tested.lane.take(0, 1), Taken::Gone));
}

#[test]
fn more_credit_than_there_may_be_ends_the_lane() {
    let mut tested = Tested::new(Role::Agent);
    tested.say_of(1, StreamFrame::Open(request())).unwrap();
    let credit = StreamFrame::Credit(WINDOW_MAX);
    assert_eq!(tested.say_of(1, credit), Err(LaneError::FlowControl));
}

#[test]
fn streams_beyond_the_limit_are_refused_and_a_flood_ends_the_lane() {
    let config = LaneConfig { streams_max: 2, ..LaneConfig::default() };
    let mut tested = Tested::with(Role::Agent, config, MemoryLimits::default());
    for number in [1, 3, 5] {
        tested.say_of(number, StreamFrame::Open(Open { end: false, ..request() })).unwrap();
    }
    assert_eq!(tested.events().len(), 2);
    // Its body crossed the refusal.
    tested.data(5, b"1", DataFlag::End).unwrap();
    assert_eq!(tested.heard(), [Said::Reset(5, "refused", true, false, false)]);
    tested.say_of(7, StreamFrame::Open(request())).unwrap();
    tested.say_of(9, StreamFrame::Open(request())).unwrap();
    let said = tested.say_of(11, StreamFrame::Open(request()));
    assert!(matches!(said, Err(LaneError::Order(_))));
}

#[test]
fn a_full_process_takes_no_stream() {
    let limits = MemoryLimits { bytes_max: 64 << 10, ..MemoryLimits::default() };
    let mut agent = Tested::with(Role::Agent, LaneConfig::default(), limits);
    agent.say_of(1, StreamFrame::Open(Open { end: false, ..request() })).unwrap();
    agent.say_of(3, StreamFrame::Open(request())).unwrap();
    assert_eq!(agent.heard(), [Said::Reset(3, "overloaded", true, false, false)]);
    agent.data(1, b"1", DataFlag::None).unwrap();
    assert_eq!(agent.lane.slowest(), Some((1, 0)));
    agent.lane.reset(1, &Reset::new(Code::SlowReader));
    agent.say_of(5, StreamFrame::Open(request())).unwrap();
    assert!(matches!(agent.events()[..], [.., Event::Opened(5, _)]));
    assert_eq!(agent.heard(), [Said::Reset(1, "slow_reader", false, false, false)]);

    let mut gateway = Tested::with(Role::Gateway, LaneConfig::default(), limits);
    assert_eq!(gateway.lane.open(0, &request()), Ok(1));
    assert_eq!(gateway.lane.open(0, &request()), Err(OpenError::Overloaded));
    // Idle streams are no slow readers.
    assert_eq!(gateway.lane.slowest(), None);
}

#[test]
fn a_head_that_is_too_large_ends_its_stream_only() {
    let mut block = HeaderBlock::new();
    block.push(b"a", &[b'v'; 40_000]).unwrap();
    let open = Open { headers: block.headers(), ..request() };
    let mut agent = Tested::new(Role::Agent);
    agent.say_of(1, StreamFrame::Open(open)).unwrap();
    assert_eq!(agent.heard(), [Said::Reset(1, "head_too_large", true, false, false)]);
    agent.say_of(3, StreamFrame::Open(request())).unwrap();
    let large = wsproxy_proto::tunnel::frame::Head { headers: block.headers(), ..head(200, true) };
    assert_eq!(agent.lane.send_head(3, &large), Err(SendError::HeadTooLarge));
    assert_eq!(agent.lane.send_head(3, &head(502, true)), Ok(()));

    let mut gateway = Tested::new(Role::Gateway);
    assert_eq!(gateway.lane.open(0, &open), Err(OpenError::HeadTooLarge));
    assert_eq!(gateway.lane.open(0, &Open { path: b"", ..request() }), Err(OpenError::Invalid));
    assert_eq!(gateway.lane.open(0, &request()), Ok(1));
    gateway.heard();
    gateway.say_of(1, StreamFrame::Head(large)).unwrap();
    assert_eq!(gateway.events(), [Event::Ended(1, End::ResetHere(Code::HeadTooLarge))]);
    assert_eq!(gateway.heard(), [Said::Reset(1, "head_too_large", false, false, false)]);
    assert_eq!(gateway.lane.streams(), 0);
}

#[test]
fn an_end_wakes_its_consumer_while_the_other_direction_is_open() {
    let mut gateway = Tested::new(Role::Gateway);
    gateway.lane.open(0, &Open { end: false, ..request() }).unwrap();
    gateway.heard();
    gateway.say_of(1, StreamFrame::Head(head(200, false))).unwrap();
    assert!(matches!(gateway.events()[..], [Event::Answered(1, _)]));
    assert!(matches!(gateway.lane.take(0, 1), Taken::Pending));
    gateway.data(1, b"", DataFlag::End).unwrap();
    assert_eq!(gateway.events(), [Event::Readable(1)]);
    assert!(matches!(gateway.lane.take(0, 1), Taken::End));
    assert!(matches!(gateway.lane.take(0, 1), Taken::Gone));
    gateway.lane.finish(1).unwrap();
    assert_eq!(gateway.heard(), [Said::Data(1, 0, DataFlag::End)]);
    assert_eq!(gateway.events(), [Event::Ended(1, End::Complete)]);
    assert_eq!(gateway.lane.streams(), 0);
}

#[test]
fn an_early_answer_stops_the_body_of_the_request() {
    let mut agent = Tested::new(Role::Agent);
    agent.say_of(1, StreamFrame::Open(Open { end: false, ..request() })).unwrap();
    agent.data(1, b"12", DataFlag::None).unwrap();
    agent.events();
    agent.lane.send_head(1, &head(413, true)).unwrap();
    agent.lane.stop(1);
    assert_eq!(agent.lane.buffered_bytes(), 11);
    assert_eq!(agent.events(), []);
    let stop = Said::Reset(1, "none", false, false, true);
    assert_eq!(agent.heard(), [stop.clone(), Said::Head(1, 413)]);
    assert_eq!(agent.events(), [Event::Ended(1, End::Complete)]);
    agent.data(1, b"crossed", DataFlag::End).unwrap();

    let mut gateway = Tested::new(Role::Gateway);
    gateway.lane.open(0, &Open { end: false, ..request() }).unwrap();
    gateway.lane.put(1, &mut Bytes::from_static(b"body")).unwrap();
    // STOP cannot overtake OPEN.
    gateway.lane.stop(1);
    assert_eq!(gateway.heard(), [Said::Open(1), Said::Data(1, 4, DataFlag::None)]);
    assert_eq!(gateway.heard(), [stop]);
    let stop = Reset { stop: true, ..Reset::new(Code::None) };
    gateway.say_of(1, StreamFrame::Reset(stop)).unwrap();
    assert_eq!(gateway.events(), [Event::Stopped(1), Event::Ended(1, End::Complete)]);
    assert_eq!(gateway.lane.put(1, &mut Bytes::from_static(b"1")), Err(SendError::Gone));
}

#[test]
fn a_consumer_that_leaves_a_complete_stream_leaves_nothing() {
    let mut gateway = Tested::new(Role::Gateway);
    gateway.lane.open(0, &request()).unwrap();
    gateway.heard();
    gateway.say_of(1, StreamFrame::Head(head(200, false))).unwrap();
    gateway.data(1, b"body", DataFlag::End).unwrap();
    assert_eq!(gateway.events().last(), Some(&Event::Ended(1, End::Complete)));
    assert_eq!(gateway.lane.streams(), 1);
    gateway.lane.stop(1);
    assert_eq!((gateway.lane.streams(), gateway.events(), gateway.heard()), (0, vec![], vec![]));
}

#[test]
fn resets_that_cross_end_the_stream_once() {
    let mut agent = Tested::new(Role::Agent);
    agent.say_of(1, StreamFrame::Open(request())).unwrap();
    agent.lane.send_head(1, &head(200, false)).unwrap();
    agent.lane.put(1, &mut Bytes::from_static(b"1")).unwrap();
    agent.heard();
    agent.events();
    agent.lane.reset(1, &Reset::new(Code::UpstreamReset));
    agent.lane.reset(1, &Reset::new(Code::Cancelled));
    assert_eq!(agent.events(), [Event::Ended(1, End::ResetHere(Code::UpstreamReset))]);
    agent.say_of(1, StreamFrame::Reset(Reset::new(Code::Cancelled))).unwrap();
    assert_eq!((agent.events(), agent.heard(), agent.lane.streams()), (vec![], vec![], 0));

    agent.say_of(3, StreamFrame::Open(request())).unwrap();
    agent.lane.send_head(3, &head(200, false)).unwrap();
    agent.heard();
    agent.lane.reset(3, &Reset::new(Code::UpstreamReset));
    assert_eq!(agent.heard(), [Said::Reset(3, "upstream_reset", false, true, false)]);
}

#[test]
fn a_reset_is_never_a_clean_end() {
    let mut gateway = Tested::new(Role::Gateway);
    gateway.lane.open(0, &request()).unwrap();
    gateway.heard();
    gateway.say_of(1, StreamFrame::Head(head(200, false))).unwrap();
    gateway.data(1, b"half", DataFlag::None).unwrap();
    gateway.events();
    gateway.say_of(1, StreamFrame::Reset(Reset::new(Code::UpstreamReset))).unwrap();
    let events = gateway.events();
    assert!(matches!(&events[..], [Event::Ended(1, End::Reset(reset))]
        if reset.code == Code::UpstreamReset && !reset.not_dispatched));
    assert!(matches!(gateway.lane.take(0, 1), Taken::Gone));
    assert_eq!(gateway.lane.streams(), 0);
}

#[test]
fn a_cancelled_request_that_was_not_written_leaves_nothing() {
    let mut gateway = Tested::new(Role::Gateway);
    gateway.lane.open(0, &request()).unwrap();
    gateway.lane.reset(1, &Reset::new(Code::Cancelled));
    assert_eq!(gateway.events(), [Event::Ended(1, End::ResetHere(Code::Cancelled))]);
    assert_eq!((gateway.heard(), gateway.lane.streams()), (vec![], 0));
}

#[test]
fn a_lost_lane_says_what_was_not_dispatched_and_keeps_what_is_complete() {
    let mut gateway = Tested::new(Role::Gateway);
    gateway.lane.open(0, &request()).unwrap();
    gateway.lane.open(0, &request()).unwrap();
    gateway.heard();
    gateway.lane.open(0, &request()).unwrap();
    gateway.say_of(1, StreamFrame::Head(head(200, false))).unwrap();
    gateway.data(1, b"all", DataFlag::End).unwrap();
    gateway.events();
    gateway.lane.lost();
    let lost = |not_dispatched| End::LaneLost { not_dispatched };
    assert_eq!(gateway.events(), [Event::Ended(3, lost(false)), Event::Ended(5, lost(true))]);
    assert!(matches!(gateway.lane.take(0, 1), Taken::Bytes(chunk) if chunk.as_ref() == b"all"));
    assert!(matches!(gateway.lane.take(0, 1), Taken::End));
    assert_eq!((gateway.lane.streams(), gateway.heard()), (0, vec![]));
    assert_eq!(gateway.lane.open(0, &request()), Err(OpenError::Draining));
    assert_eq!(gateway.say(Frame::Ping(1)), Ok(()));
}

#[test]
fn goaway_ends_the_streams_that_were_not_accepted() {
    let mut gateway = Tested::new(Role::Gateway);
    for _ in 0..3 {
        gateway.lane.open(0, &request()).unwrap();
    }
    gateway.heard();
    let go_away = GoAway { last_stream: 3, code: Code::Restarting, drain_ms: 5 };
    gateway.say(Frame::GoAway(go_away)).unwrap();
    let gone = Event::Ended(5, End::GoneAway(Code::Restarting));
    assert_eq!(gateway.events(), [gone, Event::GoAway(go_away)]);
    assert!(End::GoneAway(Code::Restarting).is_not_dispatched());
    assert_eq!(gateway.lane.open(0, &request()), Err(OpenError::Draining));
    gateway.say_of(3, StreamFrame::Head(head(200, true))).unwrap();

    let mut agent = Tested::new(Role::Agent);
    agent.say_of(1, StreamFrame::Open(request())).unwrap();
    agent.lane.go_away(Code::Superseded, 5);
    // GOAWAY is not written yet.
    agent.say_of(3, StreamFrame::Open(request())).unwrap();
    assert_eq!(agent.events().len(), 2);
    let said = agent.heard();
    assert!(matches!(&said[..], [Said::Other(text)] if text.contains("last_stream: 3")));
    agent.say_of(5, StreamFrame::Open(Open { end: false, ..request() })).unwrap();
    agent.data(5, b"crossed", DataFlag::End).unwrap();
    assert_eq!((agent.events(), agent.heard(), agent.lane.streams()), (vec![], vec![], 2));
    agent.lane.go_away(Code::Restarting, 5);
    let said = agent.heard();
    assert!(matches!(&said[..], [Said::Other(text)] if text.contains("last_stream: 3")));
}

#[test]
fn pings_are_answered_once_and_measured_without_the_wait() {
    let mut tested = Tested::new(Role::Agent);
    tested.say(Frame::Ping(7)).unwrap();
    tested.now = 30;
    tested.say(Frame::Ping(8)).unwrap();
    tested.now = 50;
    let pong = Frame::Pong(Pong { number: 8, waited_us: 20 });
    assert_eq!(tested.heard(), [Said::Other(format!("{pong:?}"))]);

    assert_eq!(tested.lane.tick(10_000_000), Ok(()));
    assert_eq!(tested.heard(), [Said::Other("Ping(10000000)".to_owned())]);
    tested.now = 10_000_500;
    tested.say(Frame::Pong(Pong { number: 1, waited_us: 0 })).unwrap();
    tested.say(Frame::Pong(Pong { number: 10_000_000, waited_us: 100 })).unwrap();
    assert_eq!(tested.events(), [Event::RoundTrip { us: 400 }]);
}

#[test]
fn a_silent_peer_is_dead() {
    let mut tested = Tested::new(Role::Agent);
    tested.say_of(1, StreamFrame::Open(request())).unwrap();
    tested.events();
    tested.lane.heard(1_000_000);
    assert_eq!(tested.lane.tick(25_900_000), Ok(()));
    assert_eq!(tested.lane.tick(26_000_000), Err(LaneError::Silent));
    let lost = End::LaneLost { not_dispatched: false };
    assert_eq!(tested.events(), [Event::Ended(1, lost)]);

    let mut mute = Lane::new(Role::Gateway, LaneConfig::default(), memory(1 << 20), 0);
    assert_eq!(mute.tick(4_900_000), Ok(()));
    mute.heard(4_900_000);
    assert_eq!(mute.tick(5_000_000), Err(LaneError::HelloTimeout));
}

#[test]
fn an_upgrade_needs_its_request_and_100_comes_first() {
    let mut agent = Tested::new(Role::Agent);
    agent.say_of(1, StreamFrame::Open(request())).unwrap();
    agent.say_of(3, StreamFrame::Open(Open { upgrade: true, ..request() })).unwrap();
    assert_eq!(agent.lane.send_head(1, &head(101, false)), Err(SendError::Order));
    assert_eq!(agent.lane.put(1, &mut Bytes::from_static(b"1")), Err(SendError::Order));
    assert_eq!(agent.lane.send_head(1, &head(100, false)), Ok(()));
    assert_eq!(agent.lane.send_head(1, &head(100, false)), Err(SendError::Order));
    assert_eq!(agent.lane.send_head(1, &head(100, true)), Err(SendError::Order));
    assert_eq!(agent.lane.send_head(1, &head(200, true)), Ok(()));
    assert_eq!(agent.lane.send_head(3, &head(101, false)), Ok(()));
    let trailers = agent.lane.finish_with_trailers(3, Headers::default());
    assert_eq!(trailers, Err(SendError::Order));
    let heads = [Said::Head(1, 100), Said::Head(1, 200), Said::Head(3, 101)];
    assert_eq!(agent.heard(), heads);
}
