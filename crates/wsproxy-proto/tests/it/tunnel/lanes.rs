//! Two lanes driven against each other, with reads, writes, losses and stalls in any order.

use std::collections::HashMap;

use proptest::{collection::vec, prelude::*};
use wsproxy_proto::tunnel::{
    STREAM_MAX,
    code::Code,
    event::End,
    lane::{Lane, LaneConfig, OpenError},
    memory::MemoryLimits,
};

use crate::bodies;

use super::pair::{AGENT, GATEWAY, Pair};

/// One step, by numbers: its kind, the side, the stream, and an amount.
type Step = (u8, usize, usize, usize);

proptest! {
    #[test]
    fn a_hostile_peer_breaks_no_promise(
        role in any::<bool>(),
        steps in vec(hostile_step(), 1..60),
    ) {
        bodies::tunnel_lane(&[&[role.into()], &steps.concat()[..]].concat());
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]

    #[test]
    fn streams_keep_their_promises_in_any_order(
        window in prop_oneof![1u32..300, 4_000u32..70_000],
        growth_bytes_max in prop_oneof![Just(0u64), 0u64..400_000],
        streams_max in 1u32..9,
        first in prop_oneof![Just(1), Just(STREAM_MAX - 8)],
        steps in vec((0u8..22, 0usize..2, 0usize..8, 0usize..40_000), 1..160),
        is_lost in any::<bool>(),
        stalled in prop_oneof![Just(None), (0usize..8).prop_map(Some)],
    ) {
        let stream = u64::from(window) + (32 << 10);
        // Memory for fewer streams than there may be.
        let bytes_max = stream * u64::from(streams_max.max(3) - 1);
        let window_max = window.saturating_mul(64);
        let limits = MemoryLimits { bytes_max, growth_bytes_max, window, window_max };
        let config = LaneConfig { streams_max, first_stream: first, ..LaneConfig::default() };
        let mut pair = Pair::new(limits, &config);
        steps.iter().for_each(|step| run(&mut pair, *step));
        if is_lost {
            pair.lose();
        }
        let stalled = stalled.and_then(|at| pair.streams.keys().nth(at).copied());
        complete(&mut pair, window as usize, stalled);
        check_ends(&mut pair, is_lost, stalled);
    }
}

/// A step of `bodies::tunnel_lane`, with numbers that are often good.
fn hostile_step() -> impl Strategy<Value = Vec<u8>> {
    let open = b"\0\0\0\0\0\0\0\x03GET\0\x01/";
    let payload = prop_oneof![
        Just(open.to_vec()),
        Just(b"\0\xc8\0".to_vec()),
        Just(b"\0\0\x01\0".to_vec()),
        Just(b"\0\0\x04\0\0\0\0".to_vec()),
        Just(b"\0\x01\0\0\0\0\0".to_vec()),
        vec(any::<u8>(), 0..200),
    ];
    let kind = prop_oneof![4 => 1u8..13, 6 => 128u8..=255];
    (kind, 0u8..16, prop_oneof![Just(0u8), 0u8..4, any::<u8>()], payload).prop_map(
        |(kind, stream, flags, payload)| {
            [&[kind, stream, flags, payload.len() as u8], &payload[..]].concat()
        },
    )
}

fn run(pair: &mut Pair, (kind, side, stream, amount): Step) {
    pair.now += 1;
    match kind {
        0 | 1 => {
            let _ = pair.open(amount % 3 == 0);
            return;
        }
        2..=4 => {
            pair.write(side);
            return;
        }
        5..=7 => {
            pair.deliver(side);
            return;
        }
        8 => pair.now += 600_000,
        9 => {
            // Pings and liveness have tests of their own: nothing is silent here for so long.
            pair.lanes.iter_mut().for_each(|lane| lane.heard(pair.now));
            pair.lanes[side].tick(pair.now).unwrap();
            return pair.take_events(side);
        }
        10 if amount < 2_000 => {
            pair.lanes[side].go_away(Code::Restarting, 20_000);
            return pair.take_events(side);
        }
        _ => {}
    }
    let Some(number) = pair.streams.keys().nth_back(stream).copied() else { return };
    if !pair.has(side, number) {
        return;
    }
    match kind {
        11 | 12 if side == AGENT => pair.head(number, [200, 100, 204][amount % 3], amount % 3 == 2),
        11..=15 => pair.put(side, number, amount),
        16..=18 => {
            pair.take(side, number);
        }
        19 => pair.finish(side, number, amount % 2 == 0),
        20 if amount < 10_000 => pair.stop(side, number),
        21 if amount < 10_000 => pair.reset(side, number, Code::Cancelled),
        _ => {}
    }
}

/// Lets all streams put more than their windows and come to their ends, but for the consumers of one stream, who take
/// nothing. A task that was told to wait does nothing until an event wakes it.
fn complete(pair: &mut Pair, window: usize, stalled: Option<u32>) {
    let numbers: Vec<_> = pair.streams.keys().copied().collect();
    let mut goals = HashMap::new();
    for round in 0.. {
        assert!(round < 5_000, "no progress");
        pair.now += 1;
        pair.settle();
        let mut is_progress = false;
        for &number in &numbers {
            for side in pair.sides(number) {
                if side == AGENT && !pair.side(AGENT, number).has_head {
                    pair.head(number, 200, false);
                }
                while stalled != Some(number)
                    && !pair.side(side, number).is_take_waiting
                    && pair.take(side, number)
                {
                    is_progress = true;
                }
                let model = pair.side(side, number);
                let goal = *goals.entry((side, number)).or_insert(model.put + 3 * window);
                if model.is_finished || model.is_put_waiting || !model.ends.is_empty() {
                    continue;
                }
                let before = model.put;
                pair.put(side, number, goal - before);
                is_progress |= pair.side(side, number).put > before;
                if pair.side(side, number).put == goal || pair.side(side, number).is_stopped {
                    pair.finish(side, number, false);
                    is_progress = true;
                    pair.side(side, number).is_finished = true;
                }
            }
        }
        if !is_progress && !pair.lanes.iter().any(Lane::has_output) {
            break;
        }
    }
}

fn check_ends(pair: &mut Pair, is_lost: bool, stalled: Option<u32>) {
    let numbers: Vec<_> = pair.streams.keys().copied().collect();
    for number in numbers.into_iter().filter(|number| stalled != Some(*number)) {
        for side in pair.sides(number) {
            let model = pair.side(side, number);
            assert_eq!(model.ends.len(), 1, "{number} at {side}: {model:?}");
            let is_clean = model.ends == [End::Complete];
            let is_over = model.took_end || model.has_stopped;
            assert!(!is_clean || is_over, "{number} at {side}: {model:?}");
        }
        let is_complete = |pair: &mut Pair, side| pair.side(side, number).ends == [End::Complete];
        // Without a loss both sides have the same end, but for one that gave up what was complete.
        let ends = [GATEWAY, AGENT].map(|side| is_complete(pair, side));
        let was_reset = [GATEWAY, AGENT]
            .into_iter()
            .any(|side| matches!(pair.side(side, number).ends[..], [End::ResetHere(_)]));
        assert!(is_lost || was_reset || !pair.has(AGENT, number) || ends[0] == ends[1], "{number}");
    }
    let left = usize::from(stalled.is_some());
    for (side, lane) in pair.lanes.iter().enumerate() {
        assert!(lane.streams() <= left, "{} streams are left", lane.streams());
        assert!(pair.memories[side].streams() <= left as u64);
        assert!(left > 0 || pair.memories[side].growth_bytes() == 0);
    }
}

#[test]
fn numbers_end_with_goaway() {
    let config = LaneConfig { first_stream: STREAM_MAX - 2, ..LaneConfig::default() };
    let mut pair = Pair::new(MemoryLimits::default(), &config);
    assert_eq!(pair.open(true), Ok(STREAM_MAX - 2));
    assert_eq!(pair.open(true), Ok(STREAM_MAX));
    assert_eq!(pair.open(true), Err(OpenError::Draining));
    complete(&mut pair, 1000, None);
    check_ends(&mut pair, false, None);
}
