//! What the tests share: events that own their bytes, and frames of any shape.

use wsproxy_proto::disconnect::Disconnect;
use wsproxy_proto::ws::deflate::{Inflaters, Params};
use wsproxy_proto::ws::frame::{Header, Kind, Opcode, Role, encode_header};
use wsproxy_proto::ws::receiver::{Event, Input, Limits, Receiver};

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

/// A receiver with what it has said so far.
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

/// What `bytes` say to a server, and how they end the connection if they do.
pub(crate) fn heard(bytes: &[u8]) -> (Vec<Said>, Option<Disconnect>) {
    let mut ear = Ear::server();
    ear.hear(bytes);
    (ear.said, ear.error)
}

/// One frame, masked where `mask` is given.
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

/// A masked, uncompressed frame of a client.
pub(crate) fn part(fin: bool, opcode: Opcode, payload: &[u8]) -> Vec<u8> {
    frame(fin, false, opcode, payload, Some(MASK))
}
