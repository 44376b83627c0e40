//! The search for a lane: at once, or in the waiting room, in the order in which requests came. Knows no streams.

use std::sync::Arc;

use crate::{
    core::Core,
    endpoint::tunnel::{
        Tunnel,
        exchange::Ask,
        lanes::{Lane, NoLane, Place},
        refusal::{Code, Refusal},
        waiting::{Look, Turn},
    },
};

/// Finds a lane for a request, and a place on it. `tried` are lanes that come last.
///
/// # Errors
/// `cluster_unknown`, `cluster_offline`, `cluster_reconnecting`, `overloaded`, `restarting`, `no_lane`, `lanes_full`
pub(super) async fn find(
    tunnel: &Arc<Tunnel>,
    core: &Core,
    (ask, turn): (&Ask, &Turn),
    tried: &[Arc<Lane>],
) -> Result<Place, Refusal> {
    let is_known = tunnel.lanes.knows(&ask.cluster);
    if ask.is_of_peer && !is_known {
        return Err(Refusal::new(Code::NoLane));
    }
    let is_seen = is_known || tunnel.expects(&ask.cluster);
    if !is_seen && !tunnel.credentials.may_exist(core, &ask.cluster).await {
        return Err(Refusal::new(Code::ClusterUnknown));
    }
    let may_last = ask.is_long || ask.upgrade.is_some();
    let look = || {
        if core.is_closing() {
            // The instance that brought the request goes to another one.
            return Look::Leave(if ask.is_of_peer { Code::NoLane } else { Code::Restarting });
        }
        match tunnel.lanes.choose(&ask.cluster, may_last, tried) {
            Ok(place) => Look::Found(place),
            // The instance that brought the request looks elsewhere, or waits itself.
            Err(NoLane::Full) if ask.is_of_peer && ask.wait.is_zero() => {
                Look::Leave(Code::LanesFull)
            }
            Err(NoLane::Full) => Look::Wait(Code::Overloaded, None),
            // The instance that brought the request looks for another one.
            Err(_) if ask.is_of_peer => Look::Leave(Code::NoLane),
            Err(NoLane::Reconnecting(until)) => Look::Wait(Code::ClusterReconnecting, until),
            // An agent of another instance may come back, here or there.
            Err(NoLane::Offline) if tunnel.expects(&ask.cluster) => {
                Look::Wait(Code::ClusterReconnecting, None)
            }
            Err(NoLane::Offline) => Look::Leave(Code::ClusterOffline),
        }
    };
    let (queue, until) = ((&ask.cluster, may_last), ask.deadlines.head());
    let crowded =
        if ask.is_of_peer && ask.wait.is_zero() { Code::LanesFull } else { Code::Overloaded };
    let found = tunnel.room.find(queue, turn, until, crowded, look).await;
    found.map_err(Refusal::new)
}
