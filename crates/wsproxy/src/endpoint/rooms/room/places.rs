//! Writes of the newest positions to the store, for those who join later.

use std::sync::{Arc, Weak};

use bytes::Bytes;
use wsproxy_conn::clock::{self, Micros};
use wsproxy_proto::rooms::{mirror::Mirror, positions::Position, wire::Connection};

use crate::{
    bus::publish::{Keep, Outcome, Publish, Receipt, RoomPosition, RoomPositions},
    endpoint::rooms::{
        keeper::KEYS_TTL,
        room::{MemberHere, Room, State},
    },
};

impl Room {
    /// Writes the positions whose time has come.
    pub(super) fn write_positions(&self, state: &mut State, now: Micros) {
        // Otherwise writes would pile up while the store is away.
        if state.writes_waiting > 0 {
            return;
        }
        let State { positions, mirror, .. } = &mut *state;
        let written = positions.take_writes(now.0).filter_map(|at| held(mirror, at)).collect();
        self.write(state, written);
    }

    /// Writes the last positions of a connection that has ended: its member may come back at another instance, which
    /// reads them.
    pub(super) fn write_positions_of(&self, state: &mut State, ended: &MemberHere) {
        let State { positions, mirror, .. } = &mut *state;
        let client = ended.client.as_str();
        let holder = mirror.member(client).and_then(|member| member.record().connection());
        if holder != Some(Connection { server: self.server, number: ended.number }) {
            return;
        }
        let written = positions.take_writes_of(client).filter_map(|at| held(mirror, at)).collect();
        self.write(state, written);
    }

    /// Writes positions in the order of all changes of members here, under the lock: so a position comes before the end of
    /// its entity, which removes it.
    fn write(&self, state: &mut State, written: Vec<RoomPosition>) {
        let Some(rooms) = self.rooms.upgrade() else { return };
        for some in written.chunks(WRITTEN_AT_ONCE) {
            let keys = rooms.keeper.keys(&self.id);
            let write = RoomPositions { keys, ttl: KEYS_TTL, positions: some.to_vec() };
            let publish = Publish {
                channel: Arc::clone(&self.channel),
                payload: Bytes::new(),
                keep: Keep::Positions(Box::new(write)),
                receipt: Some(Arc::new(WriteReceipt(self.me.clone()))),
            };
            match rooms.hub.publish(publish) {
                Ok(()) => state.writes_waiting += 1,
                // The queue is full.
                Err(_) => state.positions.rewrite_all(),
            }
        }
    }
}

/// Returns a position with the connection here that holds its member's place; `None` where there is none.
fn held(mirror: &Mirror, at: Position<'_>) -> Option<RoomPosition> {
    let member = mirror.member(at.client).filter(|member| member.is_here())?;
    Some(RoomPosition {
        client: at.client.into(),
        connection: member.record().connection.into(),
        entity: at.entity.into(),
        position: at.position.into(),
    })
}

/// Receipt of a write of positions.
struct WriteReceipt(Weak<Room>);

impl Receipt for WriteReceipt {
    fn published(&self, outcome: Outcome) {
        let Some(room) = self.0.upgrade() else { return };
        let mut state = room.state.lock();
        state.writes_waiting = state.writes_waiting.saturating_sub(1);
        if !matches!(outcome, Outcome::Received(_)) {
            state.positions.rewrite_all();
        }
        room.release(state, clock::now());
    }
}

/// Most positions of one write.
const WRITTEN_AT_ONCE: usize = 500;
