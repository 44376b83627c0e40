//! The waiting room of requests for which there is no lane now. Knows no lanes: the caller looks for one, and says
//! whether it is worth the wait.
//!
//! Users' agents have a room of their own (`core/waiting.rs`): there, requests wait for an announcement on the bus, all are
//! woken at once, and their bytes are counted. Here they wait for a change in this process, in their order.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use hashbrown::HashMap;
use parking_lot::Mutex;
use tokio::{
    sync::Notify,
    time::{Instant, sleep_until},
};
use wsproxy_proto::names::Id;

/// Upper bounds of a room.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Requests of one cluster.
    pub cluster_max: usize,
    /// Requests of all clusters.
    pub max: usize,
}

/// Turn of a request: its place among others, and the time that it may still wait. A request has one for all of its waits,
/// so that one that is sent again neither waits anew nor stands behind those that came later.
#[derive(Debug)]
pub struct Turn {
    ticket: u64,
    left: Duration,
}

impl Turn {
    /// Returns the time that the request may still wait.
    #[must_use]
    pub const fn left(&self) -> Duration {
        self.left
    }

    /// Takes a time off that the request has waited.
    pub const fn waited(&mut self, time: Duration) {
        self.left = self.left.saturating_sub(time);
    }
}

/// The waiting room of an instance.
///
/// Bound: [`Limits`]. Beyond them a request does not wait. The first that came is the first that looks for a lane. Requests
/// that may last have a queue of their own, since their quota may be used up while others find a place.
#[derive(Debug)]
pub struct Room {
    limits: Limits,
    /// Ticket of the last request that came.
    last: AtomicU64,
    /// Guards the queues; held for a few steps.
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    clusters: HashMap<Id, Queues>,
    waiting: usize,
}

/// Requests of a cluster by their tickets: those that may last behind the others.
type Queues = [BTreeMap<u64, Arc<Notify>>; 2];

/// Answer to the search for a lane.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Look<T, R> {
    /// There is one.
    Found(T),
    /// There is none, for a reason that may change, and that holds until a time.
    Wait(R, Option<Instant>),
    /// There is none, and none is expected.
    Leave(R),
}

/// A request in the room. Dropping it frees its place, and lets the next one look.
#[derive(Debug)]
struct Waiting {
    room: Arc<Room>,
    cluster: Id,
    may_last: bool,
    ticket: u64,
    turn: Arc<Notify>,
}

impl Room {
    /// Makes an empty room.
    #[must_use]
    pub fn new(limits: Limits) -> Arc<Self> {
        Arc::new(Self { limits, last: AtomicU64::new(0), state: Mutex::default() })
    }

    /// Returns the turn of a request that comes now, and that may wait for `left`.
    #[must_use]
    pub fn turn(&self, left: Duration) -> Turn {
        Turn { ticket: self.last.fetch_add(1, Relaxed) + 1, left }
    }

    /// Looks for a lane, and waits where that may help: until there is one, `until`, or the time of the turn is over. The
    /// caller takes the time of the wait off the turn.
    ///
    /// # Errors
    /// The last reason of `look`. `crowded`: so many wait that this request cannot, and what is free is theirs.
    pub async fn find<T, R>(
        self: &Arc<Self>,
        (cluster, may_last): (&Id, bool),
        turn: &Turn,
        until: Option<Instant>,
        crowded: R,
        mut look: impl FnMut() -> Look<T, R>,
    ) -> Result<T, R> {
        // A request does not overtake those that came before it.
        let mut reason = None;
        if self.is_next(cluster, may_last, turn) {
            match look() {
                Look::Found(found) => return Ok(found),
                Look::Leave(reason) => return Err(reason),
                Look::Wait(why, holds_until) => reason = Some((why, holds_until)),
            }
        }
        let entered = (!turn.left.is_zero()).then(|| self.enter(cluster, may_last, turn));
        let Some(waiting) = entered.flatten() else {
            return Err(match reason.map_or_else(&mut look, |(why, at)| Look::Wait(why, at)) {
                Look::Found(_) => crowded,
                Look::Leave(why) | Look::Wait(why, _) => why,
            });
        };
        let longest = Instant::now() + turn.left;
        let end = until.map_or(longest, |until| until.min(longest));
        let mut has_entered = false;
        loop {
            // A time that is over says nothing new.
            let holds_until = reason.as_ref().and_then(|(_, at)| *at);
            let holds_until = holds_until.filter(|at| *at > Instant::now());
            let wake = holds_until.map_or(end, |at| at.min(end));
            // A lane that came before the entry has woken none, so the first one looks again.
            if std::mem::replace(&mut has_entered, true) || !waiting.is_first() {
                tokio::select! {
                    () = waiting.turn.notified() => {}
                    () = sleep_until(wake) => {}
                }
            }
            match look() {
                Look::Found(found) => return Ok(found),
                Look::Leave(why) => return Err(why),
                Look::Wait(why, _) if Instant::now() >= end => return Err(why),
                Look::Wait(why, at) => reason = Some((why, at)),
            }
        }
    }

    /// Tells that a lane or a place may be free: the first request of each queue looks.
    pub fn changed(&self, cluster: &Id) {
        if let Some(queues) = self.state.lock().clusters.get(cluster) {
            queues.iter().for_each(wake_first);
        }
    }

    /// Returns the requests of a cluster that wait.
    #[must_use]
    pub fn waiting(&self, cluster: &Id) -> usize {
        let state = self.state.lock();
        state.clusters.get(cluster).map_or(0, |queues| queues.iter().map(BTreeMap::len).sum())
    }

    /// Returns the clusters with requests that wait, and their number.
    #[must_use]
    pub fn depths(&self) -> Vec<(Id, usize)> {
        let state = self.state.lock();
        let depth = |queues: &Queues| queues.iter().map(BTreeMap::len).sum();
        state.clusters.iter().map(|(cluster, queues)| (cluster.clone(), depth(queues))).collect()
    }

    /// Returns whether no request waits that came before this one.
    fn is_next(&self, cluster: &Id, may_last: bool, turn: &Turn) -> bool {
        let state = self.state.lock();
        let queue = state.clusters.get(cluster).map(|queues| &queues[usize::from(may_last)]);
        let first = queue.and_then(BTreeMap::first_key_value);
        first.is_none_or(|(ticket, _)| *ticket > turn.ticket)
    }

    fn enter(self: &Arc<Self>, cluster: &Id, may_last: bool, turn: &Turn) -> Option<Waiting> {
        let mut state = self.state.lock();
        let State { clusters, waiting } = &mut *state;
        let known =
            clusters.get(cluster).map_or(0, |queues| queues.iter().map(BTreeMap::len).sum());
        if *waiting >= self.limits.max || known >= self.limits.cluster_max {
            return None;
        }
        *waiting += 1;
        let (ticket, turn) = (turn.ticket, Arc::new(Notify::new()));
        let queues = clusters.entry_ref(cluster).or_default();
        queues[usize::from(may_last)].insert(ticket, Arc::clone(&turn));
        drop(state);
        let (room, cluster) = (Arc::clone(self), cluster.clone());
        Some(Waiting { room, cluster, may_last, ticket, turn })
    }
}

impl Waiting {
    fn is_first(&self) -> bool {
        let state = self.room.state.lock();
        let queue = state.clusters.get(&self.cluster).map(|all| &all[usize::from(self.may_last)]);
        let first = queue.and_then(BTreeMap::first_key_value);
        first.is_some_and(|(ticket, _)| *ticket == self.ticket)
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        let mut state = self.room.state.lock();
        state.waiting -= 1;
        let Some(queues) = state.clusters.get_mut(&self.cluster) else { return };
        let queue = &mut queues[usize::from(self.may_last)];
        queue.remove(&self.ticket);
        // It may have left with a place while there are more, or with a turn that it did not use.
        wake_first(queue);
        if queues.iter().all(BTreeMap::is_empty) {
            state.clusters.remove(&self.cluster);
        }
    }
}

fn wake_first(queue: &BTreeMap<u64, Arc<Notify>>) {
    if let Some((_, first)) = queue.first_key_value() {
        first.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;

    use futures_util::{FutureExt as _, future::join_all};
    use tokio::{task::yield_now, time::advance};

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn room(cluster_max: usize, max: usize) -> Arc<Room> {
        Room::new(Limits { cluster_max, max })
    }

    /// Looks with a turn of its own.
    async fn find<T>(
        room: &Arc<Room>,
        queue: (&Id, bool),
        until: Option<Instant>,
        look: impl FnMut() -> Look<T, &'static str>,
    ) -> Result<T, &'static str> {
        room.find(queue, &room.turn(10 * SECOND), until, "crowded", look).await
    }

    fn id(text: &str) -> Id {
        Id::parse(text).unwrap()
    }

    /// Places that requests take.
    #[derive(Default)]
    struct Places(AtomicUsize);

    impl Places {
        fn take(&self) -> Look<(), &'static str> {
            let free = |free: usize| free.checked_sub(1);
            match self.0.fetch_update(Relaxed, Relaxed, free) {
                Ok(_) => Look::Found(()),
                Err(_) => Look::Wait("full", None),
            }
        }

        fn free(&self, places: usize, room: &Room, cluster: &Id) {
            self.0.fetch_add(places, Relaxed);
            room.changed(cluster);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn the_first_that_came_is_the_first_that_goes() {
        let (room, places, cluster) = (room(256, 1024), Places::default(), id("c1"));
        let order = Mutex::new(Vec::new());
        let request = |number| {
            let (room, places, cluster, order) = (&room, &places, &cluster, &order);
            async move {
                let found = find(room, (cluster, false), None, || places.take()).await;
                order.lock().push((number, found.is_ok()));
            }
        };
        let others = async {
            yield_now().await;
            assert_eq!(room.waiting(&cluster), 6);
            places.free(1, &room, &cluster);
            yield_now().await;
            // A request that comes now waits behind the others.
            places.0.fetch_add(1, Relaxed);
            let late = request(6);
            let free = async {
                places.free(2, &room, &cluster);
                yield_now().await;
                places.free(3, &room, &cluster);
            };
            tokio::join!(late, free);
        };
        tokio::join!(join_all((0..6).map(request)), others);
        assert_eq!(*order.lock(), [0, 1, 2, 3, 4, 5, 6].map(|number| (number, true)));
        assert!(room.depths().is_empty());
        assert_eq!(room.state.lock().waiting, 0);
    }

    #[tokio::test(start_paused = true)]
    async fn a_request_beyond_the_bounds_does_not_wait() {
        let (room, places) = (room(2, 3), Places::default());
        let find = |cluster: &'static str| {
            let (room, places) = (Arc::clone(&room), &places);
            async move { find(&room, (&id(cluster), false), None, || places.take()).await }
        };
        let mut waiting = [find("a"), find("a"), find("b")].map(Box::pin);
        assert!(waiting.iter_mut().all(|one| one.now_or_never().is_none()));
        assert_eq!(find("a").now_or_never(), Some(Err("full")));
        assert_eq!(find("b").now_or_never(), Some(Err("full")));
        assert_eq!(find("c").now_or_never(), Some(Err("full")));
        places.0.store(1, Relaxed);
        assert_eq!(find("a").now_or_never(), Some(Err("crowded")));
        places.0.store(0, Relaxed);
        let mut depths = room.depths();
        depths.sort_by_key(|(cluster, _)| cluster.to_string());
        assert_eq!(depths, [(id("a"), 2), (id("b"), 1)]);
        drop(waiting);
        assert!(room.depths().is_empty());
        assert_eq!(room.state.lock().waiting, 0);
        // A place that is free is taken even so.
        places.0.store(1, Relaxed);
        assert_eq!(
            self::find(
                &Room::new(Limits { max: 0, ..room.limits }),
                (&id("a"), false),
                None,
                || { places.take() }
            )
            .now_or_never(),
            Some(Ok(()))
        );
    }

    #[tokio::test(start_paused = true)]
    async fn a_request_leaves_with_the_reason_that_holds_then() {
        let (room, cluster, start) = (room(9, 9), id("c1"), Instant::now());
        let grace = start + 4 * SECOND;
        let look = || match Instant::now() < grace {
            true => Look::<(), _>::Wait("reconnecting", Some(grace)),
            false => Look::Leave("offline"),
        };
        assert_eq!(find(&room, (&cluster, false), None, look).await, Err("offline"));
        assert_eq!(start.elapsed(), 4 * SECOND);
        let start = Instant::now();
        let full = || Look::<(), _>::Wait("full", None);
        assert_eq!(find(&room, (&cluster, false), None, full).await, Err("full"));
        assert_eq!(start.elapsed(), 10 * SECOND);
        let until = Some(Instant::now() + 2 * SECOND);
        assert_eq!(find(&room, (&cluster, true), until, full).await, Err("full"));
        assert_eq!(start.elapsed(), 12 * SECOND);
        let gone = || Look::<(), _>::Leave("offline");
        assert_eq!(find(&room, (&cluster, false), None, gone).now_or_never(), Some(Err("offline")));
    }

    #[tokio::test(start_paused = true)]
    async fn requests_that_may_last_do_not_hold_up_others() {
        let (room, places, cluster) = (room(9, 9), Places::default(), id("c1"));
        let mut watch =
            Box::pin(find(&room, (&cluster, true), None, || Look::<(), _>::Wait("full", None)));
        assert!((&mut watch).now_or_never().is_none());
        let mut short = Box::pin(find(&room, (&cluster, false), None, || places.take()));
        assert!((&mut short).now_or_never().is_none());
        places.free(1, &room, &cluster);
        assert_eq!(short.now_or_never(), Some(Ok(())));
        assert!((&mut watch).now_or_never().is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn a_turn_of_a_request_that_left_goes_to_the_next() {
        let (room, places, cluster) = (room(9, 9), Places::default(), id("c1"));
        let find = || Box::pin(find(&room, (&cluster, false), None, || places.take()));
        let (mut first, mut second) = (find(), find());
        assert!((&mut first).now_or_never().is_none() && (&mut second).now_or_never().is_none());
        places.free(1, &room, &cluster);
        // The client of the first one leaves before the request is polled.
        drop(first);
        assert_eq!(second.now_or_never(), Some(Ok(())));
    }

    #[tokio::test(start_paused = true)]
    async fn a_place_that_came_before_the_entry_is_found() {
        let (room, places, cluster) = (room(9, 9), Places::default(), id("c1"));
        let mut first = Box::pin(find(&room, (&cluster, false), None, || places.take()));
        assert!((&mut first).now_or_never().is_none());
        places.free(1, &room, &cluster);
        // The second came while the first one waited, whose turn it is.
        let mut second = Box::pin(find(&room, (&cluster, false), None, || places.take()));
        assert!((&mut second).now_or_never().is_none());
        places.0.fetch_add(1, Relaxed);
        assert_eq!(first.now_or_never(), Some(Ok(())));
        assert_eq!(second.now_or_never(), Some(Ok(())));
        advance(SECOND).await;
        assert_eq!(room.waiting(&cluster), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn a_request_that_is_sent_again_keeps_its_place_and_its_time() {
        let (room, places, cluster) = (room(9, 9), Places::default(), id("c1"));
        let mut turn = room.turn(10 * SECOND);
        let mut later = Box::pin(find(&room, (&cluster, false), None, || places.take()));
        assert!((&mut later).now_or_never().is_none());
        // It found a lane before, which was lost after some time.
        turn.waited(7 * SECOND);
        let start = Instant::now();
        let mut again =
            Box::pin(room.find((&cluster, false), &turn, None, "crowded", || places.take()));
        assert!((&mut again).now_or_never().is_none());
        places.free(1, &room, &cluster);
        assert_eq!((&mut again).now_or_never(), Some(Ok(())));
        assert!((&mut later).now_or_never().is_none());
        drop(again);
        let end = room.find((&cluster, false), &turn, None, "crowded", || places.take()).await;
        assert_eq!((end, start.elapsed()), (Err("full"), 3 * SECOND));
        turn.waited(3 * SECOND);
        let end = room.find((&cluster, false), &turn, None, "crowded", || places.take());
        assert_eq!(end.now_or_never(), Some(Err("full")));
    }
}
