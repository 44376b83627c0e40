//! Frames of any values and messages of any bytes.

use proptest::{collection::vec, prelude::*};
use wsproxy_proto::tunnel::{
    DATA_BYTES_MAX, STREAM_MAX, WINDOW_MAX,
    code::Code,
    frame::{
        Data, DataFlag, EncodeError, Frame, Frames, GoAway, Head, Health, Open, Pong, Reset,
        Source, StreamFrame,
    },
    headers::{HeaderBlock, Headers},
    hello::Hello,
};

use crate::bodies;

proptest! {
    #[test]
    fn any_bytes_are_read_without_a_panic(bytes in vec(any::<u8>(), 0..300)) {
        bodies::tunnel_frames(&bytes);
    }

    #[test]
    fn any_payload_of_a_known_type_is_read_without_a_panic(
        kind in 0u8..14,
        stream in prop_oneof![Just(0u32), Just(1), any::<u32>()],
        flags in 0u8..5,
        payload in vec(prop_oneof![Just(0u8), Just(1), any::<u8>()], 0..60),
    ) {
        let mut message = stream.to_be_bytes().to_vec();
        message.extend([kind, flags, 0, payload.len() as u8]);
        message.extend(payload);
        bodies::tunnel_frames(&message);
    }

    #[test]
    fn decoded_frames_are_the_encoded_ones(values in vec(frame(), 1..6)) {
        let values: Vec<_> = values.iter().map(Values::frame).collect();
        let mut message = Vec::new();
        values.iter().for_each(|frame| frame.encode(&mut message).unwrap());
        let read: Result<Vec<_>, _> = Frames::new(&message).unwrap().collect();
        prop_assert_eq!(read.unwrap(), values);
        bodies::tunnel_frames(&message);
    }
}

#[test]
fn a_frame_that_is_too_large_or_invalid_is_not_written() {
    let mut block = HeaderBlock::new();
    block.push(b"a", &[b'v'; 65_000]).unwrap();
    let path = vec![b'/'; 600];
    let open = Open { end: true, headers: block.headers(), ..Open::new(b"GET", &path) };
    let longer = vec![b'/'; 70_000];
    let data = Data { bytes: b"", flag: DataFlag::None };
    let mut out = b"before".to_vec();
    for (stream, frame, error) in [
        (1, StreamFrame::Open(open), EncodeError::TooLarge),
        (1, StreamFrame::Open(Open { path: &longer, ..open }), EncodeError::TooLarge),
        (1, StreamFrame::Open(Open { path: b"", ..open }), EncodeError::Invalid),
        (1, StreamFrame::Data(data), EncodeError::Invalid),
        (1, StreamFrame::Credit(0), EncodeError::Invalid),
        (0, StreamFrame::Credit(1), EncodeError::Invalid),
        (1 << 31, StreamFrame::Credit(1), EncodeError::Invalid),
    ] {
        assert_eq!(Frame::Stream(stream, frame).encode(&mut out), Err(error));
        assert_eq!(out, b"before");
    }
}

#[test]
fn texts_are_cut_between_characters() {
    let text = "ä".repeat(300);
    let reset = Reset { message: &text[..513 - 1], ..Reset::new(Code::Protocol) };
    let mut message = Vec::new();
    let long = format!("a{text}");
    let frame = StreamFrame::Reset(Reset { message: &long, ..reset });
    Frame::Stream(1, frame).encode(&mut message).unwrap();
    let cut = StreamFrame::Reset(Reset { message: &long[..511], ..reset });
    assert_eq!(Frames::new(&message).unwrap().next(), Some(Ok(Frame::Stream(1, cut))));
}

/// Values of one frame. Which of them count depends on the type.
#[derive(Debug, Clone)]
struct Values {
    kind: u8,
    stream: u32,
    flags: [bool; 5],
    numbers: (u32, u32, u64, u64),
    status: u16,
    code: u16,
    text: String,
    path: Vec<u8>,
    headers: HeaderBlock,
    bytes: Vec<u8>,
}

fn frame() -> impl Strategy<Value = Values> {
    let value = vec(prop_oneof![Just(b'\t'), b' '..=b'~', 0x80u8..], 0..20);
    let headers = vec(("[a-z0-9!_-]{1,9}", value), 0..5).prop_map(|headers| {
        let mut block = HeaderBlock::new();
        headers.iter().for_each(|(name, value)| block.push(name.as_bytes(), value).unwrap());
        block
    });
    let path = vec(prop_oneof![b'!'..=b'~', 0x80u8..], 0..40);
    let bytes = prop_oneof![
        9 => vec(any::<u8>(), 0..50),
        1 => (1..=DATA_BYTES_MAX).prop_map(|length| vec![7; length]),
    ];
    (
        (0u8..11, 1..=STREAM_MAX, any::<[bool; 5]>(), any::<(u32, u32, u64, u64)>()),
        (prop_oneof![Just(100u16), Just(101), 200u16..1000], 0u16..17, "\\PC{0,30}"),
        (path, headers, bytes),
    )
        .prop_map(
            |((kind, stream, flags, numbers), (status, code, text), (path, headers, bytes))| {
                let path = [b"/", &path[..]].concat();
                Values { kind, stream, flags, numbers, status, code, text, path, headers, bytes }
            },
        )
}

impl Values {
    fn frame(&self) -> Frame<'_> {
        let (a, b, c, d) = self.numbers;
        let code = Code::from_number(self.code);
        match self.kind {
            0 => Frame::Ping(c),
            1 => Frame::Pong(Pong { number: c, waited_us: a }),
            2 => Frame::GoAway(GoAway { last_stream: a & STREAM_MAX, code, drain_ms: b }),
            3 => Frame::Health(Health {
                upstream_ok: self.flags[0],
                upstream_round_trip_us: a,
                streams: b,
                memory_bytes: c,
                disk_free_bytes: d,
                text: &self.text,
            }),
            4 => Frame::Hello(Hello {
                versions: (1 + (a % 100) as u8, 100 + (b % 100) as u8),
                instance: &self.text,
                capabilities: c,
                streams_max: a,
                window: 1 + a % WINDOW_MAX,
                head_bytes_max: b,
                ping_ms: a,
                drain_ms: b,
                build: &self.text,
            }),
            _ => Frame::Stream(self.stream, self.of_stream(code)),
        }
    }

    fn of_stream(&self, code: Code) -> StreamFrame<'_> {
        let [one, two, three, four, five] = self.flags;
        let (number, headers): (u32, Headers<'_>) = (self.numbers.0, self.headers.headers());
        match self.kind {
            5 => StreamFrame::Open(Open {
                end: one,
                upgrade: two,
                long: three,
                expect: four,
                retried: five,
                head_ms: number,
                method: b"M-SEARCH",
                path: &self.path,
                headers,
            }),
            6 => StreamFrame::Head(Head {
                end: one && self.status != 100,
                status: self.status,
                source: if two { Source::Agent } else { Source::Upstream },
                headers,
            }),
            7 => {
                let flag = match (one, two) {
                    (true, _) => DataFlag::End,
                    (_, true) => DataFlag::Blocked,
                    _ if self.bytes.is_empty() => DataFlag::End,
                    _ => DataFlag::None,
                };
                StreamFrame::Data(Data { bytes: &self.bytes, flag })
            }
            8 => StreamFrame::Trailers(headers),
            9 => StreamFrame::Credit(1 + number % WINDOW_MAX),
            _ => StreamFrame::Reset(Reset {
                code,
                not_dispatched: one,
                head_sent: two,
                stop: three,
                retry_after_ms: number,
                message: &self.text,
            }),
        }
    }
}
