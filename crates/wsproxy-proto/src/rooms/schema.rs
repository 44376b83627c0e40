//! Table of what `rooms.proto` and its limits allow inside a payload, and the walk that compares a message with it.
//!
//! The walk allocates nothing and borrows from the message. A message that passes is read alike by every protobuf decoder.

use super::fields::{Fields, Value};
use Shape::{Bytes, Components, Float, Floats, Id, Message, Number, Numbers, Text};

/// Fields of one kind of message: those from 1 on without a gap, then the others. All further ones are unknown and pass.
pub(super) struct Schema(&'static [Shape], &'static [(u32, Shape)]);

impl Schema {
    #[inline]
    fn shape(&'static self, number: u32) -> Option<&'static Shape> {
        let first = self.0.get(number as usize - 1);
        first.or_else(|| self.1.iter().find(|(other, _)| *other == number).map(|(_, shape)| shape))
    }
}

/// Contents that a field may have.
enum Shape {
    /// Any number, also of an enum or a bool.
    Number,
    /// Many numbers, packed or not.
    Numbers,
    /// A finite float.
    Float,
    /// UTF-8.
    Text,
    /// UTF-8 of at most [`ID_BYTES_MAX`].
    Id,
    Bytes,
    Message(&'static Schema),
    /// A message of floats.
    Floats(&'static Schema),
    /// Components of an entity: a map from [`Shape::Id`] to what the schema of its entries says.
    Components(&'static Schema),
}

/// Compares `message` with `schema`, and tells `found` the fields of the outermost message in their order. Strings arrive as
/// [`Value::Text`].
///
/// # Errors
/// The first violation.
#[inline]
pub(super) fn walk<'a>(
    schema: &'static Schema,
    message: &'a [u8],
    mut found: impl FnMut(u32, Value<'a>),
) -> Result<(), &'static str> {
    let mut fields = Fields::of(message);
    let mut components = 0;
    while let Some((number, value)) = fields.next().map_err(|_| CUT)? {
        let value = match schema.shape(number) {
            Some(shape) => field(shape, value, &mut components)?,
            None if value == Value::Group => return Err(GROUP),
            None => value,
        };
        found(number, value);
    }
    if fields.overlong { Err(OVERLONG) } else { Ok(()) }
}

#[inline]
fn field<'a>(
    shape: &'static Shape,
    value: Value<'a>,
    components: &mut usize,
) -> Result<Value<'a>, &'static str> {
    match (shape, value) {
        (Number | Numbers, Value::Varint(_)) | (Bytes, Value::Bytes(_)) => {
            return Ok(value);
        }
        (Float, Value::Fixed32(bytes)) if f32::from_le_bytes(bytes).is_finite() => {}
        (Float, Value::Fixed32(_)) => return Err("a number that is not finite"),
        (Text, Value::Bytes(bytes)) => return text(bytes).map(Value::Text),
        (Id, Value::Bytes(bytes)) => return id(bytes).map(Value::Text),
        (Floats(_), Value::Bytes(bytes)) if are_finite_floats(bytes) => {}
        (Floats(schema) | Message(schema), Value::Bytes(bytes)) => nested(schema, bytes)?,
        (Components(schema), Value::Bytes(bytes)) => {
            *components += 1;
            if *components > COMPONENTS_MAX {
                return Err("more than 64 components");
            }
            nested(schema, bytes)?;
        }
        (Numbers, Value::Bytes(bytes)) => {
            let mut numbers = Fields::of(bytes);
            while numbers.next_packed().map_err(|_| CUT)?.is_some() {}
            if numbers.overlong {
                return Err(OVERLONG);
            }
        }
        _ => return Err(WIRE_TYPE),
    }
    Ok(value)
}

/// The walk of an inner message. Its depth is that of the schema: unknown fields are not entered.
fn nested(schema: &'static Schema, message: &[u8]) -> Result<(), &'static str> {
    walk(schema, message, |_, _| {})
}

/// Whether these are the first four fields of finite floats and nothing else, in any order: nearly all positions.
#[inline]
fn are_finite_floats(mut message: &[u8]) -> bool {
    while let Some(([tag, float @ ..], rest)) = message.split_first_chunk::<5>()
        && matches!(tag, 0x0D | 0x15 | 0x1D | 0x25)
        && f32::from_le_bytes(*float).is_finite()
    {
        message = rest;
    }
    message.is_empty()
}

/// The bytes as a string.
#[inline]
pub(super) fn text(bytes: &[u8]) -> Result<&str, &'static str> {
    simdutf8::basic::from_utf8(bytes).map_err(|_| "a string that is not UTF-8")
}

/// The bytes as an id.
#[inline]
pub(super) fn id(bytes: &[u8]) -> Result<&str, &'static str> {
    if bytes.len() > ID_BYTES_MAX { Err("an id longer than 128 bytes") } else { text(bytes) }
}

/// Upper bound of the bytes of an id, a name of a component and a message id.
pub(super) const ID_BYTES_MAX: usize = 128;
/// Upper bound of the components of an entity in one message.
const COMPONENTS_MAX: usize = 64;

pub(super) const CUT: &str = "a payload that is cut off";
pub(super) const GROUP: &str = "a group";
pub(super) const OVERLONG: &str = "a number that is too long";
pub(super) const WIRE_TYPE: &str = "a field of another type";

static VECTOR: Schema = Schema(&[Float, Float, Float], &[]);
static QUATERNION: Schema = Schema(&[Float, Float, Float, Float], &[]);
static AVATAR: Schema = Schema(&[Text, Text, Text, Float, Text], &[]);
static TEXT_COMPONENT: Schema = Schema(&[Id, Text], &[]);
static BYTES_COMPONENT: Schema = Schema(&[Id, Bytes], &[]);
static LIMITS: Schema = Schema(&[Number, Number, Number, Number, Number, Number], &[]);
static WORLD: Schema = Schema(&[Message(&ENTITY), Message(&PLAYER), Number], &[]);
static ENTITY: Schema = Schema(
    &[Id, Id, Floats(&VECTOR), Floats(&QUATERNION), Components(&TEXT_COMPONENT)],
    &[(60, Id), (61, Components(&BYTES_COMPONENT))],
);
static PLAYER: Schema =
    Schema(&[Id, Text, Text, Floats(&VECTOR), Floats(&QUATERNION), Message(&AVATAR)], &[]);
static PRESENCE_DATA: Schema =
    Schema(&[Text, Text, Floats(&VECTOR), Floats(&QUATERNION), Message(&AVATAR), Id], &[]);
static ENTRY: Schema = Schema(&[Id, Message(&POSITION)], &[]);

pub(super) static CLIENT_HELLO: Schema =
    Schema(&[Id, Text, Text, Text], &[(60, Number), (61, Text), (62, Message(&PRESENCE_DATA))]);
pub(super) static SERVER_HELLO: Schema = Schema(
    &[Text, Id, Id, Message(&WORLD)],
    &[(60, Number), (61, Text), (62, Id), (64, Number), (65, Message(&LIMITS)), (66, Number)],
);
pub(super) static POSITION: Schema =
    Schema(&[Id, Floats(&VECTOR), Floats(&QUATERNION), Number], &[]);
pub(super) static SPAWN: Schema = Schema(&[Id, Id, Id, Components(&TEXT_COMPONENT)], &[]);
pub(super) static UPDATE: Schema = Schema(&[Id, Components(&BYTES_COMPONENT)], &[]);
pub(super) static DESPAWN: Schema = Schema(&[Id], &[]);
pub(super) static CHAT: Schema = Schema(&[Id, Text, Number, Number], &[]);
pub(super) static PRESENCE: Schema = Schema(&[Id, Number, Message(&PRESENCE_DATA)], &[]);
pub(super) static ACK: Schema = Schema(&[Number, Numbers], &[]);
pub(super) static ERROR: Schema = Schema(&[Id, Text, Number, Id], &[]);
pub(super) static BATCH: Schema = Schema(&[Message(&ENTRY), Number], &[]);
pub(super) static CUSTOM: Schema = Schema(&[Id, Bytes], &[]);
