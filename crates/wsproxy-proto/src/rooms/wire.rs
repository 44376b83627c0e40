//! Messages of rooms between instances: a head, a kind and a body on a room's channel, and the records of members.
//!
//! Neither protobuf nor JSON begins as the head does. Payloads without a head are envelopes of workers.

use std::{fmt, str};

use bytes::{BufMut, Bytes, BytesMut};

/// Connection of a member, unique over all instances.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Connection {
    /// Number of the instance's incarnation.
    pub server: u64,
    /// Number of the connection in that process, from 1 on; 0 stands for no connection.
    pub number: u64,
}

impl Connection {
    /// Reads the printed form, as records and scripts have it: `<server in 16 hex digits>-<number>`.
    ///
    /// ```
    /// use wsproxy_proto::rooms::wire::Connection;
    ///
    /// let connection = Connection { server: 0xab, number: 7 };
    /// assert_eq!(connection.to_string(), "00000000000000ab-7");
    /// assert_eq!(Connection::parse("00000000000000ab-7"), Some(connection));
    /// assert_eq!(Connection::parse("ab-7"), None);
    /// ```
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let (server, number) = text.split_once('-')?;
        let is_hex = server.len() == 16 && server.bytes().all(|byte| byte.is_ascii_hexdigit());
        let is_decimal = !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit());
        if !is_hex || !is_decimal {
            return None;
        }
        let server = u64::from_str_radix(server, 16).ok()?;
        Some(Self { server, number: number.parse().ok()? })
    }
}

impl fmt::Display for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}-{}", self.server, self.number)
    }
}

/// Record of a member, as the hash of members holds it: `<connection> <user> <json>`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Record<'a> {
    /// Printed [`Connection`] that holds the member's place.
    pub connection: &'a str,
    /// Id of the user.
    pub user: &'a str,
    /// JSON object: server, since, name and presence.
    pub json: &'a str,
}

impl<'a> Record<'a> {
    /// Takes a record apart; `None` where it has no connection or no user.
    #[must_use]
    pub fn parse(text: &'a str) -> Option<Self> {
        let (connection, rest) = text.split_once(' ')?;
        let (user, json) = rest.split_once(' ')?;
        (!connection.is_empty() && !user.is_empty()).then_some(Self { connection, user, json })
    }

    /// Returns the connection; `None` where its text is not of an instance.
    #[must_use]
    pub fn connection(&self) -> Option<Connection> {
        Connection::parse(self.connection)
    }
}

impl fmt::Display for Record<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} {}", self.connection, self.user, self.json)
    }
}

/// Form of a relayed message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// Protobuf envelope.
    Envelope,
    /// Binary message that is no envelope; relayed byte for byte.
    Opaque,
    /// Text message that is no envelope; relayed byte for byte.
    OpaqueText,
}

/// Message with a head on the channel of a room.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Frame<'a> {
    /// Connection that sent the message, or for which a script ran. Its number is 0 where there is none.
    pub from: Connection,
    /// Kind and body.
    pub kind: Kind<'a>,
}

/// Kind of a [`Frame`] with its body.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind<'a> {
    /// `M`: a message of a member.
    Message {
        /// Form of the payload.
        form: Form,
        /// Envelope, or opaque bytes.
        payload: &'a [u8],
    },
    /// `B`: positions of a tick, as an envelope with a batch, and the connections of its entries.
    Batch(&'a [u8]),
    /// `E`: all of an entity again, as its EntitySnapshot. Instances that know it so tell no client.
    Entity(&'a [u8]),
    /// `J`: a client became a member.
    Join {
        /// Presence version that the join made.
        version: u64,
        /// Client id.
        client: &'a str,
        /// [`Record`] of the member.
        record: &'a str,
    },
    /// `L`: a member left.
    Leave {
        /// Presence version that the leave made.
        version: u64,
        /// Client id.
        client: &'a str,
    },
    /// `X`: a member has another connection.
    Replaced {
        /// Printed connection that held the place before. Its holder closes it.
        old_connection: &'a str,
        /// Client id.
        client: &'a str,
        /// New [`Record`] of the member.
        record: &'a str,
    },
    /// `K`: the API ends the connection of a member.
    Kick {
        /// Client id.
        client: &'a str,
        /// Reason for the close frame.
        reason: &'a str,
    },
    /// `C`: the API ends the connections of all members.
    Close {
        /// Reason for the close frame.
        reason: &'a str,
    },
}

/// Error of a payload that begins as messages of instances do, and is none that this version knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// The first bytes are of another version.
    #[error("has the head of another version")]
    UnknownVersion,
    /// The payload ends within the head.
    #[error("ends within its head")]
    Short,
    /// The kind is unknown.
    #[error("has an unknown kind")]
    UnknownKind,
    /// The body is not of the form that the kind has.
    #[error("has a body that its kind does not have")]
    BadBody,
}

impl<'a> Frame<'a> {
    /// Takes a payload of a room's channel apart; `None` for the envelope of a worker, which has no head.
    ///
    /// # Errors
    /// The payload begins with the byte `FF` and is no message of this version.
    pub fn parse(payload: &'a [u8]) -> Result<Option<Self>, WireError> {
        if payload.first() != Some(&MAGIC[0]) {
            return Ok(None);
        }
        let Some(rest) = payload.strip_prefix(&MAGIC) else {
            let is_cut = MAGIC.starts_with(payload);
            return Err(if is_cut { WireError::Short } else { WireError::UnknownVersion });
        };
        let (head, body) = rest.split_at_checked(1 + ORIGIN_BYTES).ok_or(WireError::Short)?;
        let number = |from: usize| {
            head[from..from + 8].iter().fold(0, |number, byte| number << 8 | u64::from(*byte))
        };
        let from = Connection { server: number(1), number: number(9) };
        let kind = Kind::parse(head[0], head[17], body)?;
        Ok(Some(Self { from, kind }))
    }
}

impl<'a> Kind<'a> {
    fn parse(kind: u8, flags: u8, body: &'a [u8]) -> Result<Self, WireError> {
        match kind {
            b'M' => return Ok(Self::Message { form: Form::of(flags), payload: body }),
            b'B' => return Ok(Self::Batch(body)),
            b'E' => return Ok(Self::Entity(body)),
            b'J' | b'L' | b'X' | b'K' | b'C' => {}
            _ => return Err(WireError::UnknownKind),
        }
        let body = str::from_utf8(body).map_err(|_| WireError::BadBody)?;
        Self::parse_text(kind, body).ok_or(WireError::BadBody)
    }

    fn parse_text(kind: u8, body: &'a str) -> Option<Self> {
        let kind = match kind {
            b'J' => {
                let (version, rest) = body.split_once(' ')?;
                let (client, record) = rest.split_once(' ')?;
                Record::parse(record)?;
                Self::Join { version: version.parse().ok()?, client, record }
            }
            b'L' => {
                let (version, client) = body.split_once(' ')?;
                Self::Leave { version: version.parse().ok()?, client }
            }
            b'X' => {
                let (old_connection, rest) = body.split_once(' ')?;
                let (client, record) = rest.split_once(' ')?;
                Record::parse(record)?;
                Self::Replaced { old_connection, client, record }
            }
            b'K' => {
                let (client, reason) = body.split_once(' ')?;
                Self::Kick { client, reason }
            }
            _ => Self::Close { reason: body },
        };
        Some(kind)
    }
}

impl Form {
    const fn of(flags: u8) -> Self {
        match flags {
            flags if flags & FLAG_OPAQUE_TEXT != 0 => Self::OpaqueText,
            flags if flags & FLAG_OPAQUE != 0 => Self::Opaque,
            _ => Self::Envelope,
        }
    }

    const fn flags(self) -> u8 {
        match self {
            Self::Envelope => 0,
            Self::Opaque => FLAG_OPAQUE,
            Self::OpaqueText => FLAG_OPAQUE_TEXT,
        }
    }
}

/// Returns the part of a head that the scripts put behind the kind: server, connection and flags.
#[must_use]
pub fn origin(from: Connection, form: Form) -> [u8; ORIGIN_BYTES] {
    let mut origin = [0; ORIGIN_BYTES];
    origin[..8].copy_from_slice(&from.server.to_be_bytes());
    origin[8..16].copy_from_slice(&from.number.to_be_bytes());
    origin[16] = form.flags();
    origin
}

/// Appends the head of a message of a member (`M`). Its payload follows.
pub fn write_message_head(from: Connection, form: Form, out: &mut BytesMut) {
    write_head(b'M', from, form, out);
}

/// Encodes positions of a tick (`B`): an envelope with a batch, and behind it the field with the connections of its entries.
#[must_use]
pub fn batch(from: Connection, envelope: &[u8], connections: &[u8]) -> Bytes {
    whole(b'B', from, Form::Envelope, &[envelope, connections])
}

/// Encodes an entity that is told again (`E`), as the script that joins does.
#[must_use]
pub fn entity(from: Connection, snapshot: &[u8]) -> Bytes {
    whole(b'E', from, Form::Envelope, &[snapshot])
}

/// Encodes a message of a member (`M`).
#[must_use]
pub fn message(from: Connection, form: Form, payload: &[u8]) -> Bytes {
    whole(b'M', from, form, &[payload])
}

/// Encodes a join (`J`), as the script does.
#[must_use]
pub fn join(from: Connection, version: u64, client: &str, record: &str) -> Bytes {
    let version = version.to_string();
    let parts = [version.as_str(), " ", client, " ", record].map(str::as_bytes);
    whole(b'J', from, Form::Envelope, &parts)
}

/// Encodes a leave (`L`), as the script does.
#[must_use]
pub fn leave(from: Connection, version: u64, client: &str) -> Bytes {
    let version = version.to_string();
    whole(b'L', from, Form::Envelope, &[version.as_str(), " ", client].map(str::as_bytes))
}

/// Encodes the replacement of a connection (`X`), as the script does.
#[must_use]
pub fn replaced(from: Connection, old_connection: &str, client: &str, record: &str) -> Bytes {
    let parts = [old_connection, " ", client, " ", record].map(str::as_bytes);
    whole(b'X', from, Form::Envelope, &parts)
}

/// Encodes a kick (`K`).
#[must_use]
pub fn kick(from: Connection, client: &str, reason: &str) -> Bytes {
    whole(b'K', from, Form::Envelope, &[client, " ", reason].map(str::as_bytes))
}

/// Encodes the end of all connections of a room (`C`).
#[must_use]
pub fn close(from: Connection, reason: &str) -> Bytes {
    whole(b'C', from, Form::Envelope, &[reason.as_bytes()])
}

/// Returns whether a worker must not publish `payload` into a room: it begins as messages of instances do.
#[must_use]
pub fn is_reserved(payload: &[u8]) -> bool {
    payload.first() == Some(&MAGIC[0])
}

/// Returns the field of an entity in the hashes of entities and positions: `<client> <entity>`.
#[must_use]
pub fn field(client: &str, entity: &str) -> String {
    format!("{client} {entity}")
}

/// Takes the field of an entity apart, into client and entity.
#[must_use]
pub fn parse_field(field: &[u8]) -> Option<(&str, &str)> {
    str::from_utf8(field).ok()?.split_once(' ')
}

fn whole(kind: u8, from: Connection, form: Form, parts: &[&[u8]]) -> Bytes {
    let bytes = parts.iter().map(|part| part.len()).sum::<usize>();
    let mut out = BytesMut::with_capacity(HEAD_BYTES + bytes);
    write_head(kind, from, form, &mut out);
    parts.iter().for_each(|part| out.put_slice(part));
    out.freeze()
}

fn write_head(kind: u8, from: Connection, form: Form, out: &mut BytesMut) {
    out.reserve(HEAD_BYTES);
    out.put_slice(&MAGIC);
    out.put_u8(kind);
    out.put_slice(&origin(from, form));
}

/// Length of a head, in bytes.
pub const HEAD_BYTES: usize = MAGIC.len() + 1 + ORIGIN_BYTES;

/// Length of the part of a head behind the kind, in bytes.
pub const ORIGIN_BYTES: usize = 17;

/// First bytes of all messages of instances: a byte that no UTF-8 and no protobuf envelope begins with, a letter, and
/// the version.
const MAGIC: [u8; 3] = [0xff, b'R', 1];
const FLAG_OPAQUE: u8 = 1;
const FLAG_OPAQUE_TEXT: u8 = 2;

#[cfg(test)]
mod tests {
    use super::*;

    const FROM: Connection = Connection { server: 0x0102_0304_0506_0708, number: 9 };
    const RECORD: &str = "0102030405060708-9 alice {\"name\":\"A b\"}";

    fn kind(payload: &[u8]) -> Kind<'_> {
        let frame = Frame::parse(payload).unwrap().unwrap();
        assert_eq!(frame.from, FROM);
        frame.kind
    }

    #[test]
    fn frames_are_read_as_they_were_written() {
        for form in [Form::Envelope, Form::Opaque, Form::OpaqueText] {
            let payload: &[u8] = b"\x08\x01";
            assert_eq!(kind(&message(FROM, form, payload)), Kind::Message { form, payload });
        }
        assert_eq!(kind(&batch(FROM, b"posi", b"tions")), Kind::Batch(b"positions"));
        assert_eq!(kind(&entity(FROM, b"snapshot")), Kind::Entity(b"snapshot"));
        let join = join(FROM, 7, "phone", RECORD);
        assert_eq!(kind(&join), Kind::Join { version: 7, client: "phone", record: RECORD });
        let gone = leave(FROM, u64::MAX, "phone");
        assert_eq!(kind(&gone), Kind::Leave { version: u64::MAX, client: "phone" });
        let other = replaced(FROM, "0000000000000001-2", "phone", RECORD);
        let old_connection = "0000000000000001-2";
        assert_eq!(
            kind(&other),
            Kind::Replaced { old_connection, client: "phone", record: RECORD }
        );
        let kicked = kick(FROM, "phone", "was rude");
        assert_eq!(kind(&kicked), Kind::Kick { client: "phone", reason: "was rude" });
        assert_eq!(kind(&close(FROM, "the end")), Kind::Close { reason: "the end" });
    }

    #[test]
    fn head_has_the_bytes_of_the_specification() {
        let frame = message(FROM, Form::Opaque, b"x");
        assert_eq!(
            &frame[..],
            b"\xffR\x01M\x01\x02\x03\x04\x05\x06\x07\x08\0\0\0\0\0\0\0\x09\x01x"
        );
        assert_eq!(frame.len(), HEAD_BYTES + 1);
    }

    #[test]
    fn payload_of_a_worker_has_no_head() {
        for payload in [&b""[..], b"{\"chat\":1}", b"\x0a\x01a", b"R\x01"] {
            assert_eq!(Frame::parse(payload), Ok(None));
            assert!(!is_reserved(payload));
        }
    }

    #[test]
    fn payload_with_a_broken_head_is_an_error() {
        let bad = |kind: u8, body: &[u8]| {
            Frame::parse(&whole(kind, FROM, Form::Envelope, &[body])).unwrap_err()
        };
        for kind in *b"JLXK" {
            assert_eq!(bad(kind, b"nothing"), WireError::BadBody);
            assert_eq!(bad(kind, b"\xff \xff"), WireError::BadBody);
        }
        assert_eq!(bad(b'J', b"1 phone no-record"), WireError::BadBody);
        assert_eq!(bad(b'J', b"-1 phone k a {}"), WireError::BadBody);
        assert_eq!(bad(b'Z', b""), WireError::UnknownKind);
        let whole = close(FROM, "");
        for cut in 1..whole.len() {
            assert_eq!(Frame::parse(&whole[..cut]), Err(WireError::Short));
        }
        for strange in [&b"\xffH2 "[..], b"\xffR\x02M"] {
            assert_eq!(Frame::parse(strange), Err(WireError::UnknownVersion));
            assert!(is_reserved(strange));
        }
    }

    #[test]
    fn record_keeps_spaces_of_its_json() {
        let record = Record::parse(RECORD).unwrap();
        assert_eq!((record.connection(), record.user), (Some(FROM), "alice"));
        assert_eq!(record.json, "{\"name\":\"A b\"}");
        assert_eq!(record.to_string(), RECORD);
        for bad in ["", "k", "k alice", " alice {}", "k  {}"] {
            assert_eq!(Record::parse(bad), None, "{bad:?}");
        }
    }
}
