//! Order of writing, and windows over links with a delay.

use bytes::Bytes;
use wsproxy_proto::tunnel::{
    code::Code,
    frame::{DataFlag, Frame, HEADER_BYTES, Head, Open, PAYLOAD_BYTES_MAX, Reset, StreamFrame},
    headers::HeaderBlock,
    hello::Hello,
    lane::{BATCH_BYTES_MAX, Lane, LaneConfig, LaneError, Role, Taken},
    memory::MemoryLimits,
};

use super::{
    pair::{AGENT, GATEWAY, Pair, request},
    peer::{Said, Tested, head, memory},
};

#[test]
fn control_and_small_answers_pass_bulk() {
    let mut agent = Tested::new(Role::Agent);
    for number in [1, 3, 5] {
        agent.say_of(number, StreamFrame::Open(Open { end: false, ..request() })).unwrap();
        agent.lane.send_head(number, &head(200, false)).unwrap();
    }
    agent.heard();
    let fill = |agent: &mut Tested, number| {
        agent.lane.put(number, &mut Bytes::from(vec![0; 32 << 10])).unwrap();
    };
    fill(&mut agent, 1);
    fill(&mut agent, 3);
    agent.data(3, &[0; 16 << 10], DataFlag::None).unwrap();
    assert!(matches!(agent.lane.take(0, 3), Taken::Bytes(_)));
    agent.say(Frame::Ping(1)).unwrap();
    let bulk = |number, flag| Said::Data(number, 16 << 10, flag);
    let batch = agent.heard();
    assert!(matches!(batch[0], Said::Other(_)));
    let none = DataFlag::None;
    assert_eq!(
        batch[1..],
        [Said::Credit(3, 16 << 10), bulk(1, none), bulk(3, none), bulk(1, none)]
    );
    // New beside two that had their turns.
    agent.say_of(1, StreamFrame::Credit(1 << 20)).unwrap();
    agent.say_of(3, StreamFrame::Credit(1 << 20)).unwrap();
    fill(&mut agent, 1);
    agent.lane.put(5, &mut Bytes::from_static(b"key")).unwrap();
    let batch = agent.heard();
    assert_eq!(batch[0], Said::Data(5, 3, none));
    assert_eq!(batch[1..], [bulk(3, none), bulk(1, none), bulk(1, none)]);
}

#[test]
fn bulk_streams_share_a_batch_by_turns() {
    let mut agent = Tested::new(Role::Agent);
    for number in [1, 3, 5, 7] {
        agent.say_of(number, StreamFrame::Open(request())).unwrap();
        agent.lane.send_head(number, &head(200, false)).unwrap();
        agent.lane.put(number, &mut Bytes::from(vec![0; 40_000])).unwrap();
    }
    let mut turns = Vec::new();
    loop {
        let batch = agent.heard();
        if batch.is_empty() {
            break;
        }
        turns.extend(batch.iter().filter_map(|said| match said {
            Said::Data(number, ..) => Some(*number),
            _ => None,
        }));
    }
    assert_eq!(turns, [1, 3, 5, 7, 1, 3, 5, 7]);
}

#[test]
fn a_batch_is_bounded_and_a_large_head_is_the_last_of_one() {
    let mut block = HeaderBlock::new();
    block.push(b"a", &vec![b'v'; 65_528]).unwrap();
    let mut lane = Lane::new(Role::Agent, LaneConfig::default(), memory(1 << 20), 0);
    let mut message = Vec::new();
    lane.write_batch(0, &mut message);
    let hello = Hello { head_bytes_max: 1 << 20, ..Hello::default() };
    let mut agent = Tested { lane, now: 0 };
    agent.say(Frame::Hello(hello)).unwrap();
    for number in [1, 3] {
        agent.say_of(number, StreamFrame::Open(request())).unwrap();
        let large = Head { headers: block.headers(), ..head(200, true) };
        agent.lane.send_head(number, &large).unwrap();
    }
    let mut out = b"before".to_vec();
    for number in 0..2 {
        out.truncate(6);
        // Control frames cannot keep the head back.
        agent.say(Frame::Ping(number)).unwrap();
        assert!(agent.lane.has_output() && agent.lane.write_batch(0, &mut out));
        let (pong, head) = (HEADER_BYTES + 12, HEADER_BYTES + PAYLOAD_BYTES_MAX);
        assert_eq!(out.len(), 6 + pong + head);
        assert!(head > BATCH_BYTES_MAX && out.starts_with(b"before"));
    }
    assert!(!agent.lane.write_batch(0, &mut out));
}

#[test]
fn control_frames_leave_room_for_streams() {
    let text = "x".repeat(512);
    let mut agent = Tested::new(Role::Agent);
    for number in (1..400).step_by(2) {
        agent.say_of(number, StreamFrame::Open(request())).unwrap();
        agent.lane.send_head(number, &head(200, false)).unwrap();
    }
    while !agent.heard().is_empty() {}
    for number in (3..400).step_by(2) {
        agent.lane.reset(number, &Reset { message: &text, ..Reset::new(Code::Cancelled) });
    }
    agent.lane.put(1, &mut Bytes::from_static(b"key")).unwrap();
    let mut resets = 0;
    for batch in 0.. {
        let mut said = agent.heard();
        let Some(last) = said.pop_if(|said| matches!(said, Said::Data(..))) else { break };
        assert_eq!(last, Said::Data(1, 3, DataFlag::None));
        assert!(said.len() <= 31, "batch {batch} has {} resets", said.len());
        resets += said.len();
        agent.lane.put(1, &mut Bytes::from_static(b"key")).unwrap();
        if resets == 199 {
            return assert_eq!(agent.lane.streams(), 1);
        }
    }
    panic!("{resets} resets");
}

/// Answers of streams over a link that takes one round each way.
struct Link {
    pair: Pair,
    streams: Vec<u32>,
}

impl Link {
    fn new(growth_bytes_max: u64, streams: usize) -> Self {
        let window_max = 512 << 10;
        let limits = MemoryLimits { growth_bytes_max, window_max, ..MemoryLimits::default() };
        let mut pair = Pair::new(limits, &LaneConfig::default());
        let streams = (0..streams).map(|_| pair.open(true).unwrap()).collect();
        pair.settle();
        Self { pair, streams }
    }

    /// One round of 25 ms, in which the consumers of the chosen streams take at most `chunks` each.
    fn round(&mut self, chunks: impl Fn(u32) -> usize) {
        let pair = &mut self.pair;
        pair.now += 25_000;
        for &number in &self.streams {
            if !pair.side(AGENT, number).has_head {
                pair.head(number, 200, false);
            }
        }
        for side in [GATEWAY, AGENT] {
            for _ in 0..pair.flying[side].len() {
                pair.deliver(side);
            }
        }
        for &number in &self.streams {
            for _ in 0..chunks(number) {
                pair.take(GATEWAY, number);
            }
        }
        loop {
            for &number in &self.streams {
                while !pair.side(AGENT, number).is_put_waiting {
                    pair.put(AGENT, number, 20_000);
                }
            }
            if ![GATEWAY, AGENT].map(|side| pair.write(side)).contains(&true) {
                break;
            }
        }
        pair.lanes.iter_mut().for_each(|lane| lane.heard(pair.now));
        pair.lanes[GATEWAY].tick(pair.now).unwrap();
        pair.take_events(GATEWAY);
    }

    fn growth(&self) -> u64 {
        self.pair.memories[GATEWAY].growth_bytes()
    }
}

#[test]
fn a_fast_reader_gets_a_window_for_the_round_trip() {
    let taken = |growth| {
        let mut link = Link::new(growth, 1);
        (0..60).for_each(|_| link.round(|_| 2000));
        (link.pair.side(GATEWAY, 1).taken, link.growth())
    };
    let (slow, none) = taken(0);
    assert_eq!(none, 0);
    assert!(slow <= 31 * (32 << 10), "{slow}");
    let (fast, growth) = taken(32 << 20);
    assert_eq!(growth, (512 << 10) - (32 << 10));
    // Six rounds until the window is at its widest, which then is used up in each round trip.
    assert!(fast > 27 * (512 << 10) && fast > 14 * slow, "{fast} {slow}");
}

#[test]
fn a_slow_reader_gets_no_growth() {
    let mut link = Link::new(32 << 20, 1);
    for round in 0..200 {
        link.round(|_| usize::from(round % 4 == 0));
        assert_eq!(link.growth(), 0);
    }
    assert!(link.pair.side(GATEWAY, 1).taken > 40 * (16 << 10));
}

#[test]
fn growth_of_a_stalled_reader_goes_to_others() {
    let budget = (512 << 10) - (32 << 10);
    let mut link = Link::new(budget, 2);
    (0..20).for_each(|_| link.round(|number| if number == 1 { 99 } else { 0 }));
    assert_eq!(link.growth(), budget);
    // The first one stops, and the other one begins.
    (0..100).for_each(|_| link.round(|number| if number == 3 { 99 } else { 0 }));
    assert_eq!(link.growth(), 2 * budget);
    assert!(link.pair.side(GATEWAY, 3).taken > 20 * (512 << 10));
    // All that the first one may send is held, and no more.
    let held = link.pair.lanes[GATEWAY].buffered_bytes();
    assert!((512 << 10..(512 + 64) << 10).contains(&held), "{held}");
    // It goes on with the window of the start: the other one has the budget.
    let taken = link.pair.side(GATEWAY, 1).taken;
    (0..60).for_each(|_| link.round(|_| 99));
    let more = link.pair.side(GATEWAY, 1).taken - taken;
    assert!(more > (512 << 10) + 28 * (32 << 10), "{more}");
    assert_eq!(link.growth(), budget);
}

#[test]
fn a_sender_that_says_later_that_it_waits_gets_a_wider_window() {
    let mut agent = Tested::new(Role::Agent);
    agent.say_of(1, StreamFrame::Open(Open { end: false, ..request() })).unwrap();
    for _ in 0..2 {
        agent.data(1, &[0; 16 << 10], DataFlag::None).unwrap();
    }
    while let Taken::Bytes(chunk) = agent.lane.take(0, 1) {
        assert_eq!(Bytes::from_owner(chunk), vec![0; 16 << 10]);
    }
    assert_eq!(agent.heard(), [Said::Credit(1, 32 << 10)]);
    agent.data(1, b"", DataFlag::Blocked).unwrap();
    assert_eq!(agent.heard(), [Said::Credit(1, 96 << 10)]);
    assert_eq!(agent.data(1, b"", DataFlag::Blocked), Err(LaneError::FlowControl));
}

#[test]
fn lanes_and_chunks_can_go_to_other_tasks() {
    const fn is_sent<T: Send + Sync + 'static>() {}
    is_sent::<Lane>();
    is_sent::<Taken>();
}
