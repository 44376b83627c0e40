//! Messages that the gateway writes, read again by decoders of whole messages.

use buffa::{Message as _, MessageField};
use serde_json::{Value, json};
use wsproxy_proto::rooms::check::{self, Event, Kind};
use wsproxy_proto::rooms::text::{to_binary, to_text};
use wsproxy_proto::rooms::v1::{
    EntitySnapshot, Limits, PlayerSnapshot, PresenceData, ServerHello, WorldState,
};
use wsproxy_proto::rooms::write::{
    self, Entity, PageLimits, PublishedBatch, PublishedEntry, Welcome,
};
use wsproxy_proto::rooms::{hello_text, snapshot, v1};

#[test]
fn state_comes_in_pages_with_everything_once() {
    let players: Vec<_> = (0..5).map(|n| player(&format!("client-{n}"))).collect();
    let encoded: Vec<_> = players.iter().map(PlayerSnapshot::encode_to_vec).collect();
    let ids: Vec<_> = (0..7).map(|n| format!("entity-{n}")).collect();
    let entities =
        ids.iter().map(|id| Entity { owner: "client-1", id, snapshot: None, position: None });
    for (limits, expected) in [
        (PageLimits::DEFAULT, 1),
        (PageLimits { items_max: 5, ..PageLimits::DEFAULT }, 3),
        (PageLimits { bytes_max: 0, ..PageLimits::DEFAULT }, 12),
    ] {
        let players_bytes = encoded.iter().map(|player| &player[..]);
        let pages = write::state_pages(players_bytes, entities.clone(), 5, limits);
        assert_eq!(pages.len(), expected);
        let mut whole = WorldState::default();
        for (index, page) in pages.iter().enumerate() {
            let more = index + 1 < pages.len();
            let hello = server_hello(page, more);
            assert_eq!((hello.more, hello.initial_state.last_update), (more, 5));
            assert_eq!(hello.assigned_client_id, "alice-1");
            whole.entities.extend(hello.initial_state.entities.clone());
            whole.players.extend(hello.initial_state.players.clone());
        }
        assert_eq!(whole.players, players);
        assert!(whole.entities.iter().map(|entity| &entity.id).eq(&ids));
    }
    let empty = write::state_pages([], [], 5, PageLimits::DEFAULT);
    assert_eq!(empty.len(), 1);
    assert_eq!(server_hello(&empty[0], false).initial_state.entities, []);
}

#[test]
fn entity_has_its_spawn_its_updates_and_its_newest_place() {
    let spawn = payload(
        r#"{"entitySpawn":{"entityId":"box","templateId":"crate","components":{"a":"1","b":"2"}}}"#,
    );
    let update =
        payload(r#"{"entityUpdate":{"entityId":"box","components":{"b":"/w==","c":"Mw=="}}}"#);
    let place = payload(
        r#"{"positionUpdate":{"entityId":"box","position":{"x":1,"z":3},"sequenceNumber":9}}"#,
    );
    let kept = snapshot::spawned(&spawn, "alice-1").unwrap();
    let kept = snapshot::updated(&kept, &update).unwrap();
    let entity =
        Entity { owner: "alice-1", id: "box", snapshot: Some(&kept), position: Some(&place) };
    let found = &world(entity).entities[0];
    let expected = json!({
        "id": "box", "templateId": "crate", "ownerId": "alice-1", "position": {"x": 1.0, "z": 3.0},
        "components": {"a": "1", "c": "3"}, "binaryComponents": {"b": "/w=="},
    });
    assert_eq!(serde_json::to_value(found).unwrap(), expected);
    // Text again: the name is in one of both maps.
    let update = payload(r#"{"entityUpdate":{"entityId":"box","components":{"b":"Mg=="}}}"#);
    let kept =
        EntitySnapshot::decode_from_slice(&snapshot::updated(&kept, &update).unwrap()).unwrap();
    assert_eq!((kept.components["b"].as_str(), kept.binary_components.len()), ("2", 0));
    assert_eq!(snapshot::spawned(b"\xff", "alice-1"), None);
    assert_eq!(snapshot::updated(&kept.encode_to_vec(), b"\xff"), None);
}

#[test]
fn entity_told_again_has_its_components_that_are_no_text() {
    let spawn = payload(r#"{"entitySpawn":{"entityId":"box","templateId":"crate"}}"#);
    let kept = snapshot::spawned(&spawn, "alice-1").unwrap();
    assert_eq!(write::spawn(&kept).unwrap().count(), 1, "there is nothing to update");
    let update =
        payload(r#"{"entityUpdate":{"entityId":"box","components":{"a":"MQ==","b":"/w=="}}}"#);
    let kept = snapshot::updated(&kept, &update).unwrap();
    let told: Vec<Value> = write::spawn(&kept)
        .unwrap()
        .map(|message| {
            assert_eq!(check::read(&message).unwrap().sender, "alice-1");
            serde_json::from_str(&to_text(&message).unwrap()).unwrap()
        })
        .collect();
    let spawn = json!({"entityId": "box", "templateId": "crate", "ownerId": "alice-1", "components": {"a": "1"}});
    let update = json!({"entityId": "box", "components": {"b": "/w=="}});
    let expected = [
        json!({"type": "ENTITY_SPAWN", "sender": "alice-1", "entitySpawn": spawn}),
        json!({"type": "ENTITY_UPDATE", "sender": "alice-1", "entityUpdate": update}),
    ];
    assert_eq!(told, expected);
    assert!(write::spawn(b"\xff").is_none());
}

#[test]
fn entity_that_nobody_spawned_has_its_place() {
    let place = payload(r#"{"positionUpdate":{"entityId":"avatar","rotation":{"w":1}}}"#);
    let entity = Entity { owner: "bob-1", id: "avatar", snapshot: None, position: Some(&place) };
    let expected = json!({"id": "avatar", "ownerId": "bob-1", "rotation": {"w": 1.0}});
    assert_eq!(serde_json::to_value(&world(entity).entities[0]).unwrap(), expected);
}

#[test]
fn events_errors_and_positions_are_valid_messages() {
    let data = PresenceData { display_name: "Bob".into(), ..PresenceData::default() };
    let place = payload(r#"{"positionUpdate":{"entityId":"avatar"}}"#);
    let snapshot =
        snapshot::spawned(&payload(r#"{"entitySpawn":{"entityId":"box"}}"#), "bob-1").unwrap();
    for (message, expected) in [
        (
            write::presence(Event::Join, "bob-1", Some(&data), 7),
            json!({"type": "PRESENCE_JOIN", "sender": "bob-1", "seq": "7",
                "presenceEvent": {"clientId": "bob-1", "data": {"displayName": "Bob"}}}),
        ),
        (
            write::presence(Event::Leave, "bob-1", None, 8),
            json!({"type": "PRESENCE_LEAVE", "sender": "bob-1", "seq": "8",
                "presenceEvent": {"clientId": "bob-1", "eventType": "LEAVE"}}),
        ),
        (
            write::despawn("box", "bob-1"),
            json!({"type": "ENTITY_DESPAWN", "sender": "bob-1", "entityDespawn": {"entityId": "box"}}),
        ),
        (
            write::spawn(&snapshot).unwrap().next().unwrap(),
            json!({"type": "ENTITY_SPAWN", "sender": "bob-1", "entitySpawn": {"entityId": "box", "ownerId": "bob-1"}}),
        ),
        (
            write::position("bob-1", &place),
            json!({"type": "POSITION_UPDATE", "sender": "bob-1", "positionUpdate": {"entityId": "avatar"}}),
        ),
        (
            write::error("rate_limited", "Too many.", 1000, "m-1"),
            json!({"error": {"code": "rate_limited", "message": "Too many.", "retryAfterMs": 1000, "messageId": "m-1"}}),
        ),
        (
            write::position_batch([("bob-1", &place[..]), ("eve", &place)], 300),
            json!({"positionBatch": {"timestamp": "300", "entries": [
                {"sender": "bob-1", "update": {"entityId": "avatar"}}, {"sender": "eve", "update": {"entityId": "avatar"}}]}}),
        ),
        (write::position_batch([], 0), json!({"positionBatch": {}})),
    ] {
        let text = to_text(&message).unwrap();
        assert_eq!(serde_json::from_str::<Value>(&text).unwrap(), expected);
        assert!(check::read(&message).unwrap().stamp.message_type.is_none());
    }
}

#[test]
fn batches_of_any_size_are_read_again() {
    let long = "e".repeat(120);
    let update =
        v1::PositionUpdate { entity_id: long.clone(), ..Default::default() }.encode_to_vec();
    for entries in [0, 1, 2, 150, 1000] {
        let entries: Vec<(&str, &[u8])> = vec![(&long, &update); entries];
        let batch = write::position_batch(entries.iter().copied(), i64::MAX);
        assert_eq!(check::read(&batch).map(|checked| checked.kind), Ok(Kind::Batch));
        assert_eq!(write::batch_entries(&batch).collect::<Vec<_>>(), entries);
    }
    assert_eq!(write::batch_entries(b"\xb2\x06\x05\x0a\xff").count(), 0);
}

#[test]
fn state_as_text_is_that_of_protobuf() {
    let players: Vec<Vec<u8>> =
        (0..5).map(|n| player(&format!("p{n}\" {{")).encode_to_vec()).collect();
    let players: Vec<&[u8]> = players.iter().map(Vec::as_slice).collect();
    let spawn = payload(r#"{"entitySpawn":{"entityId":"box","components":{"a":"1"}}}"#);
    let update = payload(r#"{"entityUpdate":{"entityId":"box","components":{"b":"/w=="}}}"#);
    let place = payload(r#"{"positionUpdate":{"entityId":"box","position":{"x":1.5}}}"#);
    let snapshot = snapshot::spawned(&spawn, "bob-1").unwrap();
    let snapshot = snapshot::updated(&snapshot, &update).unwrap();
    let entities = [
        Entity { owner: "bob-1", id: "box", snapshot: Some(&snapshot), position: Some(&place) },
        Entity { owner: "eve", id: "hand", snapshot: None, position: Some(&place) },
    ];
    let limits = Limits { members_max: 1000, ..Limits::default() };
    let welcome = welcome(&limits);
    let texts: Vec<Vec<u8>> = players.iter().map(|one| hello_text::player(one).unwrap()).collect();
    let placed: Vec<Vec<u8>> =
        entities.iter().map(|one| hello_text::entity(one).unwrap()).collect();
    for (players_some, entities_some) in [(5, 2), (0, 2), (3, 0), (0, 0)] {
        for items_max in [1, 3, 4, 1000] {
            let page_limits = PageLimits { items_max, bytes_max: 1 << 20 };
            let (some, placed_some) = (&players[..players_some], &entities[..entities_some]);
            let pages = write::state_pages(
                some.iter().copied(),
                placed_some.iter().copied(),
                300,
                page_limits,
            );
            let last = pages.len() - 1;
            let expected: Vec<Value> = pages
                .iter()
                .enumerate()
                .map(|(at, page)| write::server_hello(&welcome, page, at < last))
                .map(|hello| serde_json::from_str(&to_text(&hello).unwrap()).unwrap())
                .collect();
            let texts = texts[..players_some].iter().map(Vec::as_slice);
            let placed = placed[..entities_some].iter().map(Vec::as_slice);
            let hellos = hello_text::server_hellos(&welcome, texts, placed, 300, page_limits);
            let hellos: Vec<Value> =
                hellos.iter().map(|hello| serde_json::from_slice(hello).unwrap()).collect();
            assert_eq!(hellos, expected);
        }
    }
    let small = PageLimits { items_max: 1000, bytes_max: texts[0].len() + 1 };
    let hellos = hello_text::server_hellos(&welcome, texts.iter().map(Vec::as_slice), [], 0, small);
    assert_eq!(hellos.len(), 5, "pages are bounded by their bytes too");
}

#[test]
fn published_batch_names_connections_that_clients_do_not_see() {
    let update = v1::PositionUpdate { entity_id: "e".into(), ..Default::default() }.encode_to_vec();
    for numbers in [vec![], vec![1, 127, 128, u64::MAX]] {
        let entries = vec![("a", &update[..]); numbers.len()];
        let batch = write::position_batch(entries.iter().copied(), 1);
        let body = [&batch[..], &write::connections(numbers.iter().copied())].concat();
        // A worker that listens reads it as any batch.
        assert_eq!(check::read(&body).map(|checked| checked.kind), Ok(Kind::Batch));
        assert_eq!(write::batch_entries(&body).collect::<Vec<_>>(), entries);
        let entry = |(connection, (sender, update)): (&u64, (&'static str, _))| PublishedEntry {
            connection: *connection,
            sender,
            update,
        };
        let entries = numbers.iter().zip(entries).map(entry).collect();
        assert_eq!(
            PublishedBatch::parse(&body),
            Some(PublishedBatch { envelope: &batch, entries })
        );
        for wrong in [&body[..body.len() - 1], &batch, &[&body[..], b"\x08\x01"].concat()] {
            let read = PublishedBatch::parse(wrong).map(|batch| batch.envelope);
            // Fields behind the numbers are of a later version.
            let is_whole = wrong.len() > body.len() || (numbers.is_empty() && wrong == body);
            assert_eq!(read, is_whole.then_some(&batch[..]));
        }
    }
    let one = write::position_batch([("a", &update[..])], 1);
    for numbers in [&[][..], &[1, 2]] {
        let body = [&one[..], &write::connections(numbers.iter().copied())].concat();
        assert_eq!(PublishedBatch::parse(&body), None);
    }
}

fn world(entity: Entity<'_>) -> WorldState {
    let pages = write::state_pages([], [entity], 0, PageLimits::DEFAULT);
    WorldState::decode_from_slice(&pages[0]).unwrap()
}

fn server_hello(page: &[u8], more: bool) -> ServerHello {
    let limits = Limits { members_max: 1000, ..Limits::default() };
    let welcome = welcome(&limits);
    let envelope = write::server_hello(&welcome, page, more);
    assert_eq!(check::read(&envelope).map(|checked| checked.kind), Ok(Kind::ServerHello));
    let envelope = v1::Envelope::decode_from_slice(&envelope).unwrap();
    let Some(v1::envelope::Payload::ServerHello(hello)) = envelope.payload else {
        panic!("{envelope:?}")
    };
    assert_eq!((hello.features.len(), hello.limits.members_max), (1, 1000));
    *hello
}

fn welcome(limits: &Limits) -> Welcome<'_> {
    Welcome {
        server_version: "0.1.0",
        client: "alice-1",
        room: "lobby",
        version: 1,
        batch: true,
        acks: false,
        connection: "c-1",
        presence_version: 7,
        limits,
    }
}

fn player(client: &str) -> PlayerSnapshot {
    let place = v1::Vector3 { x: 1.0, ..Default::default() };
    PlayerSnapshot {
        client_id: client.into(),
        position: MessageField::some(place),
        ..PlayerSnapshot::default()
    }
}

/// The payload of the envelope in JSON, encoded.
fn payload(json: &str) -> Vec<u8> {
    use check::Body::{Position, Spawn, Update};
    let binary = to_binary(json.as_bytes()).unwrap();
    match check::read(&binary).unwrap().body {
        Position { update, .. } | Update { update, .. } => update.to_vec(),
        Spawn { spawn, .. } => spawn.to_vec(),
        other => panic!("{other:?}"),
    }
}
