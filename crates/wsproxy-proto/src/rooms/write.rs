//! Envelopes that the gateway itself sends, as protobuf. Their text is made by [`to_text`](super::text::to_text).

use buffa::{EnumValue, Message as _, MessageField};
use bytes::Bytes;

use super::check::Event;
use super::fields::{Fields, Value};
use super::stamp::varint;
use super::v1::envelope::Payload;
use super::v1::{self, Envelope, Limits, MessageType, PresenceData, PresenceEvent};

/// Entity of a room for a client that joins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entity<'a> {
    /// Client id of its member.
    pub owner: &'a str,
    /// Its id.
    pub id: &'a str,
    /// Its EntitySnapshot; `None` if it was never spawned and only its position is known.
    pub snapshot: Option<&'a [u8]>,
    /// Its newest PositionUpdate.
    pub position: Option<&'a [u8]>,
}

/// Bounds of one page of a room's state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PageLimits {
    /// Entities and players of one page.
    pub items_max: usize,
    /// Bytes of one page. One item may exceed them.
    pub bytes_max: usize,
}

impl PageLimits {
    /// Bounds of pages that clients get.
    pub const DEFAULT: Self = Self { items_max: 1000, bytes_max: 1 << 20 };
}

/// Writes the state of a room in pages, each of which is a WorldState. There is at least one. Every item of `players` is
/// a PlayerSnapshot; [`server_hello`] puts a client's own words around a page.
pub fn state_pages<'a>(
    players: impl IntoIterator<Item = &'a [u8]>,
    entities: impl IntoIterator<Item = Entity<'a>>,
    timestamp_ms: i64,
    limits: PageLimits,
) -> Vec<Bytes> {
    let mut pages = Pages { whole: Vec::new(), page: Vec::new(), items: 0, timestamp_ms, limits };
    let mut item = Vec::new();
    for player in players {
        item.clear();
        bytes_field(2, player, &mut item);
        pages.push(&item);
    }
    let mut snapshot = Vec::new();
    for entity in entities {
        item.clear();
        snapshot.clear();
        entity_snapshot(&entity, &mut snapshot);
        bytes_field(1, &snapshot, &mut item);
        pages.push(&item);
    }
    pages.close();
    pages.whole
}

struct Pages {
    whole: Vec<Bytes>,
    page: Vec<u8>,
    items: usize,
    timestamp_ms: i64,
    limits: PageLimits,
}

impl Pages {
    fn push(&mut self, item: &[u8]) {
        let full = self.items >= self.limits.items_max
            || self.page.len() + item.len() > self.limits.bytes_max;
        if full && self.items > 0 {
            self.close();
        }
        self.page.extend_from_slice(item);
        self.items += 1;
    }

    fn close(&mut self) {
        let mut page = std::mem::take(&mut self.page);
        number_field(3, self.timestamp_ms as u64, &mut page);
        self.whole.push(page.into());
        self.items = 0;
    }
}

pub(super) fn entity_snapshot(entity: &Entity<'_>, out: &mut Vec<u8>) {
    match entity.snapshot {
        Some(snapshot) => out.extend_from_slice(snapshot),
        None => bytes_field(1, entity.id.as_bytes(), out),
    }
    // A snapshot is made of a spawn and its updates, none of which has a place, so nothing is merged here.
    let mut fields = Fields::of(entity.position.unwrap_or_default());
    while let Ok(Some((number, value))) = fields.next() {
        if let (2 | 3, Value::Bytes(place)) = (number, value) {
            bytes_field(number + 1, place, out);
        }
    }
    bytes_field(60, entity.owner.as_bytes(), out);
}

/// Contents of a ServerHello that are one client's own.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Welcome<'a> {
    /// Version of the gateway, for people.
    pub server_version: &'a str,
    /// Client id of the client.
    pub client: &'a str,
    /// Room.
    pub room: &'a str,
    /// Version of the protocol, the lower of both sides'.
    pub version: u32,
    /// Whether the client gets batches of positions.
    pub batch: bool,
    /// Whether the client gets reliable messages with numbers.
    pub acks: bool,
    /// Id of the connection.
    pub connection: &'a str,
    /// Version of the room's members.
    pub presence_version: u64,
    /// Limits of the client.
    pub limits: &'a Limits,
}

impl Welcome<'_> {
    /// Returns the ServerHello without the state, and whether `more` pages follow.
    pub(super) fn server_hello(&self, more: bool) -> v1::ServerHello {
        let features = [("batch", self.batch), ("acks", self.acks)];
        v1::ServerHello {
            server_version: self.server_version.to_owned(),
            assigned_client_id: self.client.to_owned(),
            room_id: self.room.to_owned(),
            version: self.version,
            features: features
                .iter()
                .filter(|(_, on)| *on)
                .map(|(name, _)| (*name).into())
                .collect(),
            connection_id: self.connection.to_owned(),
            presence_version: self.presence_version,
            limits: MessageField::some(self.limits.clone()),
            more,
            ..v1::ServerHello::default()
        }
    }
}

/// Writes the ServerHello with one page of the state, and says whether `more` pages follow.
#[must_use]
pub fn server_hello(welcome: &Welcome<'_>, page: &[u8], more: bool) -> Vec<u8> {
    let mut hello = welcome.server_hello(more).encode_to_vec();
    length_field(4, page.len(), &mut hello);
    let bytes = hello.len() + page.len();
    let mut envelope = Vec::with_capacity(field_bytes(11, bytes) + 2);
    number_field(3, MessageType::ServerHello as u64, &mut envelope);
    length_field(11, bytes, &mut envelope);
    // A page is large: it is copied once.
    envelope.extend_from_slice(&hello);
    envelope.extend_from_slice(page);
    envelope
}

/// Writes an Error about the message `message_id` (empty: of none). `retry_after_ms` is 0 where waiting does not help.
#[must_use]
pub fn error(code: &str, message: &str, retry_after_ms: u32, message_id: &str) -> Bytes {
    let error = v1::Error {
        code: code.to_owned(),
        message: message.to_owned(),
        retry_after_ms,
        message_id: message_id.to_owned(),
    };
    envelope(None, "", 0, Payload::Error(Box::new(error)))
}

/// Writes a Custom message without a sender.
#[must_use]
pub fn custom(name: &str, data: &[u8]) -> Bytes {
    let custom = v1::Custom { name: name.to_owned(), data: data.to_vec() };
    envelope(None, "", 0, Payload::Custom(Box::new(custom)))
}

/// Writes the presence event of the member `client` at `version` of the room's members.
#[must_use]
pub fn presence(event: Event, client: &str, data: Option<&PresenceData>, version: u64) -> Bytes {
    let (event_type, message_type) = match event {
        Event::Join => (v1::presence_event::Type::Join, MessageType::PresenceJoin),
        Event::Leave => (v1::presence_event::Type::Leave, MessageType::PresenceLeave),
        Event::Update => (v1::presence_event::Type::Update, MessageType::PresenceUpdate),
    };
    let event = PresenceEvent {
        client_id: client.to_owned(),
        event_type: EnumValue::Known(event_type),
        data: data.cloned().map_or_else(MessageField::none, MessageField::some),
    };
    envelope(Some(message_type), client, version, Payload::PresenceEvent(Box::new(event)))
}

/// Writes the end of an entity of the member `owner`.
#[must_use]
pub fn despawn(entity: &str, owner: &str) -> Bytes {
    let despawn = v1::EntityDespawn { entity_id: entity.to_owned() };
    let payload = Payload::EntityDespawn(Box::new(despawn));
    envelope(Some(MessageType::EntityDespawn), owner, 0, payload)
}

/// Writes an entity as its EntitySnapshot tells it: its spawn, and behind it an update with the components that are no
/// text, which a spawn cannot have. `None` if the bytes are no EntitySnapshot.
#[must_use]
pub fn spawn(snapshot: &[u8]) -> Option<impl Iterator<Item = Bytes> + use<>> {
    let snapshot = v1::EntitySnapshot::decode_from_slice(snapshot).ok()?;
    let owner = snapshot.owner_id;
    let (id, components) = (snapshot.id.clone(), snapshot.binary_components);
    let update = (!components.is_empty()).then(|| {
        let update = v1::EntityUpdate { entity_id: id, components };
        let payload = Payload::EntityUpdate(Box::new(update));
        envelope(Some(MessageType::EntityUpdate), &owner, 0, payload)
    });
    let spawn = v1::EntitySpawn {
        entity_id: snapshot.id,
        template_id: snapshot.template_id,
        owner_id: owner.clone(),
        components: snapshot.components,
    };
    let payload = Payload::EntitySpawn(Box::new(spawn));
    let spawn = envelope(Some(MessageType::EntitySpawn), &owner, 0, payload);
    Some(std::iter::once(spawn).chain(update))
}

/// Writes the position of an entity of `sender`; `update` is its PositionUpdate.
#[must_use]
pub fn position(sender: &str, update: &[u8]) -> Bytes {
    let mut out = Vec::with_capacity(update.len() + sender.len() + 12);
    number_field(3, MessageType::PositionUpdate as u64, &mut out);
    bytes_field(20, update, &mut out);
    bytes_field(60, sender.as_bytes(), &mut out);
    out.into()
}

/// Writes the newest positions of many entities: pairs of a sender and its PositionUpdate.
pub fn position_batch<'a>(
    entries: impl IntoIterator<Item = (&'a str, &'a [u8]), IntoIter: Clone>,
    timestamp_ms: i64,
) -> Bytes {
    let entries = entries.into_iter();
    let mut time = Vec::with_capacity(11);
    number_field(2, timestamp_ms as u64, &mut time);
    let entry_bytes = |(sender, update): (&str, &[u8])| {
        field_bytes(1, sender.len()) + field_bytes(2, update.len())
    };
    let bytes = entries.clone().map(|entry| field_bytes(1, entry_bytes(entry))).sum::<usize>();
    let bytes = bytes + time.len();
    let mut out = Vec::with_capacity(field_bytes(102, bytes));
    length_field(102, bytes, &mut out);
    for (sender, update) in entries {
        length_field(1, entry_bytes((sender, update)), &mut out);
        bytes_field(1, sender.as_bytes(), &mut out);
        bytes_field(2, update, &mut out);
    }
    out.extend_from_slice(&time);
    out.into()
}

/// Entries of a PositionBatch of an envelope, as [`position_batch`] takes them. Entries that are damaged are left out.
pub fn batch_entries(envelope: &[u8]) -> impl Iterator<Item = (&str, &[u8])> {
    payload(envelope, 102).flat_map(|batch| payload(batch, 1)).filter_map(|entry| {
        let sender = std::str::from_utf8(payload(entry, 1).last().unwrap_or_default()).ok()?;
        Some((sender, payload(entry, 2).last()?))
    })
}

/// Writes the field that follows a batch of [`position_batch`] between instances: the numbers of the connections that have
/// told its positions, in their order. For clients and workers the field is unknown.
#[must_use]
pub fn connections(numbers: impl IntoIterator<Item = u64>) -> Vec<u8> {
    let (mut packed, mut field) = (Vec::new(), Vec::new());
    numbers.into_iter().for_each(|number| varint(number, &mut packed));
    bytes_field(CONNECTIONS, &packed, &mut field);
    field
}

/// Batch of positions that an instance has published.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PublishedBatch<'a> {
    /// The batch for clients.
    pub envelope: &'a [u8],
    /// Entries of the batch.
    pub entries: Vec<PublishedEntry<'a>>,
}

/// Entry of a [`PublishedBatch`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PublishedEntry<'a> {
    /// Number of the connection that has told the position.
    pub connection: u64,
    /// Client id of its member.
    pub sender: &'a str,
    /// The PositionUpdate.
    pub update: &'a [u8],
}

impl<'a> PublishedBatch<'a> {
    /// Takes a batch of an instance apart. `None` if it is none, or does not name the connections of its entries.
    #[must_use]
    pub fn parse(body: &'a [u8]) -> Option<Self> {
        let mut fields = Fields::of(body);
        let Ok(Some((102, Value::Bytes(_)))) = fields.next() else { return None };
        let envelope = &body[..body.len() - fields.rest().len()];
        let Ok(Some((CONNECTIONS, Value::Bytes(numbers)))) = fields.next() else { return None };
        let (mut numbers, mut entries) = (Fields::of(numbers), Vec::new());
        for (sender, update) in batch_entries(envelope) {
            let connection = numbers.next_packed().ok()??;
            entries.push(PublishedEntry { connection, sender, update });
        }
        numbers.rest().is_empty().then_some(Self { envelope, entries })
    }
}

/// All values of a field of bytes.
fn payload(message: &[u8], field: u32) -> impl Iterator<Item = &[u8]> {
    let mut fields = Fields::of(message);
    std::iter::from_fn(move || fields.next().ok().flatten()).filter_map(move |(number, value)| {
        match value {
            Value::Bytes(bytes) if number == field => Some(bytes),
            _ => None,
        }
    })
}

fn envelope(kind: Option<MessageType>, sender: &str, seq: u64, payload: Payload) -> Bytes {
    Envelope {
        r#type: EnumValue::Known(kind.unwrap_or_default()),
        sender: sender.to_owned(),
        seq,
        payload: Some(payload),
        ..Envelope::default()
    }
    .encode_to_bytes()
}

fn number_field(field: u32, value: u64, out: &mut Vec<u8>) {
    varint(u64::from(field << 3), out);
    varint(value, out);
}

fn bytes_field(field: u32, value: &[u8], out: &mut Vec<u8>) {
    length_field(field, value.len(), out);
    out.extend_from_slice(value);
}

/// Begin of a field of `length` bytes.
fn length_field(field: u32, length: usize, out: &mut Vec<u8>) {
    varint(u64::from(field << 3 | 2), out);
    varint(length as u64, out);
}

/// Bytes of a field that holds `length` bytes, with its begin.
fn field_bytes(field: u32, length: usize) -> usize {
    varint_bytes(u64::from(field << 3)) + varint_bytes(length as u64) + length
}

fn varint_bytes(value: u64) -> usize {
    (64 - (value | 1).leading_zeros() as usize).div_ceil(7)
}

/// Field of an envelope between instances alone: numbers of the connections behind a batch.
const CONNECTIONS: u32 = 106;
