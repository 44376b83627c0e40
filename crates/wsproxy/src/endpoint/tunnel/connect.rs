//! The handshake of a lane, and the life of the lane behind it. Knows no requests.

use std::{fmt::Display, sync::Arc, time::Duration};

use http::{HeaderMap, Request, Response};
use hyper::body::Incoming;
use tracing::{debug, info, warn};
use wsproxy_conn::{
    clock::Micros,
    lane::{self, LaneEnd, LaneHandle},
};
use wsproxy_proto::{
    names::Id,
    tunnel::{SUBPROTOCOL, code::Code},
};

use crate::{
    core::Core,
    endpoint::tunnel::{
        Tunnel,
        lanes::{Admission, LaneName, SUPERSEDED_DRAIN, Superseded},
        stalls,
    },
    http::{
        Body,
        handshake::{
            self,
            bare::{BareOpening, BareSocket},
            credentials,
        },
        path,
        rejection::Rejection,
    },
    registry::tunnel::{LANE_NUMBER_MAX, LaneEntry, OpeningLane, RegisterError, Successor},
    telemetry::family::Family,
};

/// Opens a lane.
///
/// # Errors
/// 400, 401, 403, 404, 405, 409, 426, 429, 503, 504.
pub async fn open(
    tunnel: &Arc<Tunnel>,
    core: &Arc<Core>,
    mut request: Request<Incoming>,
    cluster: &str,
) -> Result<Response<Body>, Rejection> {
    let opening = BareOpening::begin(core, &mut request, SUBPROTOCOL)?;
    let token = credentials::from_authorization(request.headers())?;
    let token = token.ok_or_else(|| Rejection::missing_credentials("A bearer token is needed."))?;
    let cluster = path::parse_id("cluster_id", cluster)?;
    let name = lane_name(request.headers(), &cluster)?;
    // Free the headers: the store may take its time.
    drop(request);
    handshake::deadline(core, tunnel.credentials.check_agent(core, &cluster, &token)).await?;
    let admitted = opening.admit(core)?;
    let admission = tunnel.lanes.admit(name).map_err(|Superseded| {
        Rejection::conflict("The agent's process has opened a newer connection already.")
    })?;
    let entry = register(tunnel, &admission.lane.name).await?;
    let address = admitted.caller().address;
    let (response, socket) = admitted.accept();
    let (tunnel, owner) = (Arc::clone(tunnel), Arc::clone(core));
    core.tasks
        .spawn(async move { run(&tunnel, &owner, socket, (admission, entry), address).await });
    Ok(response)
}

/// Runs a lane from its answer `101` to its end.
async fn run(
    tunnel: &Tunnel,
    core: &Arc<Core>,
    socket: BareSocket,
    (admission, entry): (Admission, Option<LaneEntry>),
    address: Option<impl Display>,
) {
    let Some((socket, leftover, _held)) = socket.take().await else { return };
    let unread = match socket.unread_bytes() {
        Ok(unread) => unread,
        Err(error) => return debug!(%error, "There is no descriptor for a lane."),
    };
    let (settings, memory) = (tunnel.lane.clone(), Arc::clone(&tunnel.memory));
    let (driver, handle) = match lane::gateway(socket, &leftover, settings, memory) {
        Ok(lane) => lane,
        Err(error) => return debug!(%error, "An agent left during the handshake."),
    };
    let _active = core.metrics.opened(Family::Tunnel);
    core.tasks.spawn(driver);
    let LaneName { cluster, agent, number, .. } = admission.lane.name.clone();
    let address = address.map(|address| address.to_string());
    let (end, duration) = match handle.ready().await {
        Err(end) => (end, None),
        Ok(peer) => {
            tunnel.counters.name(&cluster);
            admission.ready(handle.clone());
            info!(%cluster, %agent, number, address, build = &*peer.build, "A cluster agent is connected.");
            if core.is_closing() {
                // The drain may have listed the lanes before this one was added.
                handle.drain(Code::Restarting, Micros(0));
            }
            let ended = async {
                tokio::select! {
                    end = watch(tunnel, &cluster, &handle, entry.as_ref()) => end,
                    () = give_way(&handle, entry.as_ref()) => {
                        watch(tunnel, &cluster, &handle, entry.as_ref()).await
                    }
                }
            };
            let end = tokio::select! {
                end = ended => end,
                never = stalls::watch(&tunnel.counters, &admission.lane.name, &handle, &unread) => match never {},
            };
            (end, Some(admission.lane.since.elapsed()))
        }
    };
    tunnel.counters.lane_ended(end.label(), duration);
    core.metrics.ended(Family::Tunnel, end.label());
    match end {
        LaneEnd::Broken(_) | LaneEnd::Text | LaneEnd::WebSocket | LaneEnd::HelloTimeout => {
            warn!(%cluster, %agent, number, address, reason = end.label(), error = %end, "A lane ended, since its agent broke a rule.");
        }
        _ => info!(%cluster, %agent, number, reason = end.label(), "A lane ended."),
    }
    admission.end(end.label());
}

/// Tells requests that wait of each change of a lane. Returns its end.
async fn watch(
    tunnel: &Tunnel,
    cluster: &Id,
    handle: &LaneHandle,
    entry: Option<&LaneEntry>,
) -> LaneEnd {
    let mut status = handle.status();
    let mut pings = tokio::time::interval(tunnel.config.ping);
    loop {
        if let Some(end) = status.end {
            return end;
        }
        if let Some(entry) = entry.filter(|_| status.is_draining || status.go_away.is_some()) {
            entry.drain();
        }
        status = tokio::select! {
            status = handle.changed(status.version) => status,
            _ = pings.tick() => {
                status = handle.status();
                if let Some(time) = status.round_trip {
                    tunnel.counters.round_trip(time.into());
                }
                continue;
            }
        };
        if let Some(health) = &status.health {
            tunnel.breakers.health(cluster, health.upstream_ok);
        }
        tunnel.lanes.changed(cluster);
    }
}

/// Enters a lane into the registry of all instances; `None`: there is none.
///
/// # Errors
/// 409: the agent's process has a newer lane at any instance. 503: the cluster has too many agents, or Redis refuses.
async fn register(tunnel: &Tunnel, name: &LaneName) -> Result<Option<LaneEntry>, Rejection> {
    let Some(peers) = &tunnel.peers else { return Ok(None) };
    let boot = format!("{:032x}", u128::from_be_bytes(name.boot));
    let opening = OpeningLane {
        cluster: name.cluster.clone(),
        agent: name.agent.clone(),
        boot_id: Id::parse(&boot).map_err(|_| Rejection::bad_request("The id is malformed."))?,
        number: name.number.min(LANE_NUMBER_MAX),
        capabilities: 0,
    };
    // The credential is checked, so that the lane can serve while the store is away.
    match peers.registry.register(opening, true).await {
        Ok(entry) => Ok(Some(entry)),
        Err(RegisterError::Superseded) => {
            Err(Rejection::conflict("The agent's process has opened a newer connection already."))
        }
        Err(error @ RegisterError::Full) => Err(Rejection::full(error.to_string())),
        Err(RegisterError::Unavailable(error)) => Err(error.into()),
    }
}

/// Drains a lane once a newer one of its agent id has the entry.
async fn give_way(handle: &LaneHandle, entry: Option<&LaneEntry>) {
    let Some(entry) = entry else { return std::future::pending().await };
    if entry.superseded().await == Successor::SameProcess {
        // The newer lane is not ready yet, and requests need one of both.
        tokio::time::sleep(READY_WITHIN).await;
    }
    if !handle.status().is_draining {
        handle.drain(Code::Superseded, SUPERSEDED_DRAIN);
    }
}

/// Reads the agent's name.
///
/// # Errors
/// 400: the header is missing or malformed.
fn lane_name(headers: &HeaderMap, cluster: &Id) -> Result<LaneName, Rejection> {
    let mut values = headers.get_all(AGENT).iter();
    let value = values.next().filter(|_| values.next().is_none());
    let name = value.and_then(|value| parse_name(value.to_str().ok()?, cluster));
    name.ok_or_else(|| {
        let message = "X-Wsproxy-Agent must be the id of the agent, 32 hexadecimal digits of its process, and the number \
                       of the connection.";
        Rejection::bad_request(message)
    })
}

fn parse_name(text: &str, cluster: &Id) -> Option<LaneName> {
    let mut words = text.split(' ');
    let (agent, boot, number) = (words.next()?, words.next()?, words.next()?);
    let is_number = number.bytes().all(|byte| byte.is_ascii_digit());
    let number = number.parse().ok().filter(|number| is_number && *number > 0)?;
    let is_boot = boot.len() == 32 && boot.bytes().all(|byte| byte.is_ascii_hexdigit());
    let boot = u128::from_str_radix(boot, 16).ok().filter(|_| is_boot)?.to_be_bytes();
    let agent = Id::parse(agent).ok().filter(|_| words.next().is_none())?;
    Some(LaneName { cluster: cluster.clone(), agent, boot, number })
}

/// Time for a newer lane to be ready.
const READY_WITHIN: Duration = Duration::from_secs(1);

/// Header with the name of an agent and of its process.
const AGENT: &str = "x-wsproxy-agent";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_agents_are_read() {
        let cluster = Id::parse("c1").unwrap();
        let boot = "000102030405060708090a0b0c0d0e0f";
        let name = parse_name(&format!("node-1 {boot} 7"), &cluster).unwrap();
        assert_eq!((name.agent.as_str(), name.boot[15], name.number), ("node-1", 15, 7));
        for bad in [
            String::new(),
            format!("node-1 {boot}"),
            format!("node-1 {boot} 0"),
            format!("node-1 {boot} +1"),
            format!("node-1 {boot} 1 2"),
            format!("node-1  {boot} 1"),
            format!("a/b {boot} 1"),
            format!("node-1 {}g 1", &boot[1..]),
            format!("node-1 +{} 1", &boot[1..]),
        ] {
            assert_eq!(parse_name(&bad, &cluster), None, "{bad}");
        }
    }
}
