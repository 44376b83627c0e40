//! ServerHello: the state of the room for a member that begins to listen.

use wsproxy_conn::{
    clock::{self, Micros},
    link::Queued,
};
use wsproxy_proto::rooms::{
    check::{Hello, Kind},
    mirror::Limits as EntityLimits,
    v1::Limits,
    write::{self, Entity, PageLimits, Welcome},
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
        let mut state = self.state.lock();
        let begin = clock::now();
        let is_large = state.mirror.len() > FEW_MEMBERS;
        match is_large {
            true => state.mirror.show(record::shown),
            false => state.mirror.hide(),
        }
        let mirror = &state.mirror;
        let few = mirror.members().filter(|_| !is_large);
        let few = few.filter_map(|(client, member)| record::shown(client, &member.record()));
        let few: Vec<Vec<u8>> = few.collect();
        let players = few.iter().map(|player| &player[..]).chain(mirror.shown());
        let entities = mirror.members().flat_map(|(owner, member)| {
            member.entities().map(move |entity| Entity {
                owner,
                id: entity.id(),
                snapshot: entity.snapshot(),
                position: entity.position(),
            })
        });
        let timestamp_ms = time::since_epoch().as_millis() as i64;
        let pages = write::state_pages(players, entities, timestamp_ms, PageLimits::DEFAULT);
        let limits = self.limits(membership);
        let connection = membership.connection.to_string();
        let features = |feature: fn(&Hello<'_>) -> bool| hello.is_some_and(feature);
        let welcome = Welcome {
            server_version: concat!("wsproxy/", env!("CARGO_PKG_VERSION")),
            client: membership.client.as_str(),
            room: self.id.as_str(),
            version: VERSION,
            batch: features(|hello| hello.batch),
            acks: features(|hello| hello.acks),
            connection: &connection,
            presence_version: mirror.version(),
            limits: &limits,
        };
        let hellos: Vec<_> = pages
            .iter()
            .enumerate()
            .map(|(at, page)| write::server_hello(&welcome, page, at + 1 < pages.len()))
            .collect();
        let Some(member) = state.member_mut(membership.connection.number) else {
            return self.release(state, now);
        };
        member.form = Some(form);
        member.reads_batches = welcome.batch;
        member.reliable = reliable::of_features(welcome.acks);
        let link = member.link.clone();
        let mut is_dirty = false;
        let bytes = hellos.iter().map(Vec::len).sum();
        self.count_sent(&membership.rooms, Some(Kind::ServerHello), hellos.len(), bytes);
        for hello in hellos {
            let Some(frame) = form.frame(hello, &link) else { continue };
            is_dirty |= link.push_state(frame) == Queued::Flush;
        }
        if is_dirty {
            state.dirty.push(link);
        }
        let counters = &membership.rooms.counters;
        counters.snapshot.observe(clock::now().since(begin).0);
        counters.snapshot_bytes.observe(bytes as u64);
        self.release(state, now);
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

/// Members whose records are encoded for each newcomer. Those of larger rooms are kept encoded, which takes memory.
const FEW_MEMBERS: usize = 64;

/// Version of the messages that this gateway speaks.
const VERSION: u32 = 1;
