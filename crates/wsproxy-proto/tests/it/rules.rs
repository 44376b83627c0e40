//! Each rule of RFC 6455 that a peer can break, and each limit.

use wsproxy_proto::disconnect::Disconnect;
use wsproxy_proto::ws::frame::{
    Opcode, Role, client_frame, close_payload, decode_header, server_frame,
};
use wsproxy_proto::ws::receiver::{Limits, Receiver};

use crate::support::{Ear, LIMITS, MASK, NO_TAKEOVER, Said, frame, heard, part};

fn ends(bytes: &[u8], disconnect: Disconnect) {
    assert_eq!(heard(bytes).1, Some(disconnect), "{bytes:x?}");
    // It also ends where the bytes come one by one, and never later.
    let mut ear = Ear::server();
    bytes.iter().for_each(|byte| {
        ear.hear(&[*byte]);
    });
    assert_eq!(ear.error, Some(disconnect), "{bytes:x?} byte by byte");
}

fn text(text: &str) -> Said {
    Said::Text(text.into())
}

#[test]
fn the_examples_of_the_rfc() {
    let masked = [0x81, 0x85, 0x37, 0xfa, 0x21, 0x3d, 0x7f, 0x9f, 0x4d, 0x51, 0x58];
    assert_eq!(heard(&masked).0, [text("Hello")]);
    assert_eq!(client_frame(Opcode::Text, b"Hello", false, MASK), masked[..]);
    assert_eq!(server_frame(Opcode::Text, b"Hello", false), b"\x81\x05Hello"[..]);
    let mut client = Ear::new(Role::Client, LIMITS, None);
    client.hear(b"\x01\x03Hel\x80\x02lo\x89\x05Hello");
    assert_eq!(client.said, [text("Hello"), Said::Ping(b"Hello".to_vec())]);
    let mut deflating = Ear::new(Role::Client, LIMITS, Some(NO_TAKEOVER));
    deflating.hear(b"\xc1\x07\xf2\x48\xcd\xc9\xc9\x07\x00");
    assert_eq!(deflating.said, [text("Hello")]);
}

#[test]
fn lengths_of_every_width() {
    for length in [0, 1, 125, 126, 127, 65_535, 65_536, 100_000] {
        let payload = vec![7; length];
        let (said, error) = heard(&part(true, Opcode::Binary, &payload));
        assert_eq!((said, error), (vec![Said::Binary(payload)], None));
    }
}

#[test]
fn lengths_must_be_minimal() {
    ends(b"\x82\xfe\x00\x7d\0\0\0\0", Disconnect::PROTOCOL);
    ends(b"\x82\xff\0\0\0\0\0\0\xff\xff\0\0\0\0", Disconnect::PROTOCOL);
    ends(b"\x82\xff\x80\0\0\0\0\0\0\0\0\0\0\0", Disconnect::PROTOCOL);
}

#[test]
fn masking_is_for_clients_only() {
    ends(b"\x81\x05Hello", Disconnect::PROTOCOL);
    ends(b"\x81\x00", Disconnect::PROTOCOL);
    let mut client = Ear::new(Role::Client, LIMITS, None);
    assert_eq!(client.hear(&part(true, Opcode::Text, b"Hello")).error, Some(Disconnect::PROTOCOL));
}

#[test]
fn reserved_bits_and_opcodes_are_refused_on_sight() {
    for first in [0xc1, 0xa1, 0x91, 0xf1, 0xc9, 0xc0] {
        ends(&[first, 0x80, 0, 0, 0, 0], Disconnect::PROTOCOL);
    }
    for opcode in (3..8).chain(11..16) {
        ends(&[0x80 | opcode, 0x80], Disconnect::PROTOCOL);
    }
}

#[test]
fn control_frames_are_short_and_whole() {
    for opcode in [8, 9, 10] {
        ends(&[opcode, 0x80], Disconnect::PROTOCOL);
        ends(&[0x80 | opcode, 0xfe], Disconnect::PROTOCOL);
        ends(&[0x80 | opcode, 0xff], Disconnect::PROTOCOL);
    }
    let longest = vec![b'x'; 125];
    assert_eq!(heard(&part(true, Opcode::Ping, &longest)).0, [Said::Ping(longest)]);
}

#[test]
fn control_frames_may_come_between_fragments() {
    let bytes = [
        part(false, Opcode::Text, b"a"),
        part(true, Opcode::Ping, b"1"),
        part(false, Opcode::Continuation, b""),
        part(true, Opcode::Pong, b""),
        part(true, Opcode::Continuation, b"b"),
        part(true, Opcode::Binary, b"c"),
    ]
    .concat();
    let (said, error) = heard(&bytes);
    let want = [Said::Ping(b"1".into()), Said::Pong(vec![]), text("ab"), Said::Binary(b"c".into())];
    assert_eq!((said.as_slice(), error), (&want[..], None));
    ends(&part(true, Opcode::Continuation, b""), Disconnect::PROTOCOL);
    for second in [Opcode::Text, Opcode::Binary] {
        let bytes = [part(false, Opcode::Text, b"a"), part(true, second, b"b")].concat();
        ends(&bytes, Disconnect::PROTOCOL);
    }
    let bytes = [part(true, Opcode::Text, b"a"), part(true, Opcode::Continuation, b"b")].concat();
    ends(&bytes, Disconnect::PROTOCOL);
}

#[test]
fn close_carries_nothing_or_a_code_that_may_be_sent() {
    assert_eq!(heard(&part(true, Opcode::Close, b"")).0, [Said::Close(None)]);
    for code in [1000, 1001, 1003, 1007, 1011, 1012, 1013, 1014, 3000, 4999] {
        let payload = close_payload(code, "bye ä");
        let (said, error) = heard(&part(true, Opcode::Close, payload.as_ref()));
        assert_eq!((said, error), (vec![Said::Close(Some((code, "bye ä".into())))], None));
    }
    ends(&part(true, Opcode::Close, b"\x03"), Disconnect::PROTOCOL);
    for code in [0, 999, 1004, 1005, 1006, 1015, 1016, 1100, 2000, 2999, 5000, 65535] {
        let payload = close_payload(code, "");
        ends(&part(true, Opcode::Close, payload.as_ref()), Disconnect::PROTOCOL);
    }
    ends(&part(true, Opcode::Close, b"\x03\xe8\xce\xba\xe1"), Disconnect::NOT_UTF8);
}

#[test]
fn what_follows_a_close_or_an_error_is_ignored() {
    let bytes = [part(true, Opcode::Close, b""), part(true, Opcode::Text, b"x")].concat();
    assert_eq!(heard(&bytes), (vec![Said::Close(None)], None));
    let mut ear = Ear::server();
    ear.hear(b"\xff\xff").hear(&bytes);
    assert_eq!((ear.said, ear.error), (vec![], Some(Disconnect::PROTOCOL)));
    assert_eq!(ear.receiver.heap_bytes(), 0);
}

#[test]
fn reasons_are_cut_at_a_character() {
    let payload = close_payload(1000, &"ä".repeat(100));
    assert_eq!(payload.as_ref().len(), 2 + 122);
    assert_eq!(&payload.as_ref()[2..], "ä".repeat(61).as_bytes());
    assert_eq!(close_payload(1000, &"a".repeat(200)).as_ref().len(), 125);
}

#[test]
fn text_fails_at_the_first_impossible_byte() {
    // Only the first three bytes of a frame of 1,000 bytes have come.
    let mut bytes = part(true, Opcode::Text, &[b"a\xed\xa0".to_vec(), vec![b'x'; 997]].concat());
    bytes.truncate(8 + 3);
    ends(&bytes, Disconnect::NOT_UTF8);
    bytes.truncate(8 + 2);
    assert_eq!(heard(&bytes), (vec![], None));
    // The error is in the second fragment, which is incomplete.
    let mut bytes = part(false, Opcode::Text, b"\xce\xba\xe1");
    bytes.extend(part(false, Opcode::Continuation, b"\xbd\x28xyz"));
    ends(&bytes[..bytes.len() - 3], Disconnect::NOT_UTF8);
    // The end of the message cuts a character off.
    ends(&part(true, Opcode::Text, b"\xe2\x82"), Disconnect::NOT_UTF8);
    let bytes =
        [part(false, Opcode::Text, b"\xe2"), part(true, Opcode::Continuation, b"\x82")].concat();
    ends(&bytes, Disconnect::NOT_UTF8);
    // A ping in the middle of a character is no error, nor are odd bytes in binary data.
    let bytes = [
        part(false, Opcode::Text, b"\xe2\x82"),
        part(true, Opcode::Ping, b"\xff"),
        part(true, Opcode::Continuation, b"\xac"),
        part(true, Opcode::Binary, b"\xff\xfe"),
    ]
    .concat();
    let want = [Said::Ping(vec![0xff]), text("€"), Said::Binary(vec![0xff, 0xfe])];
    assert_eq!(heard(&bytes), (want.to_vec(), None));
}

#[test]
fn size_is_judged_by_the_header() {
    let limits = Limits { message_bytes_max: 1000, fragments_max: 10 };
    let hear = |bytes: &[u8]| {
        let mut ear = Ear::new(Role::Server, limits, None);
        ear.hear(bytes);
        (ear.said.len(), ear.error)
    };
    let whole = part(true, Opcode::Binary, &[0; 1000]);
    assert_eq!(hear(&whole), (1, None));
    let header = &part(true, Opcode::Binary, &[0; 1001])[..8];
    assert_eq!(hear(header), (0, Some(Disconnect::TOO_BIG)));
    let huge = b"\x82\xff\x7f\xff\xff\xff\xff\xff\xff\xff\0\0\0\0";
    assert_eq!(hear(huge), (0, Some(Disconnect::TOO_BIG)));
    let first = part(false, Opcode::Binary, &[0; 600]);
    let fits = [&first[..], &part(true, Opcode::Continuation, &[0; 400])].concat();
    assert_eq!(hear(&fits), (1, None));
    let second = &part(false, Opcode::Continuation, &[0; 401])[..8];
    assert_eq!(hear(&[&first, second].concat()), (0, Some(Disconnect::TOO_BIG)));
    // Control frames do not count.
    let ping = part(true, Opcode::Ping, &[0; 125]);
    let bytes = [first, ping.repeat(20), part(true, Opcode::Continuation, &[0; 400])].concat();
    assert_eq!(hear(&bytes), (21, None));
}

#[test]
fn every_fragment_counts_even_an_empty_one() {
    let limits = Limits { message_bytes_max: 1000, fragments_max: 10 };
    for payload in [&b""[..], b"x"] {
        let mut ear = Ear::new(Role::Server, limits, None);
        ear.hear(&part(false, Opcode::Text, payload));
        for _ in 0..8 {
            ear.hear(&part(false, Opcode::Continuation, payload));
        }
        ear.hear(&part(true, Opcode::Continuation, payload));
        assert_eq!((ear.said.len(), ear.error), (1, None));
        // The count starts anew with the next message.
        ear.hear(&part(false, Opcode::Text, payload));
        for _ in 0..9 {
            assert_eq!(ear.error, None);
            ear.hear(&part(false, Opcode::Continuation, payload));
        }
        ear.hear(&part(false, Opcode::Continuation, payload));
        assert_eq!(ear.error, Some(Disconnect::TOO_MANY_FRAGMENTS));
    }
}

#[test]
fn memory_follows_what_came_and_is_given_back() {
    assert!(size_of::<Receiver>() <= 40, "{}", size_of::<Receiver>());
    let limits = Limits { message_bytes_max: 1 << 30, fragments_max: 1024 };
    let mut ear = Ear::new(Role::Server, limits, None);
    let payload = vec![1; 1 << 20];
    let bytes = part(true, Opcode::Binary, &payload);
    assert_eq!(ear.receiver.heap_bytes(), 0);
    let mut came = 0;
    for chunk in bytes.chunks(10_000) {
        ear.hear(chunk);
        came += chunk.len();
        assert!(ear.receiver.heap_bytes() <= 2 * came + 200, "{came}");
    }
    assert_eq!(ear.said, [Said::Binary(payload)]);
    assert_eq!(ear.receiver.heap_bytes(), 0);
    // A length that is only claimed costs nearly no memory.
    ear.hear(b"\x82\xff\0\0\0\0\x30\0\0\0\0\0\0\0");
    assert!(ear.receiver.heap_bytes() <= 200, "{}", ear.receiver.heap_bytes());
}

#[test]
fn ping_inside_a_message_leaves_only_the_message() {
    let mut ear = Ear::server();
    ear.hear(&part(false, Opcode::Text, b"a"));
    let before = ear.receiver.heap_bytes();
    let ping = part(true, Opcode::Ping, &[7; 100]);
    ear.hear(&ping[..50]).hear(&ping[50..]);
    assert_eq!(ear.said, [Said::Ping(vec![7; 100])]);
    assert_eq!(ear.receiver.heap_bytes(), before);
    ear.hear(&part(true, Opcode::Continuation, b"b"));
    assert_eq!(ear.said[1], text("ab"));
    assert_eq!(ear.receiver.heap_bytes(), 0);
}

#[test]
fn compression_must_be_negotiated_and_marks_first_frame() {
    let hello = b"\xf2\x48\xcd\xc9\xc9\x07\x00";
    let whole = frame(true, true, Opcode::Text, hello, Some(MASK));
    ends(&whole, Disconnect::PROTOCOL);
    let mut ear = Ear::new(Role::Server, LIMITS, Some(NO_TAKEOVER));
    ear.hear(&whole).hear(&part(true, Opcode::Text, b"plain"));
    assert_eq!(ear.said, [text("Hello"), text("plain")]);
    ear.hear(&frame(false, true, Opcode::Text, &hello[..3], Some(MASK)));
    ear.hear(&frame(true, true, Opcode::Continuation, &hello[3..], Some(MASK)));
    assert_eq!(ear.error, Some(Disconnect::PROTOCOL));
    let mut ear = Ear::new(Role::Server, LIMITS, Some(NO_TAKEOVER));
    assert_eq!(
        ear.hear(&frame(true, true, Opcode::Ping, b"", Some(MASK))).error,
        Some(Disconnect::PROTOCOL)
    );
}

#[test]
fn headers_decode_to_what_was_encoded() {
    for payload_len in [0, 125, 126, 65_535, 65_536, i64::MAX as u64] {
        for mask in [None, Some(MASK)] {
            let header = wsproxy_proto::ws::frame::Header {
                fin: payload_len != 0,
                compressed: mask.is_none(),
                opcode: Opcode::Binary,
                mask,
                payload_len,
            };
            let encoded = wsproxy_proto::ws::frame::encode_header(&header);
            let bytes = encoded.as_ref();
            assert_eq!(decode_header(bytes), Ok(Some((header, bytes.len()))));
            for end in 0..bytes.len() {
                assert_eq!(decode_header(&bytes[..end]), Ok(None));
            }
        }
    }
}
