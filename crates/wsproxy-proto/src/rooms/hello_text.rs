//! ServerHello as text, put together from the texts of members and entities, which its caller keeps.

use buffa::{EnumValue, Message as _, MessageField};

use super::v1::envelope::Payload;
use super::v1::{EntitySnapshot, Envelope, MessageType, PlayerSnapshot, WorldState};
use super::write::{Entity, PageLimits, Welcome, entity_snapshot};

/// Returns the text of a PlayerSnapshot; `None` if the bytes are none.
#[must_use]
pub fn player(snapshot: &[u8]) -> Option<Vec<u8>> {
    serde_json::to_vec(&PlayerSnapshot::decode_from_slice(snapshot).ok()?).ok()
}

/// Returns the text of an entity; `None` if its bytes are no EntitySnapshot.
#[must_use]
pub fn entity(entity: &Entity<'_>) -> Option<Vec<u8>> {
    let mut snapshot = Vec::new();
    entity_snapshot(entity, &mut snapshot);
    serde_json::to_vec(&EntitySnapshot::decode_from_slice(&snapshot).ok()?).ok()
}

/// Writes the ServerHello with the state of a room, in pages of at least one: all but the last say that more follow. Every
/// item of `players` and `entities` is a text of [`player`] or [`entity`].
#[must_use]
pub fn server_hellos<'a>(
    welcome: &Welcome<'_>,
    players: impl IntoIterator<Item = &'a [u8]>,
    entities: impl IntoIterator<Item = &'a [u8]>,
    timestamp_ms: i64,
    limits: PageLimits,
) -> Vec<Vec<u8>> {
    let mut pages = vec![Page::default()];
    let players = players.into_iter().map(|text| (0, text));
    for (list, text) in players.chain(entities.into_iter().map(|text| (1, text))) {
        let last = pages.last().filter(|page| page.has_room_for(text, limits));
        if last.is_none() {
            pages.push(Page::default());
        }
        if let Some(page) = pages.last_mut() {
            page.lists[list].push(text);
            page.bytes += text.len() + 1;
        }
    }
    let last = pages.len() - 1;
    let hello =
        |(at, page): (usize, &Page<'_>)| page.server_hello(welcome, timestamp_ms, at < last);
    pages.iter().enumerate().filter_map(hello).collect()
}

/// Texts of one page: players, and entities.
#[derive(Debug, Default)]
struct Page<'a> {
    lists: [Vec<&'a [u8]>; 2],
    bytes: usize,
}

impl Page<'_> {
    fn has_room_for(&self, text: &[u8], limits: PageLimits) -> bool {
        let items = self.lists.iter().map(Vec::len).sum::<usize>();
        let has_room = items < limits.items_max && self.bytes + text.len() <= limits.bytes_max;
        // One item may exceed the bytes.
        has_room || items == 0
    }

    fn server_hello(
        &self,
        welcome: &Welcome<'_>,
        timestamp_ms: i64,
        more: bool,
    ) -> Option<Vec<u8>> {
        let mut hello = welcome.server_hello(more);
        let state = WorldState { last_update: timestamp_ms, ..WorldState::default() };
        hello.initial_state = MessageField::some(state);
        let envelope = Envelope {
            r#type: EnumValue::Known(MessageType::ServerHello),
            payload: Some(Payload::ServerHello(Box::new(hello))),
            ..Envelope::default()
        };
        let empty = serde_json::to_string(&envelope).ok()?;
        // No string of JSON has the quotes of a name inside.
        let (before, after) = empty.split_once(STATE)?;
        let mut text = Vec::with_capacity(empty.len() + self.bytes + NAMES_BYTES);
        text.extend_from_slice(before.as_bytes());
        text.extend_from_slice(STATE.as_bytes());
        let mut is_first = true;
        for (name, list) in ["players", "entities"].into_iter().zip(&self.lists) {
            if list.is_empty() {
                continue;
            }
            let begin = if is_first { "\"" } else { ",\"" };
            [begin, name, "\":["].iter().for_each(|part| text.extend_from_slice(part.as_bytes()));
            for (at, item) in list.iter().enumerate() {
                if at > 0 {
                    text.push(b',');
                }
                text.extend_from_slice(item);
            }
            text.push(b']');
            is_first = false;
        }
        if !is_first && !after.starts_with('}') {
            text.push(b',');
        }
        text.extend_from_slice(after.as_bytes());
        Some(text)
    }
}

/// Begin of the state in a ServerHello.
const STATE: &str = "\"initialState\":{";

/// Room for the names of both lists.
const NAMES_BYTES: usize = 32;
