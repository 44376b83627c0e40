//! Metrics of rooms.

use prometheus_client::registry::Unit;
use wsproxy_proto::rooms::check::Kind;

use crate::{
    endpoint::rooms::{
        Rooms,
        counters::{JoinResult, RoomCounters},
    },
    registry::{metrics::collect_rooms, writer::WriterCounters},
    telemetry::{
        family::Family,
        histogram::Histogram,
        metrics::{connections, messages},
        scrape::{Scrape, Section, Source},
    },
};

impl Source for Rooms {
    fn collect(&self, scrape: &mut Scrape) {
        connections::collect_profile(Family::Rooms, &self.profile, scrape);
        match &self.registry {
            Some(registry) => registry.collect(scrape),
            None => collect_rooms(&WriterCounters::default(), scrape),
        }
        self.counters.collect(scrape);
        scrape.section(Section::Families);
        let rooms = self.table.all();
        let sizes = Histogram::<0, 1>::default();
        rooms.iter().for_each(|room| sizes.observe(room.len() as u64));
        let help = "Rooms with members at this instance";
        scrape.gauge("rooms_active", help, self.table.len() as i64);
        let help = "Sizes of these rooms, as they are now: members over all instances";
        scrape.histogram(("room_members", None), help, &[], sizes.read(1.0));
        let help = "Bytes of the state of these rooms";
        let bytes = self.table.state_bytes() as i64;
        scrape.gauge_in(Unit::Bytes, "room_state", help, bytes);
        let help = "Members whose connection has ended, and who leave after the grace";
        scrape.gauge("room_leaves_waiting", help, self.leaving.len() as i64);
        let help = "1 if rooms believe clients without a token, which is for development only";
        scrape.gauge("room_development", help, self.is_development.into());
    }
}

impl Source for RoomCounters {
    fn collect(&self, scrape: &mut Scrape) {
        let errors = [
            ("invalid", &self.invalid),
            ("rate_limited", &self.rate_limited),
            ("unreadable", &self.bad_frames),
        ];
        messages::collect_errors(Family::Rooms, errors, scrape);
        scrape.section(Section::Families);
        self.collect_messages(scrape);
        self.collect_positions(scrape);
        self.collect_members(scrape);
        self.collect_acks(scrape);
    }
}

impl RoomCounters {
    fn collect_messages(&self, scrape: &mut Scrape) {
        let by = |kind, direction| [("kind", kind), ("direction", direction)];
        let kinds = Kind::ALL.into_iter();
        let of_clients = kinds.clone().filter(|kind| kind.is_from_clients());
        let received =
            of_clients.map(|kind| (by(kind.name(), "in"), self.received[kind as usize].value()));
        let to_clients = kinds.filter(|kind| *kind != Kind::ClientHello && *kind != Kind::Ack);
        let sent =
            to_clients.map(|kind| (by(kind.name(), "out"), self.sent[kind as usize].value()));
        let others = [
            (by("opaque", "in"), self.opaque.value()),
            (by("opaque", "out"), self.opaque_sent.value()),
            (by("invalid", "in"), self.invalid.value()),
        ];
        let help = "Messages of members, and messages to members, by their payload";
        scrape.counters("room_messages", help, received.chain(sent).chain(others));
        let help = "Messages of workers into rooms that have members here";
        scrape.counter("room_worker_messages", help, self.from_workers.value());
        let publishes = [("local", &self.published_local), ("shared", &self.published_shared)];
        let publishes = publishes.map(|(scope, count)| ([("scope", scope)], count.value()));
        let help = "Messages of rooms that were published for other instances; local: positions of \
            rooms whose members are all here";
        scrape.counters("room_publishes", help, publishes);
    }

    fn collect_positions(&self, scrape: &mut Scrape) {
        let coalesced = [
            ("tick", &self.coalesced_tick),
            ("rate", &self.coalesced_rate),
            ("slow", &self.coalesced_slow),
        ];
        let coalesced = coalesced.map(|(why, count)| ([("why", why)], count.value()));
        let help = "Positions for which a newer one went instead: within a tick, or while their sender was \
            above its rate; slow: batches that a member did not read in time";
        scrape.counters("room_positions_coalesced", help, coalesced);
        let help = "Positions in a batch of this instance's members";
        scrape.histogram(("room_batch_entries", None), help, &[], self.batch_entries.read(1.0));
        let help = "Time to send the positions of a tick to all members here";
        scrape.seconds("room_tick", help, &[], self.tick.read(MICROSECOND));
    }

    fn collect_members(&self, scrape: &mut Scrape) {
        let joins = JoinResult::ALL;
        let joins =
            joins.map(|result| ([("result", result.label())], self.joins[result as usize].value()));
        scrape.counters("room_join", "Joins of clients here, by their result", joins);
        let events = [("join", &self.joins_seen), ("leave", &self.leaves_seen)];
        let events = events.map(|(event, count)| ([("event", event)], count.value()));
        let help = "Changes of the members of rooms, which members here were told";
        scrape.counters("room_presence_events", help, events);
        let help = "Times that a room was read again from the store";
        scrape.counter("room_readings", help, self.readings.value());
        let help = "Orders of workers to send a member away, which this instance has heard";
        scrape.counter("room_kicks", help, self.kicked.value());
        let help = "Time to write the state of a room for a member that begins to listen";
        scrape.seconds("room_snapshot", help, &[], self.snapshot.read(MICROSECOND));
        let help = "Bytes of these states";
        let bytes = self.snapshot_bytes.read(1.0);
        scrape.histogram(("room_snapshot", Some(Unit::Bytes)), help, &[], bytes);
    }

    fn collect_acks(&self, scrape: &mut Scrape) {
        let acks = [
            ("wanted", &self.reliable),
            ("acknowledged", &self.acks),
            ("tries", &self.acks_tries),
            ("overflow", &self.acks_overflow),
            ("closed", &self.acks_closed),
        ];
        let acks = acks.map(|(outcome, count)| ([("outcome", outcome)], count.value()));
        let help = "Reliable messages to members that acknowledge, by outcome: acknowledged, or given up after all \
            tries, for newer messages, or at the end of the connection";
        scrape.counters("room_acks", help, acks);
        let help = "Reliable messages that were sent again since they were not acknowledged";
        scrape.counter("room_messages_resent", help, self.resent.value());
    }
}

/// A microsecond in seconds.
const MICROSECOND: f64 = 1e-6;
