//! Any split of the input gives the same events and the same ending.

use proptest::prelude::*;
use wsproxy_proto::disconnect::Disconnect;
use wsproxy_proto::ws::deflate::{Deflater, Params};
use wsproxy_proto::ws::frame::{Opcode, Role, close_payload};
use wsproxy_proto::ws::receiver::Limits;

use crate::support::{Ear, NO_TAKEOVER, Said, TAKEOVER, cases, frame};

/// Step of a conversation: a message, in fragments with control frames between them.
#[derive(Debug, Clone)]
struct Step {
    said: Said,
    /// Places at which the payload is cut into fragments, as shares of 256.
    cuts: Vec<u8>,
    /// Pings between fragments.
    pings: Vec<Vec<u8>>,
    compressed: bool,
    mask: [u8; 4],
}

fn step() -> impl Strategy<Value = Step> {
    let said = prop_oneof![
        4 => "\\PC{0,300}".prop_map(Said::Text),
        4 => proptest::collection::vec(any::<u8>(), 0..700).prop_map(Said::Binary),
        1 => proptest::collection::vec(any::<u8>(), 0..=125).prop_map(Said::Pong),
    ];
    let cuts = proptest::collection::vec(any::<u8>(), 0..5);
    let pings = proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..=125), 0..3);
    (said, cuts, pings, any::<bool>(), any::<[u8; 4]>()).prop_map(
        |(said, mut cuts, pings, compressed, mask)| {
            cuts.sort_unstable();
            Step { said, cuts, pings, compressed, mask }
        },
    )
}

/// Returns the bytes of `steps`, and the events that they are.
fn spell(steps: &[Step], masked: bool, params: Option<Params>) -> (Vec<u8>, Vec<Said>) {
    let takeover = params.is_some_and(|params| !params.client_no_context_takeover);
    let mut deflater = Deflater::new(1, 15, takeover);
    let (mut bytes, mut said) = (Vec::new(), Vec::new());
    for step in steps {
        let mask = masked.then_some(step.mask);
        let (opcode, payload) = match &step.said {
            Said::Text(text) => (Opcode::Text, text.as_bytes()),
            Said::Binary(payload) => (Opcode::Binary, &payload[..]),
            Said::Pong(payload) => {
                bytes.extend(frame(true, false, Opcode::Pong, payload, mask));
                said.push(step.said.clone());
                continue;
            }
            other => unreachable!("{other:?}"),
        };
        let compressed = step.compressed && params.is_some();
        let payload = if compressed { deflater.compress(payload) } else { payload };
        let mut pings = step.pings.iter();
        let (mut opcode, mut from) = (opcode, 0);
        for cut in &step.cuts {
            let to = payload.len() * usize::from(*cut) / 256;
            let first = opcode != Opcode::Continuation;
            bytes.extend(frame(false, compressed && first, opcode, &payload[from..to], mask));
            (opcode, from) = (Opcode::Continuation, to);
            if let Some(ping) = pings.next() {
                bytes.extend(frame(true, false, Opcode::Ping, ping, mask));
                said.push(Said::Ping(ping.clone()));
            }
        }
        let first = opcode != Opcode::Continuation;
        bytes.extend(frame(true, compressed && first, opcode, &payload[from..], mask));
        said.push(step.said.clone());
    }
    (bytes, said)
}

fn heard(
    role: Role,
    params: Option<Params>,
    bytes: &[u8],
    cuts: &[usize],
) -> (Vec<Said>, Option<Disconnect>) {
    let mut ear = Ear::new(role, LIMITS, params);
    let mut rest = bytes;
    for cut in cuts {
        let (chunk, after) = rest.split_at((*cut).min(rest.len()));
        ear.hear(chunk);
        rest = after;
    }
    ear.hear(rest);
    (ear.said, ear.error)
}

fn params() -> impl Strategy<Value = Option<Params>> {
    prop_oneof![Just(None), Just(Some(NO_TAKEOVER)), Just(Some(TAKEOVER))]
}

fn cuts() -> impl Strategy<Value = Vec<usize>> {
    prop_oneof![
        proptest::collection::vec(0..20_usize, 0..400),
        proptest::collection::vec(0..2000_usize, 0..10),
        Just(vec![1; 20_000]),
    ]
}

proptest! {
    #![proptest_config(cases(256))]

    #[test]
    fn encoding_then_receiving_is_identity_at_any_split(
        steps in proptest::collection::vec(step(), 0..6),
        params in params(),
        masked in any::<bool>(),
        cuts in cuts(),
    ) {
        let role = if masked { Role::Server } else { Role::Client };
        let (mut bytes, mut said) = spell(&steps, masked, params);
        let goodbye = close_payload(4004, "done");
        let mask = masked.then_some([1, 2, 3, 4]);
        bytes.extend(frame(true, false, Opcode::Close, goodbye.as_ref(), mask));
        said.push(Said::Close(Some((4004, "done".into()))));
        prop_assert_eq!(heard(role, params, &bytes, &cuts), (said, None));
    }

    #[test]
    fn damaged_input_ends_the_same_at_any_split(
        steps in proptest::collection::vec(step(), 1..4),
        params in params(),
        flips in proptest::collection::vec((any::<usize>(), any::<u8>()), 0..4),
        cuts in cuts(),
    ) {
        let (mut bytes, _) = spell(&steps, true, params);
        for (at, value) in flips {
            let at = at % bytes.len();
            bytes[at] ^= value;
        }
        let whole = heard(Role::Server, params, &bytes, &[]);
        prop_assert_eq!(heard(Role::Server, params, &bytes, &cuts), whole);
    }

    #[test]
    fn arbitrary_input_ends_the_same_at_any_split(
        // Biased towards headers that are nearly right.
        pieces in proptest::collection::vec(prop_oneof![
            (any::<u8>(), 0x80..0x90_u8).prop_map(|(first, second)| vec![first, second, 0, 0, 0, 0]),
            proptest::collection::vec(any::<u8>(), 0..40),
        ], 0..20),
        params in params(),
        cuts in cuts(),
    ) {
        let bytes = pieces.concat();
        let whole = heard(Role::Server, params, &bytes, &[]);
        prop_assert_eq!(heard(Role::Server, params, &bytes, &cuts), whole);
    }
}

const LIMITS: Limits = Limits { message_bytes_max: 5000, fragments_max: 8 };
