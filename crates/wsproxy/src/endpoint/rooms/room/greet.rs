//! ServerHello: the state of the room for a member that begins to listen.

use bytes::Bytes;
use wsproxy_conn::clock::{self, Micros};
use wsproxy_proto::rooms::{
    check::{Hello, Kind},
    hello_text,
    mirror::{Encoding, Entity, Limits as EntityLimits, Mirror},
    v1::Limits,
    write::{self, PageLimits, Welcome},
};

use crate::{
    endpoint::rooms::{
        fanout::Form,
        member::Membership,
        record,
        room::{Room, reliable},
    },
    telemetry::time,
};

impl Room {
    /// Sends a member the state of the room. From now on it gets the messages to the room, in this form.
    pub(in crate::endpoint::rooms) fn greet(
        &self,
        membership: &Membership,
        form: Form,
        hello: Option<&Hello<'_>>,
        now: Micros,
    ) {
        let limits = self.limits(membership);
        let connection = membership.connection.to_string();
        let features = |feature: fn(&Hello<'_>) -> bool| hello.is_some_and(feature);
        let mut welcome = Welcome {
            server_version: concat!("wsproxy/", env!("CARGO_PKG_VERSION")),
            client: membership.client.as_str(),
            room: self.id.as_str(),
            version: VERSION,
            batch: features(|hello| hello.batch),
            acks: features(|hello| hello.acks),
            connection: &connection,
            presence_version: 0,
            limits: &limits,
        };
        let mut state = self.state.lock();
        let begin = clock::now();
        welcome.presence_version = state.mirror.version();
        let hellos = hellos(&mut state.mirror, &welcome, form);
        let Some(member) = state.member_mut(membership.connection.number) else {
            return self.release(state, now);
        };
        member.form = Some(form);
        member.reads_batches = welcome.batch;
        member.reliable = reliable::of_features(welcome.acks);
        let link = member.link.clone();
        let bytes = hellos.iter().map(Vec::len).sum();
        self.count_sent(&membership.rooms, Some(Kind::ServerHello), hellos.len(), bytes);
        let frames: Vec<Bytes> =
            hellos.iter().map(|hello| form.plain_frame(hello, &link)).collect();
        frames.iter().for_each(|frame| link.push_state(frame.clone()));
        let counters = &membership.rooms.counters;
        counters.snapshot.observe(clock::now().since(begin).0);
        counters.snapshot_bytes.observe(bytes as u64);
        self.release(state, now);
        // Outside the lock: a large state takes as long to compress as all members' messages of a tick.
        let compressed = hellos.into_iter().filter(|_| link.window_bits().is_some());
        let compressed = compressed.map(|hello| form.frame_of(hello.into(), &link));
        let others: Vec<(Bytes, Bytes)> = frames.into_iter().zip(compressed).collect();
        link.release_state(others, now);
    }

    /// Returns the limits that clients are told.
    fn limits(&self, membership: &Membership) -> Limits {
        let config = &membership.rooms.config;
        Limits {
            messages_per_second: membership.rooms.rates.per_second(),
            message_bytes_max: membership.rooms.message_bytes_max,
            entities_max: config.entities_max,
            entity_bytes_max: EntityLimits::default().entity_bytes_max as u32,
            members_max: config.members_max,
            tick_ms: config.tick.as_millis() as u32,
        }
    }
}

/// Returns the ServerHellos of a newcomer, in its form, with the state of the room.
fn hellos(mirror: &mut Mirror, welcome: &Welcome<'_>, form: Form) -> Vec<Vec<u8>> {
    let timestamp_ms = time::since_epoch().as_millis() as i64;
    let are_many = mirror.len() > FEW;
    let is_large = are_many || mirror.entities() > FEW;
    if !is_large {
        mirror.hide();
    }
    if is_large && form == Form::Text {
        mirror.show(Encoding::Text, |client, record| {
            hello_text::player(&record::shown(client, record)?)
        });
        mirror.show_entities(|owner, entity| hello_text::entity(&entity_of(owner, entity)));
        let (players, entities) = (mirror.shown(Encoding::Text), mirror.shown_entities());
        let limits = PageLimits::DEFAULT;
        return hello_text::server_hellos(welcome, players, entities, timestamp_ms, limits);
    }
    if are_many {
        mirror.show(Encoding::Binary, record::shown);
    }
    let few = mirror.members().filter(|_| !are_many);
    let few = few.filter_map(|(client, member)| record::shown(client, &member.record()));
    let few: Vec<Vec<u8>> = few.collect();
    let shown = mirror.shown(Encoding::Binary).filter(|_| are_many);
    let players = few.iter().map(|player| &player[..]).chain(shown);
    let entities = mirror
        .members()
        .flat_map(|(owner, member)| member.entities().map(move |entity| entity_of(owner, entity)));
    let pages = write::state_pages(players, entities, timestamp_ms, PageLimits::DEFAULT);
    let hello = |(at, page): (usize, &Bytes)| {
        let hello = write::server_hello(welcome, page, at + 1 < pages.len());
        Some(form.message(hello.into())?.into_owned())
    };
    pages.iter().enumerate().filter_map(hello).collect()
}

fn entity_of<'a>(owner: &'a str, entity: &'a Entity) -> write::Entity<'a> {
    let (id, snapshot, position) = (entity.id(), entity.snapshot(), entity.position());
    write::Entity { owner, id, snapshot, position }
}

/// Members, and entities, that are encoded for each newcomer. Those of larger rooms are kept encoded, which takes memory.
const FEW: usize = 64;

/// Version of the messages that this gateway speaks.
const VERSION: u32 = 1;
