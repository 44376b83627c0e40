//! Clusters in the worker API, as operators see them: lanes of all instances, and health, streams and the breaker at this
//! one. Needs the scope `admin`.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

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
    registry::tunnel::{LaneRecord, RemoteLane},
    telemetry::time,
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

/// Lists the clusters of all instances by their ids, page by page.
async fn list(
    _worker: Worker,
    State(core): State<Arc<Core>>,
    Extension(tunnel): Extension<Arc<Tunnel>>,
    query: Result<Query<ListQuery>, QueryRejection>,
) -> Result<Json<Value>, Rejection> {
    check_served(&core)?;
    let Query(ListQuery { cursor }) =
        query.map_err(|error| Rejection::bad_request(error.body_text()))?;
    // The cursor is the last id of the page before.
    let after = cursor.unwrap_or_default();
    let elsewhere = match &tunnel.peers {
        Some(peers) => peers.registry.clusters_elsewhere(&after, PAGE + 1).await,
        None => Ok(BTreeMap::new()),
    };
    // Without Redis the lanes here are shown nevertheless.
    let is_complete = elsewhere.is_ok() && core.bus.status().connected;
    let mut clusters = elsewhere.unwrap_or_default();
    for cluster in tunnel.lanes.clusters() {
        if cluster.as_str() > after.as_str() {
            clusters.entry(cluster).or_default();
        }
    }
    let has_more = clusters.len() > PAGE;
    let clusters: Vec<_> = clusters.into_iter().take(PAGE).collect();
    let last = clusters.last().filter(|_| has_more);
    let cursor = last.map(|(last, _)| last.as_str().to_owned());
    let listed = clusters.iter().map(|(cluster, elsewhere)| {
        let found = tunnel.lanes.of(cluster).unwrap_or_default();
        let mut about = described(&tunnel, cluster, &found);
        about["lanes"] = (found.lanes.len() + elsewhere).into();
        about["lanes_here"] = found.lanes.len().into();
        about
    });
    let clusters: Vec<_> = listed.collect();
    Ok(Json(json!({
        "server_id": &*core.server_id,
        "clusters": clusters,
        "complete": is_complete,
        "cursor": cursor,
    })))
}

/// Describes a cluster with its lanes.
async fn find(
    _worker: Worker,
    State(core): State<Arc<Core>>,
    Extension(tunnel): Extension<Arc<Tunnel>>,
    PathId(cluster): PathId,
) -> Result<Json<Value>, Rejection> {
    check_served(&core)?;
    let here = tunnel.lanes.of(&cluster);
    let elsewhere: Result<Arc<[RemoteLane]>, _> = match &tunnel.peers {
        Some(peers) => peers.registry.elsewhere(&cluster).await.map(|lanes| lanes.borrow().clone()),
        None => Ok([].into()),
    };
    let is_complete = elsewhere.is_ok() && core.bus.status().connected;
    let (here, elsewhere) = match (here, elsewhere) {
        (None, Err(error)) => return Err(error.into()),
        (None, Ok(lanes)) if lanes.is_empty() => {
            return Err(Rejection::not_found(format!("No agent of {cluster} is connected.")));
        }
        // Without Redis the lanes here are shown nevertheless.
        (here, elsewhere) => (here.unwrap_or_default(), elsewhere.unwrap_or_else(|_| [].into())),
    };
    let mut about = described(&tunnel, &cluster, &here);
    about["server_id"] = (&*core.server_id).into();
    about["complete"] = is_complete.into();
    let lanes = here.lanes.iter().map(|lane| of_lane(lane, &core.server_id));
    about["lanes"] = lanes.chain(elsewhere.iter().map(of_remote)).collect();
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

/// Describes a cluster as this instance sees it, without its lanes.
fn described(tunnel: &Tunnel, cluster: &Id, found: &ClusterLanes) -> Value {
    let (breaker, next_try) = tunnel.breakers.state(cluster, clock::now());
    let lost = found
        .lost
        .map(|(at, reason)| json!({ "seconds_ago": at.elapsed().as_secs(), "reason": reason }));
    let is_healthy = (!found.lanes.is_empty()).then(|| {
        found.lanes.iter().any(|lane| {
            let health = lane.handle().and_then(|handle| handle.status().health);
            health.is_some_and(|health| health.upstream_ok)
        })
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

/// Describes a lane at another instance, as the registry knows it.
fn of_remote(lane: &RemoteLane) -> Value {
    let LaneRecord { server_id, number, draining, registration, .. } = &lane.record;
    // Redis counts registrations by its clock.
    let since = (*registration > 0).then(|| Duration::from_micros(*registration));
    json!({
        "agent_id": lane.agent.as_str(),
        "server_id": server_id,
        "number": number,
        "connected_seconds": since.map(|since| time::since_epoch().saturating_sub(since).as_secs()),
        "state": if *draining { "draining" } else { "ready" },
    })
}

/// Describes a lane of this instance.
fn of_lane(lane: &Lane, server_id: &str) -> Value {
    let micros = |Micros(micros): Micros| Duration::from_micros(micros).as_secs_f64();
    let mut about = json!({
        "agent_id": lane.name.agent.as_str(),
        "server_id": server_id,
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
