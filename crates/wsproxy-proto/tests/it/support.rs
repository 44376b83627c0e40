//! Parts that several tests use: events that own their bytes, frames of any shape, the number of cases of a property.

use proptest::{prelude::ProptestConfig, test_runner::RngSeed};
use wsproxy_proto::disconnect::Disconnect;
use wsproxy_proto::ws::deflate::{Inflaters, Params};
use wsproxy_proto::ws::frame::{Header, Kind, Opcode, Role, encode_header};
use wsproxy_proto::ws::receiver::{Event, Input, Limits, Receiver};

/// Configuration of a property that is tried so many times in the whole check, and a sixteenth of that in the
/// inner loop, where all tests of the crate together take a second or two. `PROPTEST_CASES` sets another number.
/// Failures are not written to a file.
pub(crate) fn cases(whole: u32) -> ProptestConfig {
    let is_whole = std::env::var_os("ALL_CASES").is_some();
    let usual = if is_whole { whole } else { whole / 16 };
    let wanted = std::env::var("PROPTEST_CASES").ok().and_then(|cases| cases.parse().ok());
    ProptestConfig {
        cases: wanted.unwrap_or(usual),
        max_shrink_iters: 20_000,
        failure_persistence: None,
        ..ProptestConfig::default()
    }
}

/// The same cases in each run: a check of a commit is about the commit. `PROPTEST_RNG_SEED`, a number, searches others.
pub(crate) fn same_each_time(config: ProptestConfig) -> ProptestConfig {
    let asks = |name| std::env::var_os(name).is_some();
    if asks("PROPTEST_CASES") || asks("PROPTEST_RNG_SEED") {
        return config;
    }
    ProptestConfig { rng_seed: RngSeed::Fixed(1), ..config }
}

/// Bytes without a pattern, the same for the same seed.
pub(crate) fn noise(mut seed: u64, length: usize) -> Vec<u8> {
    let next = || {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (seed >> 56) as u8
    };
    std::iter::repeat_with(next).take(length).collect()
}

/// An [`Event`] that owns its bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Said {
    Text(String),
    Binary(Vec<u8>),
    Ping(Vec<u8>),
    Pong(Vec<u8>),
    Close(Option<(u16, String)>),
}

impl From<Event<'_>> for Said {
    fn from(event: Event<'_>) -> Self {
        match event {
            Event::Message(Kind::Text, bytes) => {
                Self::Text(std::str::from_utf8(bytes).unwrap().into())
            }
            Event::Message(Kind::Binary, bytes) => Self::Binary(bytes.into()),
            Event::Ping(bytes) => Self::Ping(bytes.into()),
            Event::Pong(bytes) => Self::Pong(bytes.into()),
            Event::Close(close) => Self::Close(close.map(|(code, reason)| (code, reason.into()))),
        }
    }
}

/// Receiver with the events that it has returned so far.
pub(crate) struct Ear {
    pub(crate) receiver: Receiver,
    inflaters: Inflaters,
    pub(crate) said: Vec<Said>,
    pub(crate) error: Option<Disconnect>,
}

impl Ear {
    pub(crate) fn new(role: Role, limits: Limits, deflate: Option<Params>) -> Self {
        let receiver = Receiver::new(role, limits, deflate);
        Self { receiver, inflaters: Inflaters::default(), said: Vec::new(), error: None }
    }

    pub(crate) fn server() -> Self {
        Self::new(Role::Server, LIMITS, None)
    }

    pub(crate) fn hear(&mut self, bytes: &[u8]) -> &mut Self {
        let mut bytes = bytes.to_vec();
        let mut input = Input::new(&mut bytes);
        loop {
            match self.receiver.next(&mut input, &mut self.inflaters) {
                Ok(Some(event)) => self.said.push(event.into()),
                Ok(None) => break,
                Err(disconnect) => {
                    assert_eq!(self.error.replace(disconnect), None, "ended twice");
                }
            }
        }
        assert!(input.is_empty());
        self
    }
}

/// Returns the events that `bytes` are to a server, and the ending where they cause one.
pub(crate) fn heard(bytes: &[u8]) -> (Vec<Said>, Option<Disconnect>) {
    let mut ear = Ear::server();
    ear.hear(bytes);
    (ear.said, ear.error)
}

/// Encodes one frame, masked where `mask` is given.
pub(crate) fn frame(
    fin: bool,
    compressed: bool,
    opcode: Opcode,
    payload: &[u8],
    mask: Option<[u8; 4]>,
) -> Vec<u8> {
    let payload_len = payload.len() as u64;
    let header = Header { fin, compressed, opcode, mask, payload_len };
    let mut bytes = encode_header(&header).as_ref().to_vec();
    let mask = mask.unwrap_or_default();
    bytes.extend(payload.iter().enumerate().map(|(i, byte)| byte ^ mask[i % 4]));
    bytes
}

/// Encodes a masked, uncompressed frame of a client.
pub(crate) fn part(fin: bool, opcode: Opcode, payload: &[u8]) -> Vec<u8> {
    frame(fin, false, opcode, payload, Some(MASK))
}

pub(crate) const LIMITS: Limits = Limits { message_bytes_max: 1 << 20, fragments_max: 1024 };

pub(crate) const MASK: [u8; 4] = [0x37, 0xfa, 0x21, 0x3d];

pub(crate) const TAKEOVER: Params = Params {
    server_no_context_takeover: false,
    client_no_context_takeover: false,
    server_max_window_bits: 15,
    client_max_window_bits: 15,
};

pub(crate) const NO_TAKEOVER: Params =
    Params { server_no_context_takeover: true, client_no_context_takeover: true, ..TAKEOVER };
