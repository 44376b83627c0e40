//! Readings of the room from the store.

use std::{
    future::poll_fn,
    sync::{Arc, Weak},
    time::Duration,
};

use tracing::debug;
use wsproxy_conn::clock::{self, Micros};
use wsproxy_proto::rooms::{
    mirror::{Due, Outcome as ReadOutcome, Read, Reading, Ticket},
    wire::{self, Connection, Form},
};

use crate::{
    bus::publish::{BusError, Keep, Outcome, Publish, Receipt},
    endpoint::rooms::{
        Rooms,
        room::{Room, State},
    },
    http::rejection::Rejection,
    hub::Hub,
};

impl Room {
    /// Reads the room for the first time.
    ///
    /// # Errors
    /// 503: the store does not answer.
    pub(super) async fn read_first(&self, rooms: &Rooms) -> Result<(), Rejection> {
        for _ in 0..FIRST_TRIES {
            let ticket = self.state.lock().mirror.begin_reading(clock::now().0);
            let reading = rooms.keeper.read(&self.id).await;
            let now = clock::now();
            let mut state = self.state.lock();
            match reading {
                Ok(reading) => {
                    let mut changes = Vec::new();
                    let outcome = state.mirror.apply_reading(ticket, &reading, now.0, &mut changes);
                    self.release(state, now);
                    if matches!(outcome, ReadOutcome::Applied { .. }) {
                        return Ok(());
                    }
                }
                Err(error) => {
                    state.mirror.abandon_reading(ticket, now.0);
                    return Err(error.into());
                }
            }
        }
        Err(Rejection::bus_unavailable("The room cannot be read now."))
    }

    /// Starts a task for the next reading, where one is due and no task waits for it.
    pub(super) fn plan_reading(&self, state: &mut State) {
        if state.is_closed || !state.mirror.is_complete() {
            return;
        }
        let Some(due) = state.mirror.due() else { return };
        match state.reads_at {
            // The task waits for a later one.
            Some(reads_at) if due.at < reads_at => {
                state.reads_at = Some(due.at);
                self.reader.notify_one();
            }
            Some(_) => {}
            None => {
                let Some(rooms) = self.rooms.upgrade() else { return };
                state.reads_at = Some(due.at);
                rooms.tasks.spawn(run(self.me.clone(), Arc::downgrade(&rooms)));
            }
        }
    }

    /// Has the room read behind all that the bus has taken: a change of its members could not be published, while news from
    /// before it are still on their way.
    pub(in crate::endpoint::rooms) fn read_behind(&self) {
        if std::mem::replace(&mut self.state.lock().reads_behind, true) {
            return;
        }
        if let Some(rooms) = self.rooms.upgrade() {
            rooms.tasks.spawn(mark(self.me.clone(), Arc::clone(&rooms.hub)));
        }
    }

    /// Publishes a message without effect, whose receipt has the room read.
    fn publish_mark(&self, hub: &Hub) -> Result<(), BusError> {
        let from = Connection { server: self.server, number: 0 };
        hub.publish(Publish {
            channel: Arc::clone(&self.channel),
            payload: wire::message(from, Form::Envelope, b""),
            keep: Keep::Nothing,
            receipt: Some(Arc::new(Mark(self.me.clone()))),
        })
    }

    /// Returns the next reading; `None` where none is due, and the task ends.
    fn next_reading(&self) -> Option<Due> {
        let mut state = self.state.lock();
        let due = if state.is_closed { None } else { state.mirror.due() };
        state.reads_at = due.map(|due| due.at);
        due
    }

    async fn read(&self, rooms: &Rooms, read: Read) {
        let Ok(_permit) = rooms.read_permits.acquire().await else { return };
        match read {
            Read::Room => self.read_room(rooms).await,
            Read::Positions => self.read_positions(rooms).await,
        }
    }

    async fn read_room(&self, rooms: &Rooms) {
        let begin =
            |state: &mut State| (state.mirror.begin_reading(clock::now().0), state.owed.compares());
        let (ticket, compares) = begin(&mut self.state.lock());
        match rooms.keeper.read(&self.id).await {
            Ok(reading) => {
                let orphans = self.apply_reading(rooms, (ticket, compares), &reading);
                if !orphans.is_empty()
                    && let Err(error) = rooms.keeper.sweep(&self.id, &orphans).await
                {
                    debug!(room = self.id.as_str(), %error, "What former members left stays for now.");
                }
            }
            Err(error) => {
                debug!(room = self.id.as_str(), %error, "A room cannot be read now.");
                let now = clock::now();
                let mut state = self.state.lock();
                state.mirror.abandon_reading(ticket, now.after(RETRY_AFTER).0);
                self.release(state, now);
            }
        }
    }

    /// Applies a reading, and tells members here of what it shows. Where it `compares`, what it lacks of members here is
    /// owed. Returns the clients that have left fields behind.
    fn apply_reading(
        &self,
        rooms: &Rooms,
        (ticket, compares): (Ticket, bool),
        reading: &Reading,
    ) -> Vec<Box<str>> {
        let now = clock::now();
        let mut state = self.state.lock();
        let mut changes = Vec::new();
        let outcome = state.mirror.apply_reading(ticket, reading, now.0, &mut changes);
        rooms.counters.readings.add(1);
        if compares && matches!(outcome, ReadOutcome::Applied { .. }) {
            state.owe_lacking(reading, now);
        }
        self.tell_changes(&mut state, changes, now);
        self.release(state, now);
        match outcome {
            ReadOutcome::Applied { orphans } => orphans,
            ReadOutcome::Stale | ReadOutcome::Overflowed => Vec::new(),
        }
    }

    async fn read_positions(&self, rooms: &Rooms) {
        self.state.lock().mirror.begin_positions();
        // Positions are read again for news that were on their way; where that fails they come with the next move.
        let Ok(positions) = rooms.keeper.read_positions(&self.id).await else { return };
        let now = clock::now();
        let mut state = self.state.lock();
        let mut changes = Vec::new();
        state.mirror.apply_positions(&positions, now.0, &mut changes);
        self.tell_changes(&mut state, changes, now);
        self.release(state, now);
    }
}

/// Reads a room whenever a reading is due, until none is.
async fn run(room: Weak<Room>, rooms: Weak<Rooms>) {
    loop {
        let (Some(room), Some(rooms)) = (room.upgrade(), rooms.upgrade()) else { return };
        let Some(due) = room.next_reading() else { return };
        let wait = Duration::from(Micros(due.at).since(clock::now()));
        if wait.is_zero() {
            room.read(&rooms, due.read).await;
            continue;
        }
        tokio::select! {
            () = rooms.end.cancelled() => return,
            // An earlier one is due.
            () = room.reader.notified() => {}
            // A room without members must not stay for a reading.
            () = tokio::time::sleep(wait.min(LOOK_EVERY)) => {}
        }
    }
}

/// Publishes a mark as soon as the bus has room for it.
async fn mark(room: Weak<Room>, hub: Arc<Hub>) {
    loop {
        poll_fn(|cx| hub.poll_publishable(cx)).await;
        let Some(room) = room.upgrade() else { return };
        if room.publish_mark(&hub) != Err(BusError::Full) {
            return;
        }
    }
}

/// Receipt of the mark behind which a room is read.
struct Mark(Weak<Room>);

impl Receipt for Mark {
    fn published(&self, _: Outcome) {
        let Some(room) = self.0.upgrade() else { return };
        let now = clock::now();
        let mut state = room.state.lock();
        state.reads_behind = false;
        state.mirror.want_later_reading(now.0);
        room.release(state, now);
    }
}

/// Tries of the first reading, which a lost link makes void.
const FIRST_TRIES: u32 = 3;

/// Pause after a reading that failed.
const RETRY_AFTER: Micros = Micros(1_000_000);

/// Longest time for which a task keeps a room that was closed.
const LOOK_EVERY: Duration = Duration::from_secs(1);
