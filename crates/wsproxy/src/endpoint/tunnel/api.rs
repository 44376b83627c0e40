//! Clusters in the worker API, as operators see them: lanes, health, streams and the breaker at this instance. Needs the
//! scope `admin`.

use std::{sync::Arc, time::Duration};

use axum::{
    Extension, Json, Router,
    extract::{Query, State, rejection::QueryRejection},
    routing::get,
};
use serde::Deserialize;
use serde_json::{Value, json};
use wsproxy_conn::clock::{self, Micros};
use wsproxy_proto::names::Id;

use crate::{
    core::Core,
    endpoint::tunnel::{
        Tunnel,
        lanes::{ClusterLanes, Lane},
    },
    http::{
        api::{PathId, Worker},
        rejection::Rejection,
    },
};

/// Makes the routes of clusters.
pub fn router(tunnel: &Arc<Tunnel>) -> Router<Arc<Core>> {
    Router::new()
        .route("/api/v1/clusters", get(list))
        .route("/api/v1/clusters/{cluster_id}", get(find))
        .layer(Extension(Arc::clone(tunnel)))
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct ListQuery {
    cursor: Option<String>,
}

/// Lists the clusters of this instance by their ids, page by page.
async fn list(
    _worker: Worker,
    State(core): State<Arc<Core>>,
    Extension(tunnel): Extension<Arc<Tunnel>>,
    query: Result<Query<ListQuery>, QueryRejection>,
) -> Result<Json<Value>, Rejection> {
    check_served(&core)?;
    let Query(ListQuery { cursor }) =
        query.map_err(|error| Rejection::bad_request(error.body_text()))?;
    let mut clusters = tunnel.lanes.clusters();
    // The cursor is the last id of the page before.
    let after = cursor.unwrap_or_default();
    clusters.retain(|cluster| cluster.as_str() > after.as_str());
    let has_more = clusters.len() > PAGE;
    clusters.truncate(PAGE);
    let cursor = clusters.last().filter(|_| has_more).map(|last| last.as_str().to_owned());
    let listed = clusters.iter().filter_map(|cluster| {
        let found = tunnel.lanes.of(cluster)?;
        let mut about = described(&tunnel, cluster, &found);
        about["lanes"] = found.lanes.len().into();
        Some(about)
    });
    let clusters: Vec<_> = listed.collect();
    Ok(Json(json!({ "server_id": &*core.server_id, "clusters": clusters, "cursor": cursor })))
}

/// Describes a cluster with its lanes.
async fn find(
    _worker: Worker,
    State(core): State<Arc<Core>>,
    Extension(tunnel): Extension<Arc<Tunnel>>,
    PathId(cluster): PathId,
) -> Result<Json<Value>, Rejection> {
    check_served(&core)?;
    let found = tunnel.lanes.of(&cluster).ok_or_else(|| {
        Rejection::not_found(format!("No agent of {cluster} is connected to this instance."))
    })?;
    let mut about = described(&tunnel, &cluster, &found);
    about["server_id"] = (&*core.server_id).into();
    about["lanes"] = found.lanes.iter().map(|lane| of_lane(lane)).collect();
    Ok(Json(about))
}

/// Checks that the instance serves the tunnel.
///
/// # Errors
/// 404
fn check_served(core: &Core) -> Result<(), Rejection> {
    let is_served = core.config.endpoints.tunnel;
    let refused =
        || Rejection::not_found("This instance serves no tunnel: endpoints.tunnel is off.");
    is_served.then_some(()).ok_or_else(refused)
}

/// Describes a cluster without its lanes.
fn described(tunnel: &Tunnel, cluster: &Id, found: &ClusterLanes) -> Value {
    let (breaker, next_try) = tunnel.breakers.state(cluster, clock::now());
    let lost = found
        .lost
        .map(|(at, reason)| json!({ "seconds_ago": at.elapsed().as_secs(), "reason": reason }));
    let is_healthy = found.lanes.iter().any(|lane| {
        let health = lane.handle().and_then(|handle| handle.status().health);
        health.is_some_and(|health| health.upstream_ok)
    });
    json!({
        "cluster_id": cluster.as_str(),
        "upstream_healthy": is_healthy,
        "streams": found.streams,
        "waiting": tunnel.room.waiting(cluster),
        "breaker": {
            "state": breaker.label(),
            "next_try_seconds": next_try.map(|wait| wait.as_secs_f64().ceil() as u64),
        },
        "last_loss": lost,
    })
}

fn of_lane(lane: &Lane) -> Value {
    let micros = |Micros(micros): Micros| Duration::from_micros(micros).as_secs_f64();
    let mut about = json!({
        "agent_id": lane.name.agent.as_str(),
        "number": lane.name.number,
        "connected_seconds": lane.since.elapsed().as_secs(),
        "state": "opening",
    });
    let Some(handle) = lane.handle() else { return about };
    let status = handle.status();
    let is_leaving = status.is_draining || status.go_away.is_some();
    about["state"] = match () {
        () if status.end.is_some() => "ended",
        () if is_leaving => "draining",
        () if status.peer.is_some() => "ready",
        () => "opening",
    }
    .into();
    let numbers = handle.numbers();
    for (name, value) in [
        ("version", status.peer.as_ref().map(|peer| (&*peer.build).into())),
        ("streams", Some(numbers.streams.into())),
        ("buffered_bytes", Some(numbers.buffered_bytes.into())),
        ("round_trip_seconds", status.round_trip.map(|time| micros(time).into())),
        ("health", status.health.map(|health| {
            json!({
                "upstream_healthy": health.upstream_ok,
                "upstream_round_trip_seconds": micros(Micros(health.upstream_round_trip_us.into())),
                "streams": health.streams,
                "memory_bytes": health.memory_bytes,
                "disk_free_bytes": health.disk_free_bytes,
                "text": &*health.text,
            })
        })),
    ] {
        about[name] = value.unwrap_or(Value::Null);
    }
    about
}

/// Routes of clusters: method, and path in OpenAPI's form.
pub const ROUTES: &[(&str, &str)] =
    &[("get", "/api/v1/clusters"), ("get", "/api/v1/clusters/{cluster_id}")];

/// Clusters of a page.
const PAGE: usize = 500;
