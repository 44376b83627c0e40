//! The messages of members, in the form of the gateway and in those of the servers beside it.

use clap::ValueEnum;

use super::fields::{Value, fields, push_bytes, push_float, push_number};

/// Form of the messages between a server and its members.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Dialect {
    /// The gateway's rooms: protobuf with a hello, in development mode.
    Rooms,
    /// The same envelopes at a server that relays bytes and says no hello.
    Relay,
    /// Socket.IO over a WebSocket: events in JSON.
    Socketio,
}

/// One move of one member, as another one saw it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Sight {
    /// The member that moved.
    pub(super) mover: u32,
    /// Number of the move, from 1.
    pub(super) number: u32,
    /// Intended time of sending, in microseconds of the crew's clock.
    pub(super) sent_us: u32,
}

/// A message from the server.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Told<'a> {
    /// The server is ready for this member's messages; with `more`, further ones of this kind follow.
    Hello {
        more: bool,
    },
    /// One move.
    Move(Sight),
    /// Newest moves of many; [`sights`] reads them.
    Batch(&'a [u8]),
    /// A member joined; left.
    Joined(u32),
    Left(u32),
    /// The server refuses a message, with this code.
    Refused(&'a str),
    /// The server waits for this answer.
    Answer(&'static [u8]),
    Other,
}

impl Dialect {
    /// Returns the path at which a member opens its room.
    pub(super) fn path(self, room: &str, member: u32) -> String {
        match self {
            Self::Rooms => format!("/ws/{room}?user_id=m{member}&client_id=m{member}"),
            Self::Relay => format!("/ws/{room}"),
            Self::Socketio => format!("/socket.io/?EIO=4&transport=websocket&room={room}"),
        }
    }

    /// Returns true where messages are text.
    pub(super) fn is_text(self) -> bool {
        self == Self::Socketio
    }

    /// Returns the first message of a member; `None` where it says nothing and is ready at once.
    pub(super) fn hello(self, batch: bool) -> Option<Vec<u8>> {
        match self {
            Self::Rooms => {
                let (mut hello, mut envelope) = (Vec::new(), Vec::new());
                push_number(60, 1, &mut hello);
                if batch {
                    push_bytes(61, b"batch", &mut hello);
                }
                push_bytes(10, &hello, &mut envelope);
                Some(envelope)
            }
            Self::Relay => None,
            Self::Socketio => Some(b"40".to_vec()),
        }
    }

    /// Writes one move.
    pub(super) fn push_move(self, sight: Sight, out: &mut Vec<u8>) {
        let Sight { mover, number, sent_us } = sight;
        if self == Self::Socketio {
            let text = format!(
                "42[\"move\",{{\"entityId\":\"e{mover}\",\"number\":{number},\"sent\":{sent_us},\"position\":{{\"x\":{number},\
                 \"y\":1.5,\"z\":-3.5}},\"rotation\":{{\"x\":0.1,\"y\":0.2,\"z\":0.3,\"w\":0.9}}}}]"
            );
            return out.extend_from_slice(text.as_bytes());
        }
        let (mut update, mut part) = (Vec::with_capacity(64), Vec::with_capacity(20));
        push_bytes(1, format!("e{mover}").as_bytes(), &mut update);
        for (field, value) in [(1, number as f32), (2, 1.5), (3, -3.5)] {
            push_float(field, value, &mut part);
        }
        push_bytes(2, &part, &mut update);
        part.clear();
        for (field, value) in [(1, 0.1), (2, 0.2), (3, 0.3), (4, 0.9)] {
            push_float(field, value, &mut part);
        }
        push_bytes(3, &part, &mut update);
        push_number(4, u64::from(sent_us), &mut update);
        push_bytes(20, &update, out);
    }

    /// Reads a message.
    pub(super) fn read(self, message: &[u8]) -> Told<'_> {
        match self {
            Self::Rooms | Self::Relay => read_envelope(message).unwrap_or(Told::Other),
            Self::Socketio => read_socketio(message),
        }
    }
}

/// Returns the moves of a batch.
pub(super) fn sights(batch: &[u8]) -> impl Iterator<Item = Sight> {
    fields(batch).filter_map(|(field, value)| {
        let (1, Value::Bytes(entry)) = (field, value) else { return None };
        fields(entry).find_map(|(field, value)| match (field, value) {
            (2, Value::Bytes(update)) => read_update(update),
            _ => None,
        })
    })
}

fn read_envelope(message: &[u8]) -> Option<Told<'_>> {
    fields(message).find_map(|(field, value)| {
        let Value::Bytes(payload) = value else { return None };
        match field {
            11 => Some(Told::Hello { more: number_of(payload, 66) != 0 }),
            20 => read_update(payload).map(Told::Move),
            50 => read_presence(payload),
            101 => Some(Told::Refused(text_of(payload, 1).unwrap_or("?"))),
            102 => Some(Told::Batch(payload)),
            _ => None,
        }
    })
}

fn read_update(update: &[u8]) -> Option<Sight> {
    let mut sight = Sight { mover: 0, number: 0, sent_us: 0 };
    for (field, value) in fields(update) {
        match (field, value) {
            (1, Value::Bytes(entity)) => sight.mover = index(entity, b'e')?,
            // A number of a member's move is far below 2^24, so that a float holds it exactly.
            (2, Value::Bytes(position)) => {
                if let Some((1, Value::Float(x))) = fields(position).next() {
                    sight.number = x as u32;
                }
            }
            (4, Value::Number(sent_us)) => sight.sent_us = u32::try_from(sent_us).ok()?,
            _ => {}
        }
    }
    (sight.number > 0).then_some(sight)
}

fn read_presence(event: &[u8]) -> Option<Told<'_>> {
    let member = index(text_of(event, 1)?.as_bytes(), b'm')?;
    Some(match number_of(event, 2) {
        0 => Told::Joined(member),
        1 => Told::Left(member),
        _ => Told::Other,
    })
}

fn number_of(message: &[u8], wanted: u64) -> u64 {
    let number = |(field, value)| match value {
        Value::Number(number) if field == wanted => Some(number),
        _ => None,
    };
    fields(message).find_map(number).unwrap_or(0)
}

fn text_of(message: &[u8], wanted: u64) -> Option<&str> {
    fields(message).find_map(|(field, value)| match value {
        Value::Bytes(text) if field == wanted => std::str::from_utf8(text).ok(),
        _ => None,
    })
}

/// Reads a letter and a number.
fn index(id: &[u8], letter: u8) -> Option<u32> {
    let (first, digits) = id.split_first()?;
    let number = std::str::from_utf8(digits).ok()?.parse().ok()?;
    (*first == letter).then_some(number)
}

/// Reads a packet of Engine.IO. Socket.IO writes the members of an object in the order in which they came.
fn read_socketio(message: &[u8]) -> Told<'_> {
    let Ok(text) = std::str::from_utf8(message) else { return Told::Other };
    match () {
        () if text.starts_with("42[") => read_event(text).map_or(Told::Other, Told::Move),
        () if text.starts_with("40") => Told::Hello { more: false },
        () if text == "2" => Told::Answer(b"3"),
        () if text.starts_with("44") => Told::Refused("connect_error"),
        () => Told::Other,
    }
}

fn read_event(text: &str) -> Option<Sight> {
    let mut rest = text.strip_prefix("42[\"move\",{\"entityId\":\"e")?;
    let mut next = |before: &str| {
        let behind = rest.strip_prefix(before)?;
        let end = behind.bytes().position(|byte| !byte.is_ascii_digit())?;
        rest = &behind[end..];
        behind[..end].parse().ok()
    };
    Some(Sight { mover: next("")?, number: next("\",\"number\":")?, sent_us: next(",\"sent\":")? })
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIGHT: Sight = Sight { mover: 99, number: 70_000, sent_us: 4_000_000_000 };

    #[test]
    fn moves_survive_the_way_in_every_dialect() {
        for dialect in [Dialect::Rooms, Dialect::Relay, Dialect::Socketio] {
            let mut message = Vec::new();
            dialect.push_move(SIGHT, &mut message);
            assert_eq!(dialect.read(&message), Told::Move(SIGHT), "{dialect:?}");
        }
    }

    #[test]
    fn moves_of_a_batch_are_read_one_by_one() {
        let mut single = Vec::new();
        Dialect::Rooms.push_move(SIGHT, &mut single);
        let Some((20, Value::Bytes(update))) = fields(&single).next() else { panic!() };
        let (mut entry, mut batch, mut envelope) = (Vec::new(), Vec::new(), Vec::new());
        push_bytes(1, b"m99", &mut entry);
        push_bytes(2, update, &mut entry);
        push_bytes(1, &entry, &mut batch);
        push_bytes(1, &entry, &mut batch);
        push_number(2, 7, &mut batch);
        push_bytes(102, &batch, &mut envelope);
        let Told::Batch(batch) = Dialect::Rooms.read(&envelope) else { panic!() };
        assert_eq!(sights(batch).collect::<Vec<_>>(), [SIGHT, SIGHT]);
    }

    #[test]
    fn presence_and_hello_are_told_apart() {
        let read = |field, parts: &[(u64, u64)]| {
            let (mut payload, mut envelope) = (Vec::new(), Vec::new());
            push_bytes(1, b"m7", &mut payload);
            for (field, number) in parts {
                push_number(*field, *number, &mut payload);
            }
            push_number(3, 40, &mut envelope);
            push_bytes(field, &payload, &mut envelope);
            format!("{:?}", Dialect::Rooms.read(&envelope))
        };
        assert_eq!(read(50, &[]), "Joined(7)");
        assert_eq!(read(50, &[(2, 1)]), "Left(7)");
        assert_eq!(read(50, &[(2, 2)]), "Other");
        assert_eq!(read(11, &[(66, 1)]), "Hello { more: true }");
        assert_eq!(read(11, &[]), "Hello { more: false }");
        assert_eq!(read(101, &[]), "Refused(\"m7\")");
    }
}
