//! Compression: damage, bombs, odd but legal streams, and every set of parameters.

use proptest::prelude::*;
use wsproxy_proto::disconnect::Disconnect;
use wsproxy_proto::ws::deflate::{Deflater, Deflaters, Params};
use wsproxy_proto::ws::frame::{Opcode, Role};
use wsproxy_proto::ws::receiver::Limits;

use crate::support::{Ear, LIMITS, MASK, NO_TAKEOVER, Said, TAKEOVER, cases, frame, noise};

fn compressed(opcode: Opcode, payload: &[u8]) -> Vec<u8> {
    frame(true, true, opcode, payload, Some(MASK))
}

fn hear(params: Params, payloads: &[&[u8]]) -> (Vec<Said>, Option<Disconnect>) {
    let mut ear = Ear::new(Role::Server, LIMITS, Some(params));
    for payload in payloads {
        ear.hear(&compressed(Opcode::Binary, payload));
    }
    (ear.said, ear.error)
}

#[test]
fn the_examples_of_the_rfc() {
    let hello = Said::Binary(b"Hello".into());
    for params in [NO_TAKEOVER, TAKEOVER] {
        for payload in [HELLO, STORED, FINAL, TWO_BLOCKS] {
            let (said, error) = hear(params, &[payload, payload]);
            assert_eq!((said, error), (vec![hello.clone(); 2], None), "{payload:x?}");
        }
    }
    assert_eq!(hear(TAKEOVER, &[HELLO, HELLO_AGAIN]), (vec![hello.clone(), hello.clone()], None));
    let (said, error) = hear(NO_TAKEOVER, &[HELLO, HELLO_AGAIN]);
    assert_eq!((said, error), (vec![hello], Some(Disconnect::BAD_DEFLATE)));
}

#[test]
fn empty_messages_and_final_blocks_inflate() {
    for params in [NO_TAKEOVER, TAKEOVER] {
        let (said, error) = hear(params, &[b"\x00", b"", b"\x02\x00", b"\x03\x00", &FINAL[..7]]);
        let empty = Said::Binary(vec![]);
        let want =
            [empty.clone(), empty.clone(), empty.clone(), empty, Said::Binary(b"Hello".into())];
        assert_eq!((said.as_slice(), error), (&want[..], None), "{params:?}");
    }
}

#[test]
fn damage_is_told_from_data() {
    let short_block = b"\x00\x20\x00\xdf\xffabc";
    for damaged in
        [&b"\xff\xff"[..], b"\x07", &HELLO[..4], &STORED[..7], b"\xf2\x48\xcd", short_block]
    {
        let (said, error) = hear(NO_TAKEOVER, &[damaged]);
        assert_eq!((said, error), (vec![], Some(Disconnect::BAD_DEFLATE)), "{damaged:x?}");
    }
    assert_eq!(hear(TAKEOVER, &[b"\xff\xff"]).1, Some(Disconnect::BAD_DEFLATE));
}

#[test]
fn final_blocks_are_bounded() {
    for params in [NO_TAKEOVER, TAKEOVER] {
        for end in [&b"\x03\x00"[..], b"\x01\x00\x00\xff\xff"] {
            let some = [&end.repeat(7)[..], b"\x00"].concat();
            assert_eq!(hear(params, &[&some, &some]).1, None);
            assert_eq!(hear(params, &[&end.repeat(100_000)]).1, Some(Disconnect::BAD_DEFLATE));
        }
    }
}

#[test]
fn inflated_text_must_be_utf8() {
    let mut deflater = Deflater::new(1, 15, false);
    let payload = deflater.compress(b"a\xe2\x82").to_vec();
    let mut ear = Ear::new(Role::Server, LIMITS, Some(NO_TAKEOVER));
    ear.hear(&compressed(Opcode::Binary, &payload)).hear(&compressed(Opcode::Text, &payload));
    assert_eq!((ear.said.len(), ear.error), (1, Some(Disconnect::NOT_UTF8)));
    let mut ear = Ear::new(Role::Server, LIMITS, Some(NO_TAKEOVER));
    ear.hear(&frame(false, true, Opcode::Text, &payload[..2], Some(MASK)));
    ear.hear(&frame(true, false, Opcode::Continuation, &payload[2..], Some(MASK)));
    assert_eq!(ear.error, Some(Disconnect::NOT_UTF8));
}

#[test]
fn a_bomb_ends_at_the_limit() {
    let mut deflater = Deflater::new(9, 15, false);
    let bomb = deflater.compress(&vec![0; 64 << 20]).to_vec();
    assert!(bomb.len() < 100_000);
    for params in [NO_TAKEOVER, TAKEOVER] {
        assert_eq!(hear(params, &[&bomb]).1, Some(Disconnect::TOO_BIG));
        // To the byte: the limit itself passes.
        for (length, error) in [(1000, None), (1001, Some(Disconnect::TOO_BIG))] {
            let limits = Limits { message_bytes_max: 1000, fragments_max: 10 };
            let mut ear = Ear::new(Role::Server, limits, Some(params));
            let payload = deflater.compress(&vec![7; length]).to_vec();
            assert_eq!(ear.hear(&compressed(Opcode::Binary, &payload)).error, error);
        }
    }
    // Compressed data itself is bounded, too, before it is inflated.
    let limits = Limits { message_bytes_max: 1000, fragments_max: 10 };
    let mut ear = Ear::new(Role::Server, limits, Some(NO_TAKEOVER));
    let header = &compressed(Opcode::Binary, &[0; 2000])[..8];
    assert_eq!(ear.hear(header).error, Some(Disconnect::TOO_BIG));
}

#[test]
fn incompressible_messages_of_the_largest_size_pass() {
    let noise = noise(1, 1000);
    let limits = Limits { message_bytes_max: 1000, fragments_max: 10 };
    for level in 1..=9 {
        let mut deflater = Deflater::new(level, 15, false);
        let payload = deflater.compress(&noise).to_vec();
        let mut ear = Ear::new(Role::Server, limits, Some(NO_TAKEOVER));
        ear.hear(&compressed(Opcode::Binary, &payload));
        assert_eq!((ear.said.len(), ear.error), (1, None));
    }
}

#[test]
fn what_does_not_get_smaller_is_not_compressed() {
    let mut deflaters = Deflaters::new(1);
    assert_eq!(deflaters.compress(15, b""), None);
    assert_eq!(deflaters.compress(15, b"abc"), None);
    let small = deflaters.compress(15, &[b'a'; 1000]).unwrap().len();
    assert!(small < 30);
    // A message that failed to shrink leaves nothing behind.
    let noise: Vec<u8> =
        (0..200_u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    assert_eq!(deflaters.compress(15, &noise), None);
    assert_eq!(deflaters.compress(15, &[b'a'; 1000]).unwrap().len(), small);
}

#[test]
fn pool_survives_messages_that_do_not_shrink() {
    let (mut pool, mut own) = (Deflaters::new(1), Deflater::new(1, 15, true));
    let lengths = [1024, 1024, 4096, 1500, 16_384, 100].repeat(100);
    for (seed, length) in lengths.into_iter().enumerate() {
        // Bytes that cost 8 bits each, now and then 9: the output ends near the input's length.
        let noise: Vec<u8> =
            noise(seed as u64, length).into_iter().map(|byte| byte % 146).collect();
        assert_eq!(pool.compress(15, &noise), None);
        own.compress(&noise);
        assert!(pool.compress(15, &vec![7; length]).is_some());
    }
}

fn params() -> impl Strategy<Value = Params> {
    (any::<bool>(), any::<bool>(), 9..=15_u8, 9..=15_u8).prop_map(|(server, client, s, c)| Params {
        server_no_context_takeover: server,
        client_no_context_takeover: client,
        server_max_window_bits: s,
        client_max_window_bits: c,
    })
}

/// Messages that repeat themselves and each other, as JSON does.
fn messages() -> impl Strategy<Value = Vec<Vec<u8>>> {
    let piece = prop_oneof![
        Just(b"{\"type\":\"token\",\"text\":".to_vec()),
        proptest::collection::vec(any::<u8>(), 0..50),
        (any::<u8>(), 0..3000_usize).prop_map(|(byte, length)| vec![byte; length]),
    ];
    let message = proptest::collection::vec(piece, 0..8).prop_map(|pieces| pieces.concat());
    proptest::collection::vec(message, 1..6)
}

proptest! {
    #![proptest_config(cases(64))]

    #[test]
    fn compressing_then_receiving_is_identity(
        params in params(),
        messages in messages(),
        level in 1..=9_u32,
        from_server in any::<bool>(),
        cut in 1..4000_usize,
    ) {
        let (bits, takeover, role, mask) = if from_server {
            let takeover = !params.server_no_context_takeover;
            (params.server_max_window_bits, takeover, Role::Client, None)
        } else {
            let takeover = !params.client_no_context_takeover;
            (params.client_max_window_bits, takeover, Role::Server, Some(MASK))
        };
        let mut deflater = Deflater::new(level, bits, takeover);
        let mut ear = Ear::new(role, LIMITS, Some(params));
        for message in &messages {
            let payload = deflater.compress(message);
            // Fragments of `cut` bytes.
            let mut rest = payload;
            let mut opcode = Opcode::Binary;
            while rest.len() > cut {
                ear.hear(&frame(false, opcode == Opcode::Binary, opcode, &rest[..cut], mask));
                rest = &rest[cut..];
                opcode = Opcode::Continuation;
            }
            ear.hear(&frame(true, opcode == Opcode::Binary, opcode, rest, mask));
        }
        prop_assert_eq!(ear.error, None);
        let want: Vec<Said> = messages.into_iter().map(Said::Binary).collect();
        prop_assert_eq!(ear.said, want);
    }

    #[test]
    fn shared_frames_inflate_in_larger_windows(
        messages in messages(),
        bits in 9..=15_u8,
        larger in 0..=6_u8,
    ) {
        let theirs = Params { server_max_window_bits: (bits + larger).min(15), ..NO_TAKEOVER };
        let mut deflaters = Deflaters::new(1);
        let mut ear = Ear::new(Role::Client, LIMITS, Some(theirs));
        for message in &messages {
            ear.said.clear();
            let Some(small) = deflaters.compress(bits, message) else { continue };
            prop_assert!(small.len() < message.len());
            ear.hear(&frame(true, true, Opcode::Binary, small, None));
            prop_assert_eq!(&ear.said, &[Said::Binary(message.clone())]);
        }
    }
}

/// The examples of RFC 7692 section 7.2.3.
const HELLO: &[u8] = b"\xf2\x48\xcd\xc9\xc9\x07\x00";
const HELLO_AGAIN: &[u8] = b"\xf2\x00\x11\x00\x00";
const STORED: &[u8] = b"\x00\x05\x00\xfa\xff\x48\x65\x6c\x6c\x6f\x00";
const FINAL: &[u8] = b"\xf3\x48\xcd\xc9\xc9\x07\x00\x00";
const TWO_BLOCKS: &[u8] = b"\xf2\x48\x05\x00\x00\x00\xff\xff\xca\xc9\xc9\x07\x00";
