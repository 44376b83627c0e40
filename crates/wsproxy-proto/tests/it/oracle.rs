//! The same bytes for tungstenite and for this crate, in both directions and both roles.

use std::io::{self, Cursor, Read, Write};

use proptest::prelude::*;
use tungstenite::error::{Error, ProtocolError};
use tungstenite::protocol::{CloseFrame, Message, Role as OracleRole, WebSocket};
use wsproxy_proto::disconnect::is_sendable;
use wsproxy_proto::ws::frame::{Opcode, Role, client_frame, close_payload, server_frame};

use crate::support::{Ear, LIMITS, MASK, Said, cases, frame, noise};

/// Peer that has sent everything already, and that collects what it gets.
struct Wire {
    incoming: Cursor<Vec<u8>>,
    outgoing: Vec<u8>,
}

impl Read for Wire {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.incoming.read(buffer)
    }
}

impl Write for Wire {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.outgoing.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn oracle(role: OracleRole, incoming: &[u8]) -> WebSocket<Wire> {
    let wire = Wire { incoming: Cursor::new(incoming.to_vec()), outgoing: Vec::new() };
    WebSocket::from_raw_socket(wire, role, None)
}

/// Returns the events of tungstenite, and whether the peer broke the rules.
fn oracle_hears(role: OracleRole, incoming: &[u8]) -> (Vec<Said>, bool) {
    let mut socket = oracle(role, incoming);
    let mut said = Vec::new();
    loop {
        match socket.read() {
            Ok(Message::Text(text)) => said.push(Said::Text(text.as_str().into())),
            Ok(Message::Binary(bytes)) => said.push(Said::Binary(bytes.to_vec())),
            Ok(Message::Ping(bytes)) => said.push(Said::Ping(bytes.to_vec())),
            Ok(Message::Pong(bytes)) => said.push(Said::Pong(bytes.to_vec())),
            // Tungstenite answers a bad code as if it were another one.
            Ok(Message::Close(Some(close))) if close.reason.as_str() == "Protocol violation" => {
                return (said, true);
            }
            Ok(Message::Close(close)) => {
                said.push(Said::Close(
                    close.map(|close| (close.code.into(), close.reason.as_str().into())),
                ));
                return (said, false);
            }
            Ok(Message::Frame(_)) => unreachable!(),
            Err(Error::Protocol(ProtocolError::ResetWithoutClosingHandshake)) => {
                return (said, false);
            }
            Err(_) => return (said, true),
        }
    }
}

/// Frames, most of which follow the rules.
fn frames(masked: bool) -> impl Strategy<Value = Vec<u8>> {
    let code = prop_oneof![1000..1016_u16, 2990..3010_u16, any::<u16>()]
        // This code was registered after tungstenite's table was made.
        .prop_filter("1014", |code| *code != 1014);
    let payload = prop_oneof![
        "\\PC{0,60}".prop_map(String::into_bytes),
        proptest::collection::vec(any::<u8>(), 0..60),
        proptest::collection::vec(any::<u8>(), 120..130),
        (code, "\\PC{0,30}")
            .prop_map(|(code, reason)| close_payload(code, &reason).as_ref().to_vec()),
    ];
    let opcode = prop_oneof![
        6 => Just(Opcode::Continuation),
        4 => Just(Opcode::Text),
        4 => Just(Opcode::Binary),
        3 => Just(Opcode::Ping),
        1 => Just(Opcode::Pong),
        1 => Just(Opcode::Close),
    ];
    let one = (opcode, payload, 0..100_u8, any::<bool>(), any::<[u8; 4]>()).prop_map(
        move |(opcode, payload, odd, fin, mask)| {
            let fin = fin || opcode.is_control() && odd != 0;
            let mask = (masked != (odd == 1)).then_some(mask);
            let mut bytes = frame(fin, odd == 2, opcode, &payload, mask);
            if odd == 3 {
                bytes[0] ^= 0x20;
            }
            if odd == 4 {
                bytes[0] ^= 0x04;
            }
            bytes
        },
    );
    proptest::collection::vec(one, 0..12).prop_map(|frames| frames.concat())
}

/// Encodes the frames that we send, in the order of `said`.
fn spell(said: &[Said], mask: Option<[u8; 4]>) -> Vec<u8> {
    let mut bytes = Vec::new();
    for said in said {
        let (opcode, payload) = match said {
            Said::Text(text) => (Opcode::Text, text.as_bytes().to_vec()),
            Said::Binary(payload) => (Opcode::Binary, payload.clone()),
            Said::Ping(payload) => (Opcode::Ping, payload.clone()),
            Said::Pong(payload) => (Opcode::Pong, payload.clone()),
            Said::Close(None) => (Opcode::Close, vec![]),
            Said::Close(Some((code, reason))) => {
                (Opcode::Close, close_payload(*code, reason).as_ref().to_vec())
            }
        };
        bytes.extend(match mask {
            Some(mask) => client_frame(opcode, &payload, false, mask),
            None => server_frame(opcode, &payload, false),
        });
    }
    bytes
}

fn said() -> impl Strategy<Value = Vec<Said>> {
    let control = || proptest::collection::vec(any::<u8>(), 0..=125);
    let size = prop_oneof![0..300_usize, 65_000..66_000_usize];
    let one = prop_oneof![
        "\\PC{0,200}".prop_map(Said::Text),
        (any::<u64>(), size).prop_map(|(seed, size)| Said::Binary(noise(seed, size))),
        control().prop_map(Said::Ping),
        control().prop_map(Said::Pong),
    ];
    let close = prop_oneof![
        Just(Said::Close(None)),
        (3000..5000_u16, "\\PC{0,30}").prop_map(|close| Said::Close(Some(close))),
    ];
    (proptest::collection::vec(one, 0..8), close).prop_map(|(mut said, close)| {
        said.push(close);
        said
    })
}

proptest! {
    #![proptest_config(cases(256))]

    #[test]
    fn the_oracle_hears_what_we_say(said in said(), mask in any::<Option<[u8; 4]>>()) {
        let role = if mask.is_some() { OracleRole::Server } else { OracleRole::Client };
        prop_assert_eq!(oracle_hears(role, &spell(&said, mask)), (said, false));
    }

    #[test]
    fn we_hear_what_the_oracle_says(said in said(), we_serve in any::<bool>()) {
        let (theirs, ours) = if we_serve {
            (OracleRole::Client, Role::Server)
        } else {
            (OracleRole::Server, Role::Client)
        };
        let mut socket = oracle(theirs, &[]);
        for said in &said {
            socket.send(match said {
                Said::Text(text) => Message::text(text.clone()),
                Said::Binary(payload) => Message::binary(payload.clone()),
                Said::Ping(payload) => Message::Ping(payload.clone().into()),
                Said::Pong(payload) => Message::Pong(payload.clone().into()),
                Said::Close(close) => Message::Close(close.clone().map(|(code, reason)| {
                    CloseFrame { code: code.into(), reason: reason.into() }
                })),
            }).unwrap();
        }
        let mut ear = Ear::new(ours, LIMITS, None);
        ear.hear(&socket.get_ref().outgoing);
        prop_assert_eq!((ear.said, ear.error), (said, None));
    }

    #[test]
    fn both_judge_the_same(
        (masked, bytes) in any::<bool>().prop_flat_map(|masked| (Just(masked), frames(masked)))
    ) {
        let (ours, theirs) = if masked {
            (Role::Server, OracleRole::Server)
        } else {
            (Role::Client, OracleRole::Client)
        };
        let mut ear = Ear::new(ours, LIMITS, None);
        ear.hear(&bytes);
        prop_assert_eq!((ear.said, ear.error.is_some()), oracle_hears(theirs, &bytes));
    }
}

#[test]
fn both_know_the_same_close_codes_but_one() {
    for code in 0..=u16::MAX {
        let close = frame(true, false, Opcode::Close, &code.to_be_bytes(), Some(MASK));
        let (_, refused) = oracle_hears(OracleRole::Server, &close);
        assert_eq!(is_sendable(code), !refused || code == 1014, "{code}");
    }
}
