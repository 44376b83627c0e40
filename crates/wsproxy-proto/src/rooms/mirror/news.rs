//! News of a room that come while a reading is under way, and are applied behind it.

use crate::rooms::{
    mirror::{
        Limits, Merge, Refused,
        replica::{Counted, Replica},
    },
    wire::Connection,
};

/// News that came while a reading was under way, to be applied behind it.
#[derive(Debug)]
pub(super) enum Op {
    Join { version: u64, client: Box<str>, record: Box<str> },
    Leave { version: u64, client: Box<str> },
    Replaced { old_connection: Box<str>, client: Box<str>, record: Box<str> },
    Here { client: Box<str>, record: Box<str>, version: u64, before: Option<Box<str>> },
    Presence { client: Box<str>, presence: Box<[u8]> },
    Spawn { client: Box<str>, entity: Box<str>, snapshot: Box<[u8]> },
    Update { client: Box<str>, entity: Box<str>, update: Box<[u8]> },
    Despawn { client: Box<str>, entity: Box<str> },
    Position { from: Connection, client: Box<str>, entity: Box<str>, position: Box<[u8]> },
}

impl Replica {
    /// Applies news behind a reading. Returns `false` where some are missing.
    pub(super) fn replay(&mut self, log: Vec<Op>, merge: Merge, limits: &Limits) -> bool {
        let (mut is_whole, mut unheard) = (true, Vec::new());
        for op in log {
            match op {
                Op::Join { version, client, record } => {
                    is_whole &= self.join(version, &client, &record, &mut unheard) != Counted::Gap;
                }
                Op::Leave { version, client } => {
                    is_whole &= self.leave(version, &client, &mut unheard) != Counted::Gap;
                }
                Op::Replaced { old_connection, client, record } => {
                    self.replace(&old_connection, &client, &record);
                }
                Op::Here { client, record, version, before } => {
                    let before = before.as_deref();
                    is_whole &= !self.is_doubtful(&client, &record, version, before);
                    self.join_here(&client, &record, version, before, &mut unheard);
                }
                Op::Update { client, entity, update } => {
                    // Redis has what no news have told: the spawn was refused, and the update was not.
                    let updated = self.update(&client, &entity, &update, merge, limits);
                    if updated == Err(Refused::Unknown) {
                        is_whole = false;
                        self.state.doubt_here(&client, &entity);
                    }
                }
                // News of no member, or too many.
                op => _ = self.replay_state(op, merge, limits),
            }
            unheard.clear();
        }
        is_whole
    }

    fn replay_state(&mut self, op: Op, merge: Merge, limits: &Limits) -> Result<(), Refused> {
        match op {
            Op::Presence { client, presence } => {
                self.presence(&client, &presence, merge, limits)?;
            }
            Op::Spawn { client, entity, snapshot } => {
                self.state.spawn(&client, &entity, &snapshot, limits)?;
            }
            Op::Despawn { client, entity } => drop(self.state.despawn(&client, &entity)),
            // The reading may be newer: positions are read again.
            Op::Position { from, client, entity, position } => {
                let member = self.state.member(&client).ok_or(Refused::NotMember)?;
                if member.record().connection() == Some(from) {
                    self.state.place(&client, &entity, &position, limits)?;
                }
            }
            Op::Join { .. }
            | Op::Leave { .. }
            | Op::Replaced { .. }
            | Op::Here { .. }
            | Op::Update { .. } => {}
        }
        Ok(())
    }
}

impl Op {
    /// Returns the bytes that the news take while they wait.
    pub(super) fn bytes(&self) -> usize {
        let bytes = match self {
            Self::Join { client, record, .. } => client.len() + record.len(),
            Self::Leave { client, .. } => client.len(),
            Self::Replaced { old_connection, client, record } => {
                old_connection.len() + client.len() + record.len()
            }
            Self::Here { client, record, .. } => client.len() + record.len() + CONNECTION_BYTES,
            Self::Presence { client, presence } => client.len() + presence.len(),
            Self::Despawn { client, entity } => client.len() + entity.len(),
            Self::Spawn { client, entity, snapshot: data }
            | Self::Update { client, entity, update: data }
            | Self::Position { client, entity, position: data, .. } => {
                client.len() + entity.len() + data.len()
            }
        };
        size_of::<Self>() + bytes
    }
}

/// Length of most printed connections, in bytes.
const CONNECTION_BYTES: usize = 24;
