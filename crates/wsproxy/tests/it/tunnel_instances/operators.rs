//! Lanes of all instances in the worker API.

use serde_json::{Value, json};
use wsproxy_conn::lane::LaneSettings;

use super::{Pair, serve};
use crate::support::{
    cluster_agent::{ClusterAgent, Name},
    eventually_yes,
    gateway::{API_KEY, TestInstance},
    http::request,
};

async fn get(gateway: &TestInstance, path: &str) -> (u16, Value) {
    let bearer = format!("Bearer {API_KEY}");
    let headers = [("Authorization", &*bearer)];
    let answer = request(gateway.address(), "GET", path, &headers, b"").await;
    (answer.status, serde_json::from_str(&answer.body).unwrap_or(Value::Null))
}

async fn connect(gateway: &TestInstance, name: Name<'_>) -> ClusterAgent {
    ClusterAgent::named(gateway.address(), name, LaneSettings::default(), serve).await.unwrap()
}

/// Number of the elements of a list.
fn count(list: &Value) -> Option<usize> {
    list.as_array().map(Vec::len)
}

#[tokio::test]
async fn operators_see_the_lanes_of_all_instances() {
    let pair = Pair::start().await;
    let _here = connect(&pair.one, Name { agent: "node-2", boot: 2, ..Name::default() }).await;
    let path = "/api/v1/clusters/c1";
    eventually_yes("both lanes", async || count(&get(&pair.one, path).await.1["lanes"]) == Some(2))
        .await;
    let (status, one) = get(&pair.one, path).await;
    assert_eq!((status, &one["server_id"], &one["complete"]), (200, &"s1".into(), &true.into()));
    let (here, there) = (&one["lanes"][0], &one["lanes"][1]);
    assert_eq!((&here["agent_id"], &here["server_id"]), (&"node-2".into(), &"s1".into()));
    assert!(here["streams"].is_u64(), "{here}");
    assert_eq!((&there["agent_id"], &there["server_id"]), (&"node-1".into(), &"s2".into()));
    assert_eq!((&there["state"], &there["streams"]), (&"ready".into(), &Value::Null));
    assert!(there["connected_seconds"].as_u64().unwrap() < 600, "{there}");
    assert_eq!(get(&pair.one, "/api/v1/clusters/c9").await.0, 404);
    pair.drain().await;
}

#[tokio::test]
async fn operators_see_the_clusters_of_all_instances() {
    let mut pair = Pair::start().await;
    let _here = connect(&pair.one, Name { agent: "node-2", boot: 2, ..Name::default() }).await;
    let other = Name { cluster: "c2", token: "other-token", boot: 3, ..Name::default() };
    let _other = connect(&pair.two, other).await;
    let all = get(&pair.one, "/api/v1/clusters").await.1;
    let of =
        |index: usize, names: [&str; 4]| names.map(|name| all["clusters"][index][name].clone());
    let names = ["cluster_id", "lanes", "lanes_here", "upstream_healthy"];
    assert_eq!(json!(of(0, names)), json!(["c1", 2, 1, false]));
    assert_eq!(json!(of(1, names)), json!(["c2", 1, 0, null]));
    assert_eq!((count(&all["clusters"]), &all["complete"]), (Some(2), &true.into()));
    let behind = get(&pair.one, "/api/v1/clusters?cursor=c1").await.1;
    assert_eq!(
        (count(&behind["clusters"]), &behind["clusters"][0]["cluster_id"]),
        (Some(1), &"c2".into())
    );
    assert_eq!(get(&pair.one, "/api/v1/clusters/c2").await.1["lanes"][0]["server_id"], "s2");
    // Without Redis the lanes here are shown nevertheless.
    pair.redis.kill();
    eventually_yes("the loss is told", async || {
        let all = get(&pair.one, "/api/v1/clusters").await.1;
        all["complete"] == false && all["clusters"][0]["lanes_here"] == 1
    })
    .await;
    assert_eq!(get(&pair.one, "/api/v1/clusters/c1").await.1["complete"], false);
    pair.drain().await;
}
