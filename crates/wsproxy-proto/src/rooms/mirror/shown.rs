//! Bytes that newcomers get of members and entities, kept while these do not change. Knows no encoding: functions
//! make the bytes.

use std::collections::HashMap;

use crate::rooms::{
    mirror::{Entity, Mirror},
    wire::Record,
};

/// Encoding of members for newcomers. Of entities the mirror keeps the text alone: their bytes are at hand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Encoding {
    /// Protobuf.
    Binary,
    /// JSON.
    Text,
}

/// Bytes for newcomers. They count in [`Mirror::bytes`].
#[derive(Debug, Default)]
pub(super) struct Shown {
    /// By client id.
    members: HashMap<Box<str>, ShownMember>,
    bytes: usize,
}

/// Bytes of a member, where they were made; empty where nothing can be told.
#[derive(Debug, Default)]
struct ShownMember {
    binary: Option<Box<[u8]>>,
    text: Option<Box<[u8]>>,
}

impl Mirror {
    /// Makes the bytes that newcomers get of the members: [`Self::shown`]. `make` makes them of the client id and the
    /// record, once for each record, since there may be many newcomers to many members.
    pub fn show(
        &mut self,
        encoding: Encoding,
        make: impl Fn(&str, &Record<'_>) -> Option<Vec<u8>>,
    ) {
        let state = &mut self.replica.state;
        for (client, member) in &state.members {
            state.shown.show(client, encoding, || make(client, &member.record()));
        }
    }

    /// Makes the texts that newcomers get of the entities: [`Self::shown_entities`]. `make` makes them of the owner's client
    /// id and the entity, once for each change of it.
    pub fn show_entities(&mut self, make: impl Fn(&str, &Entity) -> Option<Vec<u8>>) {
        let state = &mut self.replica.state;
        for (client, member) in &mut state.members {
            for entity in member.entities.iter_mut().filter(|entity| entity.shown.is_none()) {
                let text = make(client, entity).unwrap_or_default();
                state.shown.bytes += text.len();
                entity.shown = Some(text.into());
            }
        }
    }

    /// Returns the bytes that [`Self::show`] has made of the members as they are, in no order.
    pub fn shown(&self, encoding: Encoding) -> impl Iterator<Item = &[u8]> {
        let members = self.replica.state.shown.members.values();
        members.filter_map(move |shown| shown.of(encoding)).filter(|shown| !shown.is_empty())
    }

    /// Returns the texts that [`Self::show_entities`] has made of the entities as they are, in no order.
    pub fn shown_entities(&self) -> impl Iterator<Item = &[u8]> {
        let entities = self.replica.state.members().flat_map(|(_, member)| member.entities());
        entities.filter_map(|entity| entity.shown.as_deref()).filter(|text| !text.is_empty())
    }

    /// Forgets what [`Self::show`] and [`Self::show_entities`] have made.
    pub fn hide(&mut self) {
        let state = &mut self.replica.state;
        if state.shown.bytes() > 0 {
            state.shown = Shown::default();
            let entities = state.members.values_mut().flat_map(|member| &mut member.entities);
            entities.for_each(|entity| entity.shown = None);
        }
    }
}

impl Shown {
    pub(super) const fn bytes(&self) -> usize {
        self.bytes
    }

    fn show(&mut self, client: &str, encoding: Encoding, make: impl FnOnce() -> Option<Vec<u8>>) {
        if !self.members.contains_key(client) {
            self.bytes += client.len();
            self.members.insert(client.into(), ShownMember::default());
        }
        let Some(shown) = self.members.get_mut(client) else { return };
        if shown.of(encoding).is_none() {
            let made = make().unwrap_or_default();
            self.bytes += made.len();
            match encoding {
                Encoding::Binary => shown.binary = Some(made.into()),
                Encoding::Text => shown.text = Some(made.into()),
            }
        }
    }

    /// Forgets what newcomers are told of a member.
    pub(super) fn hide(&mut self, client: &str) {
        if let Some((client, shown)) = self.members.remove_entry(client) {
            let shown = [shown.binary, shown.text].into_iter().flatten();
            self.bytes -= client.len() + shown.map(|shown| shown.len()).sum::<usize>();
        }
    }

    /// Forgets what newcomers are told of an entity, because it changes.
    pub(super) fn hide_entity(&mut self, entity: &mut Entity) {
        if let Some(text) = entity.shown.take() {
            self.bytes -= text.len();
        }
    }
}

impl ShownMember {
    fn of(&self, encoding: Encoding) -> Option<&[u8]> {
        match encoding {
            Encoding::Binary => self.binary.as_deref(),
            Encoding::Text => self.text.as_deref(),
        }
    }
}
