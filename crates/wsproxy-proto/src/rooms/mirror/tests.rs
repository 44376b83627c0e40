//! A mirror step by step.

use bytes::Bytes;

use super::*;
use crate::rooms::wire::Record;

/// Returns the record of a member whose connection is of a server.
fn record(server: u64, number: u64) -> String {
    format!("{server:016x}-{number} u {{}}")
}

fn pairs(pairs: &[(&str, &str)]) -> Vec<(Bytes, Bytes)> {
    let bytes = |text: &str| Bytes::copy_from_slice(text.as_bytes());
    pairs.iter().map(|(key, value)| (bytes(key), bytes(value))).collect()
}

/// Returns what Redis has of a room with these members, each of another instance.
fn reading(version: u64, members: &[&str]) -> Reading {
    let record = record(2, 1);
    let members: Vec<(&str, &str)> = members.iter().map(|client| (*client, &*record)).collect();
    Reading { version, members: pairs(&members), ..Reading::default() }
}

fn read(mirror: &mut Mirror, reading: &Reading, now: u64) -> Vec<Change> {
    let (ticket, mut changes) = (mirror.begin_reading(now), Vec::new());
    let outcome = mirror.apply_reading(ticket, reading, now, &mut changes);
    assert!(matches!(outcome, Outcome::Applied { .. }), "{outcome:?}");
    changes
}

/// Returns a mirror that has read a room.
fn mirror(version: u64, members: &[&str]) -> Mirror {
    let mut mirror = Mirror::new(SERVER, SMALL, MERGE, 0);
    assert_eq!(mirror.due(), Some(Due { at: 0, read: Read::Room }));
    assert_eq!(read(&mut mirror, &reading(version, members), 0), []);
    mirror
}

/// Hears a position of a member, from the connection that has its place.
fn hear(mirror: &mut Mirror, client: &str, entity: &str, position: &[u8]) -> bool {
    let from = mirror.member(client).and_then(|member| member.record().connection()).unwrap();
    mirror.hear_position(from, client, entity, position)
}

fn apply(mirror: &mut Mirror, kind: Kind<'_>) -> Vec<Change> {
    let mut changes = Vec::new();
    mirror.apply(&kind, 5, &mut changes);
    changes
}

fn join(version: u64, client: &str) -> Kind<'_> {
    Kind::Join { version, client, record: "0000000000000002-9 u {}" }
}

/// Returns the leave of a member that has nothing.
fn left(client: &str) -> Change {
    Change::Left { client: client.into(), entities: Vec::new() }
}

/// Returns the ids of the entities with which a member has left.
fn ended(change: &Change) -> Vec<&str> {
    let Change::Left { entities, .. } = change else { panic!("{change:?}") };
    entities.iter().map(Entity::id).collect()
}

#[test]
fn join_of_a_known_client_and_leave_of_an_unknown_are_no_event() {
    let mut mirror = mirror(10, &["a"]);
    assert_eq!(apply(&mut mirror, Kind::Leave { version: 11, client: "x" }), []);
    assert!(matches!(&apply(&mut mirror, join(12, "b"))[..], [Change::Joined { .. }]));
    // Redis has lost the members and got one back.
    let changes =
        apply(&mut mirror, Kind::Join { version: 13, client: "b", record: &record(2, 9) });
    assert_eq!(changes, []);
    assert_eq!(apply(&mut mirror, Kind::Leave { version: 14, client: "b" }), [left("b")]);
    assert_eq!((mirror.version(), mirror.len()), (14, 1));
}

#[test]
fn version_that_does_not_follow_has_the_members_read_again() {
    let mut mirror = mirror(10, &["a"]);
    mirror.begin_positions();
    assert_eq!(apply(&mut mirror, join(12, "b")), []);
    assert_eq!(mirror.due(), Some(Due { at: 5, read: Read::Room }));
    let ticket = mirror.begin_reading(6);
    assert_eq!(apply(&mut mirror, join(13, "c")), []);
    let mut changes = Vec::new();
    mirror.apply_reading(ticket, &reading(12, &["a", "b"]), 7, &mut changes);
    assert_eq!((changes.len(), mirror.len(), mirror.version()), (2, 3, 13));
    assert!(matches!(&apply(&mut mirror, join(14, "d"))[..], [Change::Joined { .. }]));
}

#[test]
fn member_that_a_reading_lacks_stays_for_ten_seconds() {
    let mut mirror = mirror(10, &["a", "b"]);
    assert_eq!(read(&mut mirror, &reading(0, &[]), 100), []);
    assert_eq!(read(&mut mirror, &reading(50, &["a"]), 100 + MISSING_MAX - 1), []);
    mirror.begin_positions();
    assert_eq!(mirror.due(), Some(Due { at: 100 + MISSING_MAX, read: Read::Room }));
    let changes = read(&mut mirror, &reading(50, &["a"]), 100 + MISSING_MAX);
    assert_eq!(changes, [left("b")]);
    assert_eq!(mirror.len(), 1);
}

#[test]
fn entities_go_with_their_member() {
    let mut mirror = mirror(10, &["a", "b"]);
    let channel = Origin::Channel;
    mirror.spawn(channel, "a", "e", b"s").unwrap();
    assert!(hear(&mut mirror, "a", "f", b"p"));
    assert!(mirror.is_foreign("b", "e") && !mirror.is_foreign("a", "e"));
    assert!(!mirror.is_foreign("b", "f"), "a position owns no entity");
    assert_eq!(mirror.update(channel, "a", "e", b"u"), Ok(&b"su"[..]));
    assert_eq!(mirror.update(channel, "a", "f", b"u"), Err(Refused::Unknown));
    assert_eq!(mirror.spawn(channel, "x", "e", b"s"), Err(Refused::NotMember));
    let changes = apply(&mut mirror, Kind::Leave { version: 11, client: "a" });
    assert_eq!((ended(&changes[0]), mirror.entities()), (vec!["e", "f"], 0));
    assert!(!mirror.is_foreign("b", "e"));
}

#[test]
fn limits_bound_what_members_here_add() {
    let mut mirror = mirror(10, &["a", "b"]);
    let empty = mirror.bytes();
    let here = Origin::Here;
    assert_eq!(mirror.spawn(here, "a", "e", &[0; 11]), Err(Refused::TooLarge));
    mirror.spawn(here, "a", "e", b"s").unwrap();
    mirror.position("a", "f", b"p").unwrap();
    assert_eq!(mirror.position("a", "g", b"p"), Err(Refused::MemberFull));
    assert_eq!(mirror.spawn(here, "b", "e", b"s"), Err(Refused::Foreign));
    mirror.spawn(here, "b", "g", b"s").unwrap();
    assert_eq!(mirror.spawn(here, "b", "h", b"s"), Err(Refused::StateFull));
    // Instances may exceed the limits together.
    mirror.spawn(Origin::Channel, "b", "h", b"s").unwrap();
    for (client, entity) in [("a", "e"), ("a", "f"), ("b", "g"), ("b", "h")] {
        mirror.despawn(here, client, entity).unwrap();
    }
    assert_eq!((mirror.bytes(), mirror.entities()), (empty, 0));
    mirror.limits.bytes_max = empty + 200;
    mirror.spawn(here, "a", "e", &[0; 10]).unwrap();
    assert_eq!(mirror.spawn(here, "b", "f", &[0; 10]), Err(Refused::StateFull));
    mirror.spawn(here, "a", "e", b"smaller").unwrap();
}

#[test]
fn presence_data_have_the_limits_of_an_entity() {
    let mut mirror = mirror(10, &["a", "b"]);
    let presence = |mirror: &mut Mirror, data: &[u8]| {
        mirror.presence(Origin::Here, "a", data).map(|member| member.record().json.to_owned())
    };
    assert_eq!(presence(&mut mirror, b"0123456789"), Ok("0123456789".into()));
    assert_eq!(presence(&mut mirror, b"0123456789a"), Err(Refused::TooLarge));
    mirror.limits.bytes_max = mirror.bytes();
    assert_eq!(presence(&mut mirror, b"smaller"), Ok("smaller".into()));
    mirror.limits.bytes_max = mirror.bytes();
    assert_eq!(presence(&mut mirror, b"too much"), Err(Refused::StateFull));
    assert_eq!(mirror.member("a").unwrap().record().json, "smaller");
}

#[test]
fn reading_overtakes_no_live_position() {
    let mut mirror = mirror(10, &["a"]);
    assert!(hear(&mut mirror, "a", "e", b"live"));
    let mut changes = Vec::new();
    mirror.begin_positions();
    mirror.apply_positions(
        &pairs(&[("a e", "old"), ("a f", "new"), ("x e", "?")]),
        0,
        &mut changes,
    );
    assert_eq!(changes, [Change::Moved { client: "a".into(), entity: "f".into() }]);
    let position = |mirror: &Mirror, id| {
        mirror.member("a").unwrap().entity(id).unwrap().position().unwrap().to_vec()
    };
    assert_eq!(
        (position(&mirror, "e"), position(&mirror, "f")),
        (b"live".to_vec(), b"new".to_vec())
    );
    // After a lost link the hash may be newer.
    mirror.lose_link();
    mirror.want_reading(7);
    assert_eq!(mirror.due(), Some(Due { at: 7, read: Read::Room }));
    let reading = Reading { positions: pairs(&[("a e", "newer")]), ..reading(10, &["a"]) };
    assert_eq!(read(&mut mirror, &reading, 7).len(), 1);
    assert_eq!(position(&mirror, "e"), b"newer");
    assert_eq!(mirror.due(), Some(Due { at: 7 + POSITIONS_AGAIN, read: Read::Positions }));
}

#[test]
fn position_of_another_connection_than_the_members_is_old() {
    let mut mirror = mirror(10, &["a"]);
    let connection = |number| Connection { server: 2, number };
    let entities = |mirror: &Mirror| mirror.member("a").unwrap().entities().len();
    assert!(!mirror.hear_position(connection(2), "a", "e", b"p"));
    assert!(!mirror.hear_position(Connection { server: 3, number: 1 }, "a", "e", b"p"));
    assert_eq!(entities(&mirror), 0);
    assert!(mirror.hear_position(connection(1), "a", "e", b"p"));
    assert_eq!(entities(&mirror), 1);
    // Of members that only a reading knows those of their connections are kept.
    let ticket = mirror.begin_reading(1);
    for number in [1, 2] {
        assert!(mirror.hear_position(connection(number), "b", &number.to_string(), b"p"));
    }
    mirror.apply_reading(ticket, &reading(11, &["a", "b"]), 2, &mut Vec::new());
    let ids: Vec<_> = mirror.member("b").unwrap().entities().map(Entity::id).collect();
    assert_eq!(ids, ["1"]);
}

#[test]
fn reading_of_positions_brings_no_ended_entity_back() {
    let mut mirror = mirror(10, &["a"]);
    mirror.spawn(Origin::Channel, "a", "e", b"s").unwrap();
    assert!(hear(&mut mirror, "a", "e", b"live"));
    let old = pairs(&[("a e", "old")]);
    let mut changes = Vec::new();
    mirror.begin_positions();
    mirror.despawn(Origin::Channel, "a", "e").unwrap();
    mirror.apply_positions(&old, 0, &mut changes);
    assert_eq!((&changes[..], mirror.entities()), (&[][..], 0), "it was despawned");
    mirror.spawn(Origin::Channel, "a", "e", b"s").unwrap();
    mirror.begin_positions();
    apply(&mut mirror, Kind::Leave { version: 11, client: "a" });
    apply(&mut mirror, join(12, "a"));
    mirror.apply_positions(&old, 0, &mut changes);
    assert_eq!((&changes[..], mirror.entities()), (&[][..], 0), "it was of an earlier life");
    mirror.begin_positions();
    mirror.apply_positions(&old, 0, &mut changes);
    assert_eq!((changes.len(), mirror.entities()), (1, 1), "it is of this life");
}

#[test]
fn reading_of_positions_brings_no_old_position_to_a_new_entity() {
    let mut mirror = mirror(10, &["a"]);
    let old = pairs(&[("a e", "old")]);
    let mut changes = Vec::new();
    mirror.spawn(Origin::Channel, "a", "e", b"s").unwrap();
    assert!(hear(&mut mirror, "a", "e", b"live"));
    mirror.begin_positions();
    mirror.despawn(Origin::Channel, "a", "e").unwrap();
    mirror.spawn(Origin::Channel, "a", "e", b"s").unwrap();
    mirror.apply_positions(&old, 7, &mut changes);
    assert_eq!(
        (&changes[..], mirror.member("a").unwrap().entity("e").unwrap().position()),
        (&[][..], None)
    );
    // Positions that were passed over are read again.
    assert_eq!(mirror.due(), Some(Due { at: 7 + POSITIONS_AGAIN, read: Read::Positions }));
    mirror.begin_positions();
    mirror.apply_positions(&old, 8, &mut changes);
    assert_eq!((changes.len(), mirror.due()), (1, None), "it is of this entity");
}

#[test]
fn position_without_an_entity_goes_where_redis_lacks_it() {
    let mut mirror = mirror(10, &["a"]);
    for entity in ["e", "f"] {
        assert!(hear(&mut mirror, "a", entity, b"p"));
    }
    mirror.spawn(Origin::Channel, "a", "g", b"s").unwrap();
    // Those that were heard are newer than any reading.
    let mut changes = Vec::new();
    mirror.begin_positions();
    mirror.apply_positions(&[], 0, &mut changes);
    assert_eq!((&changes[..], mirror.entities()), (&[][..], 3));
    mirror.lose_link();
    assert!(hear(&mut mirror, "a", "f", b"p"));
    mirror.begin_positions();
    mirror.apply_positions(&[], 0, &mut changes);
    assert_eq!(changes, [Change::Despawned { client: "a".into(), entity: "e".into() }]);
    assert_eq!(mirror.entities(), 2);
}

#[test]
fn reading_of_positions_brings_no_entity_back_that_ended_here() {
    let mut mirror = mirror(10, &["a"]);
    let mut changes = Vec::new();
    assert!(mirror.join_here("me", &record(SERVER, 1), 11, None, &mut changes));
    mirror.spawn(Origin::Here, "me", "e", b"s").unwrap();
    mirror.position("me", "e", b"live").unwrap();
    mirror.despawn(Origin::Here, "me", "e").unwrap();
    let own = record(SERVER, 1);
    apply(&mut mirror, Kind::Join { version: 11, client: "me", record: &own });
    // The despawn still waits for the bus, or was lost.
    mirror.begin_positions();
    changes.clear();
    mirror.apply_positions(&pairs(&[("me e", "old"), ("a f", "new")]), 0, &mut changes);
    assert_eq!(changes, [Change::Moved { client: "a".into(), entity: "f".into() }]);
    assert_eq!(mirror.entities(), 1);
}

#[test]
fn own_entities_are_not_taken_back_by_a_reading() {
    let mut mirror = mirror(10, &["a"]);
    let mut changes = Vec::new();
    assert!(mirror.join_here("me", &record(SERVER, 1), 11, None, &mut changes));
    assert!(matches!(&changes[..], [Change::Joined { .. }]));
    mirror.spawn(Origin::Here, "me", "e", b"s").unwrap();
    assert_eq!(
        apply(&mut mirror, Kind::Join { version: 11, client: "me", record: &record(SERVER, 1) }),
        []
    );
    let own = record(SERVER, 1);
    let reading = Reading { version: 11, members: pairs(&[("me", &own)]), ..Reading::default() };
    read(&mut mirror, &reading, 20);
    assert!(mirror.member("me").unwrap().entity("e").is_some());
    assert!(!mirror.is_local(), "the other member is missed for a while");
}

#[test]
fn leave_before_a_join_here_is_told_as_both() {
    let mut mirror = mirror(10, &["a"]);
    mirror.spawn(Origin::Channel, "a", "old", b"s").unwrap();
    let mut changes = Vec::new();
    // The client left and joined here; the channel has brought neither.
    assert!(mirror.join_here("a", &record(SERVER, 1), 12, None, &mut changes));
    assert_eq!(changes, []);
    mirror.spawn(Origin::Here, "a", "new", b"s").unwrap();
    let changes = apply(&mut mirror, Kind::Leave { version: 11, client: "a" });
    assert_eq!(changes.len(), 3, "{changes:?}");
    assert_eq!(ended(&changes[0]), ["new", "old"]);
    assert!(matches!(&changes[1..], [Change::Joined { .. }, Change::Spawned { .. }]));
    assert_eq!(apply(&mut mirror, join(12, "a")), []);
    assert!(mirror.member("a").unwrap().is_here());
    assert!(mirror.member("a").unwrap().entity("old").is_none());
}

#[test]
fn too_many_news_during_a_reading_have_it_repeated() {
    let mut mirror = Mirror::new(SERVER, Limits::default(), MERGE, 0);
    let ticket = mirror.begin_reading(0);
    let snapshot = vec![0; 4096];
    for _ in 0..=LOG_BYTES_MAX / snapshot.len() {
        assert_eq!(mirror.spawn(Origin::Channel, "a", "e", &snapshot), Err(Refused::NotMember));
    }
    assert!(mirror.bytes() <= LOG_BYTES_MAX);
    let outcome = mirror.apply_reading(ticket, &reading(1, &["a"]), 9, &mut Vec::new());
    assert_eq!((outcome, mirror.is_complete()), (Outcome::Overflowed, false));
    assert_eq!(mirror.due(), Some(Due { at: 9, read: Read::Room }));
    let ticket = mirror.begin_reading(9);
    mirror.abandon_reading(ticket, 50);
    assert_eq!(mirror.due(), Some(Due { at: 50, read: Read::Room }));
    let outcome = mirror.apply_reading(ticket, &reading(1, &["a"]), 9, &mut Vec::new());
    assert_eq!(outcome, Outcome::Stale);
}

#[test]
fn a_certain_reading_ends_a_member_whose_leave_was_lost() {
    let mut mirror = mirror(10, &["a", "b"]);
    for is_certain in [false, true] {
        let reading = Reading { is_certain, ..reading(11, &["b"]) };
        let ticket = mirror.begin_reading(1);
        let mut changes = Vec::new();
        mirror.apply_reading(ticket, &reading, 1, &mut changes);
        let expected = if is_certain { vec![left("a")] } else { vec![] };
        assert_eq!(changes, expected);
    }
    assert_eq!(mirror.due().map(|due| due.read), Some(Read::Positions));
}

#[test]
fn fields_of_no_member_are_reported() {
    let mut mirror = mirror(10, &["a"]);
    let fields = pairs(&[("a e", "s"), ("x e", "s"), ("x f", "s"), ("y e", "s")]);
    let reading = Reading { entities: fields, ..reading(10, &["a"]) };
    let ticket = mirror.begin_reading(1);
    let outcome = mirror.apply_reading(ticket, &reading, 1, &mut Vec::new());
    assert_eq!(outcome, Outcome::Applied { orphans: vec!["x".into(), "y".into()] });
}

#[test]
fn newcomers_are_told_of_a_record_that_was_shown_once() {
    for encoding in [Encoding::Binary, Encoding::Text] {
        let mut mirror = mirror(10, &["a", "b"]);
        let bytes = mirror.bytes();
        let made = std::cell::RefCell::new(Vec::new());
        let make = |client: &str, record: &Record<'_>| {
            made.borrow_mut().push(client.to_owned());
            (client != "b").then(|| record.json.into())
        };
        mirror.show(encoding, make);
        mirror.show(encoding, make);
        made.borrow_mut().sort();
        assert_eq!(made.take(), ["a", "b"]);
        let shown =
            |mirror: &Mirror| mirror.shown(encoding).map(<[u8]>::to_vec).collect::<Vec<_>>();
        assert_eq!(shown(&mirror), [b"{}"], "nothing can be told of b");
        assert_eq!(mirror.bytes(), bytes + 4);
        // Another record is shown again, and a member that is gone takes nothing.
        mirror.presence(Origin::Channel, "a", b"new").unwrap();
        assert_eq!(shown(&mirror).len(), 0);
        mirror.show(encoding, make);
        assert_eq!((made.take(), shown(&mirror).len()), (vec!["a".to_owned()], 1));
        let bytes = mirror.bytes();
        mirror.hide();
        assert!(mirror.bytes() < bytes);
        mirror.show(encoding, make);
        assert_eq!((made.take().len(), mirror.bytes()), (2, bytes));
        apply(&mut mirror, Kind::Leave { version: 11, client: "a" });
        apply(&mut mirror, Kind::Leave { version: 12, client: "b" });
        assert_eq!(mirror.bytes(), 0);
    }
}

#[test]
fn newcomers_are_told_of_an_entity_that_was_shown_once() {
    let mut mirror = mirror(10, &["a"]);
    mirror.spawn(Origin::Channel, "a", "e", b"s").unwrap();
    assert!(hear(&mut mirror, "a", "f", b"p"));
    let bytes = mirror.bytes();
    let made = std::cell::Cell::new(0);
    let make = |client: &str, entity: &Entity| {
        made.set(made.get() + 1);
        Some([client, entity.id()].concat().into_bytes())
    };
    // Returns the texts made, and those shown.
    let show = |mirror: &mut Mirror| {
        mirror.show_entities(make);
        (made.take(), mirror.shown_entities().count())
    };
    assert_eq!(show(&mut mirror), (2, 2));
    assert_eq!((show(&mut mirror), mirror.bytes()), ((0, 2), bytes + 4));
    // Each change makes a text void.
    assert!(hear(&mut mirror, "a", "f", b"q"));
    assert_eq!(
        (mirror.shown_entities().collect::<Vec<_>>(), mirror.bytes()),
        (vec![&b"ae"[..]], bytes + 2)
    );
    mirror.spawn(Origin::Channel, "a", "e", b"t").unwrap();
    assert_eq!((mirror.shown_entities().count(), mirror.bytes()), (0, bytes));
    assert_eq!(show(&mut mirror), (2, 2));
    mirror.hide();
    assert_eq!((show(&mut mirror), mirror.bytes()), ((2, 2), bytes + 4));
    mirror.despawn(Origin::Channel, "a", "e").unwrap();
    assert_eq!(show(&mut mirror), (0, 1));
    apply(&mut mirror, Kind::Leave { version: 11, client: "a" });
    assert_eq!(mirror.bytes(), 0);
}

#[test]
fn table_of_few_members_takes_two_kilobytes() {
    // The table of up to 14 members has 16 places, each with a byte more.
    assert!(16 * (size_of::<(Box<str>, Member)>() + 1) + 16 <= 2048, "{}", size_of::<Member>());
}

const SERVER: u64 = 1;
const MERGE: Merge = Merge {
    entity: |snapshot, update| Some([snapshot, update].concat()),
    presence: |_, presence| String::from_utf8(presence.to_vec()).ok(),
};
const SMALL: Limits =
    Limits { member_entities_max: 2, entities_max: 3, entity_bytes_max: 10, bytes_max: 10_000 };
