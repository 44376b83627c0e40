//! The state of an entity for clients that join later: an EntitySnapshot of its EntitySpawn and all EntityUpdates.

use buffa::Message as _;

use super::v1::{EntitySnapshot, EntitySpawn, EntityUpdate};

/// Makes the EntitySnapshot of an EntitySpawn by `owner`. `None` if the bytes are no EntitySpawn.
#[must_use]
pub fn spawned(spawn: &[u8], owner: &str) -> Option<Vec<u8>> {
    let spawn = EntitySpawn::decode_from_slice(spawn).ok()?;
    let snapshot = EntitySnapshot {
        id: spawn.entity_id,
        template_id: spawn.template_id,
        components: spawn.components,
        owner_id: owner.to_owned(),
        ..EntitySnapshot::default()
    };
    Some(snapshot.encode_to_vec())
}

/// Returns the owner and the id that an EntitySnapshot names. `None` if the bytes are no EntitySnapshot.
#[must_use]
pub fn names(snapshot: &[u8]) -> Option<(String, String)> {
    let snapshot = EntitySnapshot::decode_from_slice(snapshot).ok()?;
    Some((snapshot.owner_id, snapshot.id))
}

/// Merges an EntityUpdate into an EntitySnapshot: its components replace those of the same names, the others stay.
/// `None` if the bytes are no such messages.
#[must_use]
pub fn updated(snapshot: &[u8], update: &[u8]) -> Option<Vec<u8>> {
    let mut snapshot = EntitySnapshot::decode_from_slice(snapshot).ok()?;
    for (name, value) in EntityUpdate::decode_from_slice(update).ok()?.components {
        match String::from_utf8(value) {
            Ok(text) => {
                snapshot.binary_components.remove(&name);
                snapshot.components.insert(name, text);
            }
            Err(bytes) => {
                snapshot.components.remove(&name);
                snapshot.binary_components.insert(name, bytes.into_bytes());
            }
        }
    }
    Some(snapshot.encode_to_vec())
}
