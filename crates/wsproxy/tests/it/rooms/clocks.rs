//! Rooms while the wall clocks of instances and of Redis are set back.

use serde_json::json;

use crate::{
    rooms::room_client::{RoomClient, binary_with},
    support::{
        binary::Binary,
        clock::Clock,
        redis_server::{Options, RedisServer},
    },
};

async fn join(at: &Binary, client: &str) -> RoomClient {
    RoomClient::join_at(at.address, ("lobby", client, client), json!({})).await
}

fn version(member: &RoomClient) -> u64 {
    member.hello["presenceVersion"].as_str().unwrap().parse().unwrap()
}

#[tokio::test]
async fn members_are_told_once_though_clocks_step_back() {
    let clock = Clock::new();
    let environment = clock.environment();
    let variables = environment.each_ref().map(|(name, value)| (*name, value.as_str()));
    let redis = RedisServer::start_with(Options {
        environment: environment.to_vec(),
        ..Options::default()
    });
    let (one, two) = tokio::join!(binary_with(&redis, &variables), binary_with(&redis, &variables));
    let mut ann = join(&one, "ann").await;
    let mut bob = join(&two, "bob").await;
    assert_eq!(ann.told().await, "join bob");
    let first = version(&bob);

    clock.set(-3600);
    come_and_go(&one, &two, (&mut ann, &mut bob), "cat").await;
    // A state is kept and found as before.
    ann.send(json!({ "entitySpawn": { "entityId": "e" } })).await;
    assert_eq!(bob.told().await, "spawn e of ann");

    // The room ends, and its next life goes on from the version of the last one, which the clock is behind.
    let closed = one.api("POST", "/api/v1/rooms/lobby/close", "").await;
    assert_eq!(closed.json(), json!({ "members": 2 }));
    let mut ann = join(&one, "ann").await;
    let mut bob = join(&two, "bob").await;
    assert!(version(&bob) > first, "{} {first}", version(&bob));
    assert_eq!(ann.told().await, "join bob");
    assert_eq!(bob.members(), ["ann", "bob"]);
    assert!(bob.hello["initialState"]["entities"].is_null());
    come_and_go(&one, &two, (&mut ann, &mut bob), "dan").await;

    // Both instances still have their leases, and keep their members.
    clock.set(-3 * 3600);
    come_and_go(&two, &one, (&mut ann, &mut bob), "eve").await;
    for instance in [&one, &two] {
        assert!(
            instance
                .lines("This instance's lease ran out: members join again as they are heard.")
                .is_empty()
        );
    }
}

/// A client joins here, has another connection there, and is lost. Both members are told of it once.
async fn come_and_go(
    here: &Binary,
    there: &Binary,
    (ann, bob): (&mut RoomClient, &mut RoomClient),
    name: &str,
) {
    let client = join(here, name).await;
    let again = join(there, name).await;
    drop((client, again));
    for member in [&mut *ann, bob] {
        assert_eq!(member.told().await, format!("join {name}"));
        assert_eq!(member.told().await, format!("leave {name}"));
    }
    ann.say("end").await;
    assert_eq!(bob.told().await, "ann: end");
    bob.say("end").await;
    assert_eq!(ann.told().await, "bob: end");
}
