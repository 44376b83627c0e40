//! Model of an instance: it has a mirror, joins clients and runs their leaves, and tells its clients of changes.

use std::collections::{BTreeMap, VecDeque};

use bytes::Bytes;
use wsproxy_proto::rooms::{
    mirror::{Change, Entity, Limits, Member, Merge, Mirror, Origin, Outcome, Read, Ticket},
    wire::{Connection, Frame, Kind, Record},
};

use crate::rooms_state::redis::{Joined, Reader, Redis, entity_message, state_message};

/// One instance.
#[derive(Debug)]
pub(crate) struct Instance {
    /// Place among the subscribers.
    pub(crate) slot: usize,
    pub(crate) server: u64,
    connections: u64,
    pub(crate) mirror: Option<Mirror>,
    /// Open connections by client.
    pub(crate) here: BTreeMap<String, Connection>,
    /// Answers on their way, in any order.
    answers: Vec<Answer>,
    /// Commands that wait in the pipeline of publishes.
    pipeline: VecDeque<Command>,
    /// Entities of open connections whose members were taken for dead.
    lost: BTreeMap<String, Vec<Entity>>,
    /// Leaves that wait for the end of their grace.
    leaves: VecDeque<(String, Connection)>,
    pub(crate) view: View,
}

/// State of the room as its clients here were told it.
#[derive(Debug, Default)]
pub(crate) struct View {
    pub(crate) members: BTreeMap<String, Vec<bool>>,
    pub(crate) entities: BTreeMap<(String, String), Vec<u8>>,
    /// Version at which it began.
    pub(crate) began: Option<u64>,
}

#[derive(Debug)]
enum Answer {
    Join { client: String, record: String, written: Option<Vec<(String, Bytes)>>, joined: Joined },
    Room { ticket: Ticket, reader: Reader },
    Positions { reader: Reader },
}

#[derive(Debug)]
enum Command {
    State { client: String, entity: String, snapshot: Option<Bytes>, message: Bytes, joined: u64 },
    Position { client: String, entity: String, position: Bytes, message: Bytes },
}

impl Instance {
    pub(crate) fn new(slot: usize, server: u64) -> Self {
        Self {
            slot,
            server,
            connections: 0,
            mirror: None,
            here: BTreeMap::new(),
            answers: Vec::new(),
            pipeline: VecDeque::new(),
            lost: BTreeMap::new(),
            leaves: VecDeque::new(),
            view: View::default(),
        }
    }

    /// Opens a connection of a client and runs its join.
    pub(crate) fn open(&mut self, client: &str, redis: &mut Redis) {
        if self.mirror.is_none() {
            redis.channels[self.slot] = Some(VecDeque::new());
            self.mirror = Some(Mirror::new(self.server, LIMITS, MERGE, redis.now));
        }
        self.connections += 1;
        let connection = Connection { server: self.server, number: self.connections };
        self.join(client, connection, false, redis);
    }

    /// Joins an open connection again.
    pub(crate) fn rejoin(&mut self, client: &str, redis: &mut Redis) {
        if let Some(connection) = self.here.get(client) {
            self.join(client, *connection, true, redis);
        }
    }

    fn join(&mut self, client: &str, connection: Connection, again: bool, redis: &mut Redis) {
        let connection = connection.to_string();
        let record = Record { connection: &connection, user: "u", json: "{}" };
        let written = again.then(|| {
            let mut written = self.snapshots_of(client);
            let lost = self.lost.get(client).into_iter().flatten().filter_map(snapshot_of);
            let lost: Vec<_> =
                lost.filter(|(id, _)| written.iter().all(|(held, _)| held != id)).collect();
            written.extend(lost);
            written
        });
        let joined = redis.join(client, &record, written.as_deref());
        let (client, record) = (client.to_owned(), record.to_string());
        self.answers.push(Answer::Join { client, record, written, joined });
    }

    fn snapshots_of(&self, client: &str) -> Vec<(String, Bytes)> {
        let member = self.mirror.as_ref().and_then(|mirror| mirror.member(client));
        member.into_iter().flat_map(Member::entities).filter_map(snapshot_of).collect()
    }

    /// Does what `Room::joined_again` does.
    fn joined_again(&mut self, client: &str, written: &[(String, Bytes)]) {
        let mirror = self.mirror.as_mut().unwrap();
        for lost in self.lost.remove(client).unwrap_or_default() {
            let held = mirror.member(client).and_then(|member| member.entity(lost.id()));
            if held.is_none_or(|held| held.snapshot().is_none())
                && let Some(snapshot) = lost.snapshot()
                && mirror.spawn(Origin::Here, client, lost.id(), snapshot).is_ok()
            {
                let key = (client.to_owned(), lost.id().to_owned());
                self.view.write(key, Some(snapshot.to_vec()));
            }
            let held = mirror.member(client).and_then(|member| member.entity(lost.id()));
            if held.is_none_or(|held| held.position().is_none())
                && let Some(position) = lost.position()
            {
                _ = mirror.position(client, lost.id(), position);
            }
        }
        written.iter().for_each(|(entity, _)| mirror.confirm(client, entity));
        let present = self.snapshots_of(client);
        let is_gone = |(id, _): &&(String, Bytes)| present.iter().all(|(held, _)| held != id);
        let newer = present.iter().filter(|entity| !written.contains(entity));
        for (entity, _) in newer.chain(written.iter().filter(is_gone)) {
            self.change_again(client, entity);
        }
        self.move_again(client);
    }

    /// Does what `State::put_positions_of` does.
    fn move_again(&mut self, client: &str) {
        let member = self.mirror.as_ref().and_then(|mirror| mirror.member(client));
        let Some(member) = member.filter(|member| member.is_here()) else { return };
        let connection = member.record().connection().unwrap();
        for entity in member.entities() {
            let Some(position) = entity.position().map(Bytes::copy_from_slice) else { continue };
            let message = state_message(connection, 'p', client, entity.id(), &position);
            let (client, entity) = (client.to_owned(), entity.id().to_owned());
            self.pipeline.push_back(Command::Position { client, entity, position, message });
        }
    }

    /// Closes a connection. Its leave runs later.
    pub(crate) fn close(&mut self, client: &str) {
        if let Some(connection) = self.here.remove(client) {
            self.lost.remove(client);
            self.leaves.push_back((client.to_owned(), connection));
        }
    }

    pub(crate) fn run_leave(&mut self, redis: &mut Redis) -> bool {
        let Some((client, connection)) = self.leaves.pop_front() else { return false };
        // A position that came behind a leave, a join elsewhere and a join here would stay at others: nothing ends it.
        let is_moved = |command: &Command| matches!(command, Command::Position { client: of, .. } if *of == client);
        while self.pipeline.iter().any(is_moved) {
            self.run_command(redis);
        }
        redis.leave(&client, &connection.to_string());
        self.forget_room(redis);
        true
    }

    /// Drops the mirror with the last connection.
    fn forget_room(&mut self, redis: &mut Redis) {
        if self.here.is_empty() && self.answers.is_empty() && self.leaves.is_empty() {
            (self.mirror, self.view) = (None, View::default());
            redis.channels[self.slot] = None;
        }
    }

    /// Changes an entity of a client here. `op` is `s`, `u`, `d` or `p`, as in messages.
    pub(crate) fn change(&mut self, op: char, client: &str, entity: &str, data: &[u8]) {
        let (Some(connection), Some(mirror)) = (self.here.get(client), &mut self.mirror) else {
            return;
        };
        // A handshake ends once the room was read.
        let is_member = mirror
            .member(client)
            .is_some_and(|member| member.record().connection() == Some(*connection));
        if !mirror.is_complete() || !is_member {
            return;
        }
        let message = state_message(*connection, op, client, entity, data);
        let key = (client.to_owned(), entity.to_owned());
        let (client, entity) = key.clone();
        let is_doubted = mirror.is_doubted(&client, &entity);
        let snapshot = match op {
            's' => mirror.spawn(Origin::Here, &client, &entity, data).map(|()| Some(data.to_vec())),
            'u' => mirror.update(Origin::Here, &client, &entity, data).map(|s| Some(s.to_vec())),
            'd' => mirror.despawn(Origin::Here, &client, &entity).map(|()| None),
            _ => {
                if mirror.position(&client, &entity, data).is_ok() {
                    let position = Bytes::copy_from_slice(data);
                    self.pipeline.push_back(Command::Position {
                        client,
                        entity,
                        position,
                        message,
                    });
                }
                return;
            }
        };
        let Ok(snapshot) = snapshot else { return };
        self.view.write(key, snapshot.clone());
        let snapshot = snapshot.map(Bytes::from);
        let is_whole = op != 'u';
        let (of, id) = (client.clone(), entity.clone());
        let joined = mirror.member(&client).unwrap().joined();
        self.pipeline.push_back(Command::State { client, entity, snapshot, message, joined });
        if is_doubted && !is_whole {
            self.change_again(&of, &id);
        }
    }

    /// Runs the next command of the pipeline.
    pub(crate) fn run_command(&mut self, redis: &mut Redis) -> bool {
        let Some(command) = self.pipeline.pop_front() else { return false };
        match command {
            Command::State { client, entity, snapshot, message, joined } => {
                let frame = Frame::parse(&message).unwrap().unwrap();
                let connection = frame.from.to_string();
                let is_done = redis.state(&client, &connection, &entity, snapshot, &message);
                if let Some(mirror) = self.mirror.as_mut().filter(|_| !is_done)
                    && mirror.doubt(&client, &entity, (&connection, joined), redis.now)
                {
                    self.change_again(&client, &entity);
                }
            }
            Command::Position { client, entity, position, message } => {
                let frame = Frame::parse(&message).unwrap().unwrap();
                redis.position((&client, &entity), &frame.from.to_string(), position);
                redis.publish(&message);
            }
        }
        true
    }

    /// Publishes an entity again for the connection that holds the member's place now.
    fn change_again(&mut self, client: &str, entity: &str) {
        let mirror = self.mirror.as_mut().unwrap();
        let Some(member) = mirror.member(client) else { return };
        let (connection, joined) = (member.record().connection().unwrap(), member.joined());
        let held = member.entity(entity);
        let snapshot = held.and_then(Entity::snapshot).map(Bytes::copy_from_slice);
        let position = held.and_then(Entity::position).map(Bytes::copy_from_slice);
        let message = match &snapshot {
            Some(snapshot) => entity_message(connection, client, entity, snapshot),
            None => state_message(connection, 'd', client, entity, &[]),
        };
        let position = position.filter(|_| snapshot.is_none()).map(|position| {
            let message = state_message(connection, 'p', client, entity, &position);
            let (client, entity) = (client.to_owned(), entity.to_owned());
            Command::Position { client, entity, position, message }
        });
        mirror.confirm(client, entity);
        let (client, entity) = (client.to_owned(), entity.to_owned());
        self.pipeline.push_back(Command::State { client, entity, snapshot, message, joined });
        self.pipeline.extend(position);
    }

    /// Takes the next message from the channel.
    pub(crate) fn deliver(&mut self, redis: &mut Redis) -> bool {
        let Some(message) = redis.channels[self.slot].as_mut().and_then(VecDeque::pop_front) else {
            return false;
        };
        let Some(mirror) = &mut self.mirror else { return true };
        let frame = Frame::parse(&message).unwrap().unwrap();
        let mut changes = Vec::new();
        match frame.kind {
            Kind::Message { payload, .. } | Kind::Entity(payload)
                if frame.from.server != self.server =>
            {
                let text = payload.splitn(4, |byte| *byte == b' ').collect::<Vec<_>>();
                let word = |at: usize| std::str::from_utf8(text[at]).unwrap();
                let (client, entity, data) = (word(1), word(2), text[3]);
                let key = (client.to_owned(), entity.to_owned());
                let channel = Origin::Channel;
                match word(0) {
                    "s" | "E" if mirror.spawn(channel, client, entity, data).is_ok() => {
                        self.view.write(key, Some(data.to_vec()));
                    }
                    "u" => {
                        if let Ok(snapshot) = mirror.update(channel, client, entity, data) {
                            self.view.write(key, Some(snapshot.to_vec()));
                        }
                    }
                    "d" if mirror.despawn(channel, client, entity).is_ok() => {
                        self.view.write(key, None);
                    }
                    "p" => _ = mirror.hear_position(frame.from, client, entity, data),
                    _ => {}
                }
            }
            Kind::Message { .. } | Kind::Entity(_) => {}
            kind => mirror.apply(&kind, redis.now, &mut changes),
        }
        self.tell(changes);
        true
    }

    /// Begins a reading that is due.
    pub(crate) fn begin(&mut self, redis: &Redis) -> bool {
        let is_linked = redis.channels[self.slot].is_some();
        let Some(mirror) = self.mirror.as_mut().filter(|_| is_linked) else { return false };
        let Some(due) = mirror.due().filter(|due| due.at <= redis.now) else { return false };
        let reader = Reader::default();
        self.answers.push(match due.read {
            Read::Room => Answer::Room { ticket: mirror.begin_reading(redis.now), reader },
            Read::Positions => {
                mirror.begin_positions();
                Answer::Positions { reader }
            }
        });
        true
    }

    /// Lets an answer arrive, or lets its reading read on.
    pub(crate) fn answer(&mut self, which: usize, redis: &mut Redis) -> bool {
        if self.answers.is_empty() {
            return false;
        }
        let which = which % self.answers.len();
        if let Answer::Room { reader, .. } | Answer::Positions { reader } = &mut self.answers[which]
            && !reader.is_done()
        {
            redis.read(reader);
            return true;
        }
        let mut changes = Vec::new();
        let mirror = self.mirror.as_mut().unwrap();
        match self.answers.remove(which) {
            Answer::Join { client, record, written, joined } => {
                let is_again = written.is_some();
                let is_held = self.finish_join(&client, &record, is_again, &joined, &mut changes);
                self.tell(std::mem::take(&mut changes));
                if is_held && matches!(joined, Joined::Member { before: Some(_), .. }) {
                    self.move_again(&client);
                }
                if let Some(written) = written.filter(|_| is_held) {
                    self.joined_again(&client, &written);
                }
            }
            Answer::Room { ticket, reader } => {
                let reading = reader.into_reading();
                let outcome = mirror.apply_reading(ticket, &reading, redis.now, &mut changes);
                if let Outcome::Applied { orphans } = outcome {
                    orphans.iter().for_each(|client| redis.leave(client, ""));
                }
            }
            Answer::Positions { reader } => {
                let positions = reader.into_reading().positions;
                mirror.apply_positions(&positions, redis.now, &mut changes);
            }
        }
        self.tell(changes);
        self.forget_room(redis);
        true
    }

    fn finish_join(
        &mut self,
        client: &str,
        record: &str,
        is_again: bool,
        joined: &Joined,
        changes: &mut Vec<Change>,
    ) -> bool {
        let connection = Record::parse(record).unwrap().connection().unwrap();
        if is_again && self.here.get(client) != Some(&connection) {
            self.leaves.push_back((client.to_owned(), connection));
            return false;
        }
        let mirror = self.mirror.as_mut().unwrap();
        let is_member = match joined {
            Joined::Member { version, before } => {
                mirror.join_here(client, record, *version, before.as_deref(), changes)
            }
            Joined::Taken | Joined::Replaced | Joined::Full => false,
        };
        if is_member {
            // The newer of two connections stays, whichever answer came first. Each that ends runs its leave.
            let other = self.here.remove(client).filter(|other| *other != connection);
            let older = other.map(|other| other.min(connection));
            let newer = other.map_or(connection, |other| other.max(connection));
            self.here.insert(client.to_owned(), newer);
            self.leaves.extend(older.map(|older| (client.to_owned(), older)));
        } else {
            if is_again {
                self.here.remove(client);
                self.lost.remove(client);
            }
            self.leaves.push_back((client.to_owned(), connection));
        }
        is_member
    }

    /// Tells the clients here of changes.
    fn tell(&mut self, changes: Vec<Change>) {
        for change in &changes {
            if let Change::Replaced { client, old_connection, .. } = change {
                let is_old = |own: &Connection| own.to_string() == **old_connection;
                // Redis may have lost the other connection, and got this one back meanwhile.
                if self.here.get(&**client).is_some_and(is_old) {
                    self.close(client);
                }
            }
        }
        let Some(mirror) = self.mirror.as_ref().filter(|mirror| mirror.is_complete()) else {
            return;
        };
        for change in &changes {
            if let Change::Left { client, entities } = change
                && self.here.contains_key(&**client)
                && mirror.member(client).is_none()
            {
                self.lost.insert(client.to_string(), entities.clone());
            }
        }
        if self.view.began.is_none() {
            self.view.begin(mirror);
            return;
        }
        let left: Vec<_> = changes
            .iter()
            .filter_map(|change| match change {
                Change::Left { client, .. } => Some(client.clone()),
                _ => None,
            })
            .collect();
        changes.into_iter().for_each(|change| self.view.see(change, mirror));
        left.iter().for_each(|client| self.move_again(client));
    }

    /// Loses the link of subscriptions, with all messages that are on their way.
    pub(crate) fn lose(&mut self, redis: &mut Redis) {
        if let Some(mirror) = &mut self.mirror {
            redis.channels[self.slot] = None;
            mirror.lose_link();
        }
    }

    /// Wants a reading, after the members here have joined again.
    pub(crate) fn doubt(&mut self, redis: &Redis) {
        if let Some(mirror) = &mut self.mirror {
            mirror.want_reading(redis.now);
        }
        let clients: Vec<String> = self.here.keys().cloned().collect();
        clients.iter().for_each(|client| self.move_again(client));
    }

    pub(crate) fn link(&mut self, redis: &mut Redis) {
        let is_cut = redis.channels[self.slot].is_none();
        if let Some(mirror) = self.mirror.as_mut().filter(|_| is_cut) {
            redis.channels[self.slot] = Some(VecDeque::new());
            mirror.want_reading(redis.now);
        }
    }
}

impl View {
    fn begin(&mut self, mirror: &Mirror) {
        self.began = Some(mirror.version());
        self.entities.clear();
        for (client, member) in mirror.members() {
            self.members.insert(client.to_owned(), vec![true]);
            for entity in member.entities() {
                let key = (client.to_owned(), entity.id().to_owned());
                self.write(key, entity.snapshot().map(<[u8]>::to_vec));
            }
        }
    }

    fn write(&mut self, key: (String, String), snapshot: Option<Vec<u8>>) {
        match snapshot {
            Some(snapshot) => drop(self.entities.insert(key, snapshot)),
            None => drop(self.entities.remove(&key)),
        }
    }

    fn is_member(&self, client: &str) -> bool {
        self.members.get(client).and_then(|seen| seen.last()) == Some(&true)
    }

    fn see(&mut self, change: Change, mirror: &Mirror) {
        match change {
            Change::Joined { client, .. } => {
                assert!(!self.is_member(&client), "{client} joins twice");
                self.members.entry(client.into()).or_default().push(true);
            }
            Change::Left { client, entities } => {
                assert!(self.is_member(&client), "{client} leaves, and was not there");
                self.members.entry(client.to_string()).or_default().push(false);
                let gone = self.entities.extract_if(.., |(owner, _), _| **owner == *client);
                let gone: Vec<Box<str>> = gone.map(|((_, id), _)| id.into()).collect();
                let spawned = entities.iter().filter(|entity| entity.snapshot().is_some());
                let spawned: Vec<Box<str>> = spawned.map(|entity| entity.id().into()).collect();
                assert_eq!(gone, spawned, "entities go with {client}");
            }
            Change::Spawned { client, entity } => {
                assert!(self.is_member(&client));
                // Later changes may have removed it again.
                let held = mirror.member(&client).and_then(|member| member.entity(&entity));
                let snapshot = held.and_then(|held| held.snapshot()).map(<[u8]>::to_vec);
                self.write((client.into(), entity.into()), snapshot);
            }
            Change::Despawned { client, entity } => {
                self.write((client.into(), entity.into()), None);
            }
            Change::Replaced { .. } | Change::Updated { .. } | Change::Moved { .. } => {}
        }
    }
}

fn snapshot_of(entity: &Entity) -> Option<(String, Bytes)> {
    Some((entity.id().to_owned(), Bytes::copy_from_slice(entity.snapshot()?)))
}

/// Bounds that no run of this test reaches.
const LIMITS: Limits = Limits {
    member_entities_max: 100,
    entities_max: 1000,
    entity_bytes_max: 100,
    bytes_max: 1 << 20,
};

/// A snapshot is a list of slots. An update names a slot and its new value.
const MERGE: Merge = Merge {
    entity: |snapshot, update| {
        let mut merged = snapshot.to_vec();
        *merged.get_mut(usize::from(update[0]))? = update[1];
        Some(merged)
    },
    presence: |_, presence| String::from_utf8(presence.to_vec()).ok(),
};
