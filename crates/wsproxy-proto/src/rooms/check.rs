//! Judges one envelope: whether it is one, what it says, and whether this client may say it.
//!
//! Nothing here is copied: a checked message borrows from its bytes, and relaying a position allocates nothing.

mod payload;

use super::fields::{Fields, Malformed, Value};
use super::schema;
use super::stamp::Stamp;
use super::v1::MessageType;

/// Reasons for which a message is not relayed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// No decoder finds a known payload in it. With `validate = "relay"` such a message passes byte for byte.
    #[error("no envelope with a payload")]
    NoEnvelope,
    /// An envelope that some decoder would refuse or read otherwise, or one beyond a limit.
    #[error("invalid message: {0}")]
    Invalid(&'static str),
    /// Clients do not send this kind of message.
    #[error("clients do not send {0}")]
    NotAllowed(&'static str),
    /// The named field names another client than the sender.
    #[error("{0} is not the sender")]
    WrongSender(&'static str),
}

impl Refused {
    /// Code of the Error that the client gets.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::NoEnvelope | Self::Invalid(_) => "invalid_message",
            Self::NotAllowed(_) => "not_allowed",
            Self::WrongSender(_) => "wrong_sender",
        }
    }
}

/// Kinds of payloads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[expect(missing_docs, reason = "the variants are the payloads of rooms.proto")]
pub enum Kind {
    ClientHello,
    ServerHello,
    Position,
    Spawn,
    Update,
    Despawn,
    Chat,
    Presence,
    Ack,
    Error,
    Batch,
    Custom,
}

impl Kind {
    /// All kinds.
    pub const ALL: [Self; 12] = [
        Self::ClientHello,
        Self::ServerHello,
        Self::Position,
        Self::Spawn,
        Self::Update,
        Self::Despawn,
        Self::Chat,
        Self::Presence,
        Self::Ack,
        Self::Error,
        Self::Batch,
        Self::Custom,
    ];

    /// Name of the payload's field, which is also the label in metrics.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::ClientHello => "client_hello",
            Self::ServerHello => "server_hello",
            Self::Position => "position_update",
            Self::Spawn => "entity_spawn",
            Self::Update => "entity_update",
            Self::Despawn => "entity_despawn",
            Self::Chat => "chat_message",
            Self::Presence => "presence_event",
            Self::Ack => "ack",
            Self::Error => "error",
            Self::Batch => "position_batch",
            Self::Custom => "custom",
        }
    }

    /// Whether a client may send it.
    #[must_use]
    pub fn is_from_clients(self) -> bool {
        !matches!(self, Self::ServerHello | Self::Error | Self::Batch)
    }

    pub(super) fn of(field: u32) -> Option<Self> {
        Some(match field {
            10 => Self::ClientHello,
            11 => Self::ServerHello,
            20 => Self::Position,
            30 => Self::Spawn,
            31 => Self::Update,
            32 => Self::Despawn,
            40 => Self::Chat,
            50 => Self::Presence,
            100 => Self::Ack,
            101 => Self::Error,
            102 => Self::Batch,
            105 => Self::Custom,
            _ => return None,
        })
    }
}

/// Valid envelope.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Checked<'a> {
    /// Kind of the payload.
    pub kind: Kind,
    /// Fields that the gateway's stamp must add or overrule.
    pub stamp: Stamp,
    /// Whether the sender asks for acknowledgements.
    pub reliable: bool,
    /// Client that the message is for; `None`: all members of the room.
    pub to: Option<&'a str>,
    /// Id that the sender chose, empty without one.
    pub message_id: &'a str,
    /// Client id that the last stamp names; what the message itself says where it has none.
    pub sender: &'a str,
    /// Parts of the payload that the gateway reads.
    pub body: Body<'a>,
}

/// Parts of a payload that the gateway reads.
///
/// The bytes of a payload are as the sender wrote them, unknown fields included.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Body<'a> {
    /// First message of a client.
    Hello(Hello<'a>),
    /// Newest place of an entity: `update` is a PositionUpdate.
    #[expect(missing_docs, reason = "the variant tells")]
    Position { entity: &'a str, update: &'a [u8] },
    /// Begin of an entity: `spawn` is an EntitySpawn, with an `owner` if the sender named one.
    #[expect(missing_docs, reason = "the variant tells")]
    Spawn { entity: &'a str, owner: &'a str, spawn: &'a [u8] },
    /// Change of an entity: `update` is an EntityUpdate.
    #[expect(missing_docs, reason = "the variant tells")]
    Update { entity: &'a str, update: &'a [u8] },
    /// End of an entity.
    #[expect(missing_docs, reason = "the variant tells")]
    Despawn { entity: &'a str },
    /// Chat message; `from` is empty if the sender did not name itself.
    #[expect(missing_docs, reason = "the variant tells")]
    Chat { from: &'a str },
    /// Presence event; `client` is empty if the sender did not name itself; `data` is a PresenceData.
    #[expect(missing_docs, reason = "the variant tells")]
    Presence { event: Event, client: &'a str, data: Option<&'a [u8]> },
    /// Acknowledgement.
    Ack(Acked<'a>),
    /// Message of an application.
    #[expect(missing_docs, reason = "the variant tells")]
    Custom { name: &'a str, data: &'a [u8] },
    /// ServerHello, Error or PositionBatch, of which the gateway reads nothing.
    Other,
}

/// Kinds of presence events.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Event {
    /// A member came.
    Join,
    /// A member left.
    Leave,
    /// A member changed what others see of it.
    Update,
}

/// A client's words about itself in its first message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hello<'a> {
    /// Highest version that the client speaks, at least 1.
    pub version: u32,
    /// Whether the client reads batches of positions.
    pub batch: bool,
    /// Whether the client acknowledges reliable messages.
    pub acks: bool,
    /// Name for others, empty without one.
    pub display_name: &'a str,
    /// A PresenceData.
    pub presence: Option<&'a [u8]>,
}

/// Which messages a client acknowledges.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Acked<'a> {
    /// All messages up to this number.
    pub seq: u64,
    ack: &'a [u8],
}

impl<'a> Acked<'a> {
    /// Numbers of further messages, in any order; some may be repeated.
    pub fn more(&self) -> impl Iterator<Item = u64> + 'a {
        let mut fields = Fields::of(self.ack);
        let mut packed = Fields::of(&[]);
        std::iter::from_fn(move || {
            loop {
                if let Ok(Some(number)) = packed.next_packed() {
                    return Some(number);
                }
                match fields.next() {
                    Ok(Some((2, Value::Varint(number)))) => return Some(number),
                    Ok(Some((2, Value::Bytes(bytes)))) => packed = Fields::of(bytes),
                    Ok(Some(_)) => {}
                    Ok(None) | Err(Malformed) => return None,
                }
            }
        })
    }
}

/// Judges the envelope of the client `from`.
///
/// # Errors
/// Any [`Refused`].
pub fn check<'a>(envelope: &'a [u8], from: &str) -> Result<Checked<'a>, Refused> {
    let checked = read(envelope)?;
    if !checked.kind.is_from_clients() {
        return Err(Refused::NotAllowed(checked.kind.name()));
    }
    let (field, named) = match checked.body {
        Body::Presence { event: Event::Join, .. } => {
            return Err(Refused::NotAllowed("PRESENCE_JOIN"));
        }
        Body::Presence { event: Event::Leave, .. } => {
            return Err(Refused::NotAllowed("PRESENCE_LEAVE"));
        }
        Body::Presence { client, .. } => ("client_id", client),
        Body::Spawn { owner, .. } => ("owner_id", owner),
        Body::Chat { from } => ("from_client_id", from),
        _ => return Ok(checked),
    };
    if named.is_empty() || named == from { Ok(checked) } else { Err(Refused::WrongSender(field)) }
}

/// Judges an envelope of any sender: a worker may send every kind.
///
/// # Errors
/// [`Refused::NoEnvelope`] and [`Refused::Invalid`].
pub fn read(envelope: &[u8]) -> Result<Checked<'_>, Refused> {
    let head = Head::of(envelope)?;
    let (kind, payload) = head.payload.ok_or(Refused::NoEnvelope)?;
    if let Some(fault) = head.fault {
        return Err(Refused::Invalid(fault));
    }
    let body = payload::read(kind, payload).map_err(Refused::Invalid)?;
    let expected = message_type(kind, &body);
    if head.message_type != 0 && expected.map(|expected| expected as i32) != Some(head.message_type)
    {
        return Err(Refused::Invalid("a type that contradicts the payload"));
    }
    let message_type = if head.message_type == 0 { expected } else { None };
    Ok(Checked {
        kind,
        stamp: Stamp { message_type, overrules_seq: head.seq != 0 },
        reliable: head.reliable,
        to: (!head.to.is_empty()).then_some(head.to),
        message_id: head.message_id,
        sender: head.sender,
        body,
    })
}

/// Returns the kind of an envelope that was checked or written here, without reading its payload.
#[must_use]
pub fn kind_of(envelope: &[u8]) -> Option<Kind> {
    let mut fields = Fields::of(envelope);
    while let Ok(Some((number, _))) = fields.next() {
        if let Some(kind) = Kind::of(number) {
            return Some(kind);
        }
    }
    None
}

/// Returns the entity of a PositionUpdate; `None` if it is not valid.
#[must_use]
pub fn entity_of(update: &[u8]) -> Option<&str> {
    payload::entity(&schema::POSITION, update).ok()
}

/// Message id of a message that may be invalid, for the Error about it. Empty where none is found.
#[must_use]
pub fn message_id(envelope: &[u8]) -> &str {
    let mut fields = Fields::of(envelope);
    let mut found = "";
    while let Ok(Some((number, value))) = fields.next() {
        if let (1, Value::Bytes(bytes)) = (number, value) {
            found = schema::id(bytes).unwrap_or_default();
        }
    }
    found
}

/// Fields of an envelope before its payload is looked at.
#[derive(Default)]
struct Head<'a> {
    message_id: &'a str,
    sender: &'a str,
    message_type: i32,
    payload: Option<(Kind, &'a [u8])>,
    reliable: bool,
    seq: u64,
    to: &'a str,
    /// First fault in bytes that are protobuf. It counts only if there is a payload.
    fault: Option<&'static str>,
}

impl<'a> Head<'a> {
    /// Reads all fields, also behind a fault: a decoder that is more lenient would find the payload.
    fn of(envelope: &'a [u8]) -> Result<Self, Refused> {
        let mut fields = Fields::of(envelope);
        let mut head = Self::default();
        while let Some((number, value)) = fields.next().map_err(|Malformed| Refused::NoEnvelope)? {
            if let Err(fault) = head.take(number, value) {
                head.fault = head.fault.or(Some(fault));
            }
        }
        if fields.overlong {
            head.fault = head.fault.or(Some(schema::OVERLONG));
        }
        Ok(head)
    }

    #[inline]
    fn take(&mut self, number: u32, value: Value<'a>) -> Result<(), &'static str> {
        match (number, value) {
            (1, Value::Bytes(bytes)) => self.message_id = schema::id(bytes)?,
            (2, Value::Varint(_)) => {}
            #[expect(clippy::cast_possible_truncation, reason = "as all decoders do")]
            (3, Value::Varint(number)) => self.message_type = number as i32,
            (60, Value::Bytes(bytes)) => self.sender = schema::id(bytes)?,
            (61, Value::Varint(number)) => self.reliable = number != 0,
            (62, Value::Varint(number)) => self.seq = number,
            (64, Value::Bytes(bytes)) => self.to = schema::id(bytes)?,
            (_, Value::Group) => return Err(schema::GROUP),
            (1 | 2 | 3 | 60 | 61 | 62 | 64, _) => return Err(schema::WIRE_TYPE),
            (number, value) => {
                if let Some(kind) = Kind::of(number) {
                    let Value::Bytes(bytes) = value else { return Err(schema::WIRE_TYPE) };
                    // Decoders differ in which of two they take, and in whether they merge the same one.
                    if self.payload.replace((kind, bytes)).is_some() {
                        return Err("more than one payload");
                    }
                }
            }
        }
        Ok(())
    }
}

/// The type that an envelope with this payload has; `None`: it has none.
fn message_type(kind: Kind, body: &Body<'_>) -> Option<MessageType> {
    Some(match (kind, body) {
        (Kind::ClientHello, _) => MessageType::ClientHello,
        (Kind::ServerHello, _) => MessageType::ServerHello,
        (Kind::Position, _) => MessageType::PositionUpdate,
        (Kind::Spawn, _) => MessageType::EntitySpawn,
        (Kind::Update, _) => MessageType::EntityUpdate,
        (Kind::Despawn, _) => MessageType::EntityDespawn,
        (Kind::Chat, _) => MessageType::ChatMessage,
        (_, Body::Presence { event: Event::Join, .. }) => MessageType::PresenceJoin,
        (_, Body::Presence { event: Event::Leave, .. }) => MessageType::PresenceLeave,
        (_, Body::Presence { event: Event::Update, .. }) => MessageType::PresenceUpdate,
        _ => return None,
    })
}
