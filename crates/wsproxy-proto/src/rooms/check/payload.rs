//! Compares a payload with its schema, and takes from it what the gateway reads.

use super::super::fields::Value;
use super::super::schema::{self, Schema, walk};
use super::{Acked, Body, Event, Hello, Kind};

/// Reads the payload of this kind.
///
/// # Errors
/// The first violation.
pub(super) fn read(kind: Kind, payload: &[u8]) -> Result<Body<'_>, &'static str> {
    match kind {
        Kind::Position => {
            let entity = entity(&schema::POSITION, payload)?;
            Ok(Body::Position { entity, update: payload })
        }
        Kind::Spawn => spawn(payload),
        Kind::Update => {
            Ok(Body::Update { entity: entity(&schema::UPDATE, payload)?, update: payload })
        }
        Kind::Despawn => Ok(Body::Despawn { entity: entity(&schema::DESPAWN, payload)? }),
        Kind::Chat => {
            let mut from = "";
            walk(&schema::CHAT, payload, |number, value| {
                if let (1, Value::Text(text)) = (number, value) {
                    from = text;
                }
            })?;
            Ok(Body::Chat { from })
        }
        Kind::Presence => presence(payload),
        Kind::ClientHello => hello(payload),
        Kind::Ack => {
            let mut seq = 0;
            walk(&schema::ACK, payload, |number, value| {
                if let (1, Value::Varint(number)) = (number, value) {
                    seq = number;
                }
            })?;
            Ok(Body::Ack(Acked { seq, ack: payload }))
        }
        Kind::Custom => custom(payload),
        Kind::ServerHello => other(&schema::SERVER_HELLO, payload),
        Kind::Error => other(&schema::ERROR, payload),
        Kind::Batch => other(&schema::BATCH, payload),
    }
}

/// Checks the message, and returns its first field, the id of an entity.
#[inline]
pub(super) fn entity<'a>(
    schema: &'static Schema,
    message: &'a [u8],
) -> Result<&'a str, &'static str> {
    let mut entity = "";
    walk(schema, message, |number, value| {
        if let (1, Value::Text(text)) = (number, value) {
            entity = text;
        }
    })?;
    if entity.is_empty() { Err("no entity_id") } else { Ok(entity) }
}

fn spawn(payload: &[u8]) -> Result<Body<'_>, &'static str> {
    let (mut entity, mut owner) = ("", "");
    walk(&schema::SPAWN, payload, |number, value| match (number, value) {
        (1, Value::Text(text)) => entity = text,
        (3, Value::Text(text)) => owner = text,
        _ => {}
    })?;
    if entity.is_empty() {
        return Err("no entity_id");
    }
    Ok(Body::Spawn { entity, owner, spawn: payload })
}

fn presence(payload: &[u8]) -> Result<Body<'_>, &'static str> {
    let (mut client, mut event, mut data) = ("", 0, None);
    let mut data_fields = 0;
    walk(&schema::PRESENCE, payload, |number, value| match (number, value) {
        (1, Value::Text(text)) => client = text,
        (2, Value::Varint(number)) => event = number,
        (3, Value::Bytes(bytes)) => {
            data = Some(bytes);
            data_fields += 1;
        }
        _ => {}
    })?;
    // The gateway keeps one range of bytes, and decoders would merge both.
    if data_fields > 1 {
        return Err("presence data given twice");
    }
    let event = match event {
        0 => Event::Join,
        1 => Event::Leave,
        2 => Event::Update,
        _ => return Err("an unknown event_type"),
    };
    Ok(Body::Presence { event, client, data })
}

fn hello(payload: &[u8]) -> Result<Body<'_>, &'static str> {
    let mut hello =
        Hello { version: 1, batch: false, acks: false, display_name: "", presence: None };
    let mut presences = 0;
    walk(&schema::CLIENT_HELLO, payload, |number, value| match (number, value) {
        (2, Value::Text(text)) => hello.display_name = text,
        (60, Value::Varint(number)) => {
            hello.version = u32::try_from(number).unwrap_or(u32::MAX).max(1)
        }
        (61, Value::Text("batch")) => hello.batch = true,
        (61, Value::Text("acks")) => hello.acks = true,
        (62, Value::Bytes(bytes)) => {
            hello.presence = Some(bytes);
            presences += 1;
        }
        _ => {}
    })?;
    if presences > 1 { Err("presence data given twice") } else { Ok(Body::Hello(hello)) }
}

fn custom(payload: &[u8]) -> Result<Body<'_>, &'static str> {
    let (mut name, mut data) = ("", &[][..]);
    walk(&schema::CUSTOM, payload, |number, value| match (number, value) {
        (1, Value::Text(text)) => name = text,
        (2, Value::Bytes(bytes)) => data = bytes,
        _ => {}
    })?;
    Ok(Body::Custom { name, data })
}

fn other<'a>(schema: &'static Schema, payload: &'a [u8]) -> Result<Body<'a>, &'static str> {
    walk(schema, payload, |_, _| {})?;
    Ok(Body::Other)
}
