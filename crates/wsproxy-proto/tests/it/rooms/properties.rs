//! Messages of rooms that are made up: any bytes, valid messages with damage, and made-up valid ones.

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::{Index, select};
use wsproxy_proto::rooms::{check, stamp};

use super::vectors::binaries;
use crate::bodies;
use crate::support::cases;

proptest! {
    #![proptest_config(cases(8_000))]

    #[test]
    fn any_bytes_are_judged_as_decoders_judge(bytes in vec(any::<u8>(), 0..60)) {
        bodies::room_envelope(&bytes);
        bodies::room_text(&bytes);
    }

    #[test]
    fn damaged_messages_are_judged_as_decoders_judge(
        (message, damages) in (select(binaries()), vec(damage(), 1..4))
    ) {
        let mut message = message;
        damages.iter().for_each(|damage| damage.apply(&mut message));
        bodies::room_envelope(&message);
    }

    #[test]
    fn unknown_fields_and_spoofed_senders_change_nothing(
        message in select(binaries()),
        before in vec(passing_field(), 0..4),
        behind in vec(passing_field(), 0..4),
    ) {
        let (before, behind) = (before.concat(), behind.concat());
        let whole = [&before[..], &message, &behind].concat();
        let (alone, among) = (check::read(&message).unwrap(), check::read(&whole).unwrap());
        prop_assert_eq!(alone.body, among.body);
        let mut stamped = Vec::new();
        stamp::stamp(&whole, among.stamp, "alice-1", Some(7), &mut stamped);
        prop_assert!(stamped.starts_with(&whole));
        bodies::room_envelope(&whole);
        bodies::room_envelope(&stamped);
    }
}

#[derive(Debug, Clone)]
enum Damage {
    Set(Index, u8),
    Insert(Index, u8),
    Remove(Index),
    Cut(Index),
    Repeat(Index, Index),
}

impl Damage {
    fn apply(&self, message: &mut Vec<u8>) {
        if message.is_empty() {
            return;
        }
        let length = message.len();
        match self {
            Self::Set(at, byte) => message[at.index(length)] = *byte,
            Self::Insert(at, byte) => message.insert(at.index(length), *byte),
            Self::Remove(at) => _ = message.remove(at.index(length)),
            Self::Cut(at) => message.truncate(at.index(length)),
            Self::Repeat(from, to) => {
                let (from, to) = (from.index(length), to.index(length));
                let part = message[from.min(to)..from.max(to)].to_vec();
                message.extend(part);
            }
        }
    }
}

fn damage() -> impl Strategy<Value = Damage> {
    let byte = prop_oneof![any::<u8>(), select(&[0x00, 0x01, 0x7F, 0x80, 0xFF, 0x0A, 0xA2][..])];
    prop_oneof![
        3 => (any::<Index>(), byte.clone()).prop_map(|(at, byte)| Damage::Set(at, byte)),
        1 => (any::<Index>(), byte).prop_map(|(at, byte)| Damage::Insert(at, byte)),
        1 => any::<Index>().prop_map(Damage::Remove),
        1 => any::<Index>().prop_map(Damage::Cut),
        1 => (any::<Index>(), any::<Index>()).prop_map(|(from, to)| Damage::Repeat(from, to)),
    ]
}

/// A field that changes nothing: an unknown one, or a sender.
fn passing_field() -> impl Strategy<Value = Vec<u8>> {
    let tag = |field: u32, wire: u32| {
        let tag = field << 3 | wire;
        vec![tag as u8 | 0x80, (tag >> 7) as u8]
    };
    let unknown = 110_u32..1000;
    prop_oneof![
        "[a-z]{0,5}".prop_map(move |name| {
            [&tag(60, 2)[..], &[name.len() as u8], name.as_bytes()].concat()
        }),
        (unknown.clone(), 0_u8..0x80)
            .prop_map(move |(field, value)| [tag(field, 0), vec![value]].concat()),
        (unknown.clone(), any::<[u8; 8]>())
            .prop_map(move |(field, value)| { [&tag(field, 1)[..], &value].concat() }),
        (unknown.clone(), vec(any::<u8>(), 0..9)).prop_map(move |(field, value)| {
            [&tag(field, 2)[..], &[value.len() as u8], &value].concat()
        }),
        (unknown, any::<[u8; 4]>())
            .prop_map(move |(field, value)| { [&tag(field, 5)[..], &value].concat() }),
    ]
}
