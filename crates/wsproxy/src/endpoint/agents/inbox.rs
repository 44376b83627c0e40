//! The queue between other tasks and the task of an agent's connection. Knows neither the owner of the place nor the
//! calls in flight.

use std::{
    collections::VecDeque,
    fmt,
    future::poll_fn,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, Ordering::Relaxed},
    },
    task::{Poll, Waker},
};

use bytes::Bytes;
use parking_lot::{Mutex, MutexGuard};
use uuid::Uuid;
use wsproxy_proto::{
    agents::{
        command::{self, Command},
        outcome::Failure,
    },
    disconnect::Disconnect,
    names::Id,
};

use crate::{
    client::{Client, event::Event},
    database::secrets::SecretId,
    endpoint::agents::{
        Agents, aside,
        caller::{CallerId, LocalCall},
        leaving::Leaving,
        owner::Claimed,
        turn::Kept,
    },
    hub::inbox::Inbox,
    store::command::StoreError,
};

/// Queue of one connection of a user's agent, from its handshake to the end of its subscription.
///
/// Invariant: at most [`ENTRIES_MAX`] entries and [`BYTES_MAX`] bytes wait. Beyond that, a call is answered with `busy`,
/// and other messages are dropped and counted. Markers, cancels and orders of the gateway itself have as much room
/// again, and end the connection where that is full too.
pub struct AgentInbox {
    /// The family, whose connections the agent's is one of.
    pub(super) agents: Arc<Agents>,
    /// The user.
    pub user: Id,
    /// Id of the connection.
    pub connection: Uuid,
    /// The secret that opened the connection; `None` until it is judged.
    secret: Mutex<Option<SecretId>>,
    /// Number of calls in flight; only the connection's task changes it.
    in_flight: AtomicU32,
    /// Another task wished that the connection ends.
    is_told_to_end: AtomicBool,
    /// A wish to keep the place is not answered yet.
    is_refreshing: AtomicBool,
    /// Guards the queue and its reader.
    state: Mutex<State>,
}

/// Entry of an inbox.
#[derive(Debug)]
pub enum Inbound {
    /// A message of the commands channel.
    Message(Bytes),
    /// The bus is lost.
    Lost,
    /// The bus delivers again.
    Recovered,
    /// Answer to a claim or a refresh.
    Claimed(Result<Claimed, StoreError>),
    /// A call by HTTP at this instance.
    Call(Box<LocalCall>),
    /// A caller at this instance hung up.
    HungUp(Id, CallerId),
    /// A call is cancelled for all its callers.
    Cancel(Id),
    /// The connection is to end.
    Close(Box<Ending>),
}

/// Wish of another task that a connection ends.
#[derive(Debug)]
pub struct Ending {
    /// Entry of the table of endings.
    pub why: &'static Disconnect,
    /// Reason in place of that of the table.
    pub reason: Option<Box<str>>,
    /// The secret whose connections end; `None`: connections of any secret.
    pub secret: Option<Uuid>,
}

struct State {
    queue: VecDeque<Inbound>,
    bytes: usize,
    reader: Reader,
}

/// Reader of an inbox.
enum Reader {
    /// The handshake.
    Opening(Option<Waker>),
    /// The connection.
    Open(Client),
    /// The connection has ended. Commands are answered here until a marker says that they are for another connection.
    Leaving(Box<Leaving>),
    /// None: nothing is answered.
    Ended,
}

impl AgentInbox {
    /// Makes the inbox of a handshake.
    #[must_use]
    pub fn new(agents: Arc<Agents>, user: Id, connection: Uuid) -> Arc<Self> {
        let state = State { queue: VecDeque::new(), bytes: 0, reader: Reader::Opening(None) };
        Arc::new(Self {
            agents,
            user,
            connection,
            secret: Mutex::default(),
            in_flight: AtomicU32::new(0),
            is_told_to_end: AtomicBool::new(false),
            is_refreshing: AtomicBool::new(false),
            state: Mutex::new(state),
        })
    }

    /// Hands a call to the agent's connection. A call that does not reach it is dropped without an end; where too much
    /// waits it is ended as busy.
    pub fn call(&self, call: LocalCall) {
        let bytes = call.params.len();
        let refused = self.state.lock().push(Inbound::Call(Box::new(call)), bytes, 1);
        if let Err(Inbound::Call(call)) = refused
            && self.is_holding()
        {
            self.agents.refuse_local(&self.user, *call, Failure::AgentBusy);
        }
    }

    /// Notes that one caller of a call no longer waits for it.
    pub fn hang_up(&self, request: &Id, caller: CallerId) {
        self.put(Inbound::HungUp(request.clone(), caller));
    }

    /// Cancels a call for all its callers.
    pub fn cancel(&self, request: &Id) {
        self.put(Inbound::Cancel(request.clone()));
    }

    /// Ends the connection, or its handshake. Returns whether this is the first such wish.
    pub fn close(&self, ending: Ending) -> bool {
        self.put(Inbound::Close(Box::new(ending))) && !self.is_told_to_end.swap(true, Relaxed)
    }

    /// Returns whether the handshake is complete and the connection has not ended.
    #[must_use]
    pub fn is_holding(&self) -> bool {
        matches!(self.state.lock().reader, Reader::Open(_))
    }

    /// Returns the client of an open connection.
    #[must_use]
    pub fn client(&self) -> Option<Client> {
        match &self.state.lock().reader {
            Reader::Open(client) => Some(client.clone()),
            Reader::Opening(_) | Reader::Leaving(_) | Reader::Ended => None,
        }
    }

    /// Returns the number of calls in flight.
    #[must_use]
    pub fn in_flight(&self) -> u32 {
        self.in_flight.load(Relaxed)
    }

    /// Returns whether a wish to end connections is for this one. While the secret is not judged, it may be.
    #[must_use]
    pub fn is_meant(&self, secret: Option<Uuid>) -> bool {
        let Some(secret) = secret else { return true };
        self.secret.lock().is_none_or(|own| own == SecretId::Stored(secret))
    }

    /// Returns the secret that opened the connection; `None` until it is judged.
    #[must_use]
    pub(super) fn secret(&self) -> Option<SecretId> {
        *self.secret.lock()
    }

    /// Sets the secret that opened the connection.
    pub(super) fn set_secret(&self, secret: SecretId) {
        *self.secret.lock() = Some(secret);
    }

    pub(super) fn set_in_flight(&self, count: usize) {
        self.in_flight.store(u32::try_from(count).unwrap_or(u32::MAX), Relaxed);
    }

    /// Brings the answer to a claim. Returns whether the connection takes it.
    pub(super) fn claimed(&self, claimed: Result<Claimed, StoreError>) -> bool {
        self.put(Inbound::Claimed(claimed))
    }

    /// Notes that a wish to keep the place begins. Returns `false` while an earlier one is not answered.
    pub(super) fn begin_refresh(&self) -> bool {
        !self.is_refreshing.swap(true, Relaxed)
    }

    /// Notes that the wish is answered.
    pub(super) fn end_refresh(&self) {
        self.is_refreshing.store(false, Relaxed);
    }

    /// Runs `work` if the connection is open, before it can leave its place. Returns whether it is. The work takes no
    /// lock of the hub, of a link or of an inbox.
    pub(super) fn if_open(&self, work: impl FnOnce()) -> bool {
        let state = self.state.lock();
        let is_open = matches!(state.reader, Reader::Open(_));
        if is_open {
            work();
        }
        is_open
    }

    /// Takes all entries.
    pub(super) fn take(&self) -> VecDeque<Inbound> {
        let mut state = self.state.lock();
        state.bytes = 0;
        std::mem::take(&mut state.queue)
    }

    /// Waits for entries and takes them, while the handshake runs.
    pub(super) async fn next(&self) -> VecDeque<Inbound> {
        poll_fn(|cx| {
            let mut state = self.state.lock();
            if state.queue.is_empty() {
                state.reader = Reader::Opening(Some(cx.waker().clone()));
                return Poll::Pending;
            }
            state.bytes = 0;
            Poll::Ready(std::mem::take(&mut state.queue))
        })
        .await
    }

    /// Hands the inbox from the handshake to the connection, which takes what waits when it opens.
    pub(super) fn open(&self, client: Client) {
        self.state.lock().reader = Reader::Open(client);
    }

    /// Hands the inbox to the rest of a place whose connection has ended. What waits is answered or dropped.
    pub(super) fn leave(&self, mut leaving: Box<Leaving>) {
        let mut state = self.state.lock();
        let entries = std::mem::take(&mut state.queue);
        for entry in entries {
            if let Inbound::Message(payload) = entry {
                leaving.message(payload);
            }
        }
        state.bytes = 0;
        // The former reader holds the client, whose socket must not be closed under the lock.
        let before = std::mem::replace(&mut state.reader, Reader::Leaving(leaving));
        drop(state);
        drop(before);
    }

    /// Notes the answer to the release of the place.
    pub(super) fn released(&self, was_holder: bool) {
        if let Reader::Leaving(leaving) = &mut self.state.lock().reader {
            leaving.released(was_holder);
        }
    }

    /// Ends the inbox: nothing is answered any more. Returns the calls that perhaps no other connection has.
    pub(super) fn end(&self) -> Kept {
        let mut state = self.state.lock();
        let mut reader = std::mem::replace(&mut state.reader, Reader::Ended);
        let queue = std::mem::take(&mut state.queue);
        drop(state);
        drop(queue);
        match &mut reader {
            Reader::Leaving(leaving) => leaving.take_unowned(),
            _ => Kept::default(),
        }
    }

    /// Adds an entry of the gateway itself. Where there is no room the connection ends, since none may be missed.
    /// Returns whether there is a reader, and room.
    fn put(&self, entry: Inbound) -> bool {
        let mut state = self.state.lock();
        let is_taken = state.push(entry, 0, 2).is_ok();
        if !is_taken {
            Self::disconnect_slow(state);
        }
        is_taken
    }

    /// Handles a message for which the queue has no room.
    fn overflow(&self, mut state: MutexGuard<'_, State>, payload: Bytes) {
        let bytes = payload.len();
        let is_order = !aside::is_large(bytes)
            && matches!(command::parse(&payload), Ok(Command::Owner(_) | Command::Cancel { .. }));
        if is_order {
            if state.push(Inbound::Message(payload), bytes, 2).is_err() {
                Self::disconnect_slow(state);
            }
        } else if matches!(state.reader, Reader::Open(_)) {
            drop(state);
            self.agents.refuse_command(&self.user, payload, Failure::AgentBusy);
        } else {
            self.agents.counters.dropped.add(1);
        }
    }

    fn disconnect_slow(state: MutexGuard<'_, State>) {
        if let Reader::Open(client) = &state.reader {
            let client = client.clone();
            drop(state);
            client.disconnect(&Disconnect::SLOW, wsproxy_conn::clock::now());
        }
    }
}

impl Inbox for AgentInbox {
    fn message(&self, payload: &[u8]) {
        let (bytes, payload) = (payload.len(), Bytes::copy_from_slice(payload));
        let mut state = self.state.lock();
        if let Reader::Leaving(leaving) = &mut state.reader {
            return leaving.message(payload);
        }
        if let Err(Inbound::Message(payload)) = state.push(Inbound::Message(payload), bytes, 1) {
            self.overflow(state, payload);
        }
    }

    fn lost(&self) {
        self.put(Inbound::Lost);
    }

    fn recovered(&self) {
        self.put(Inbound::Recovered);
    }
}

impl State {
    /// Adds an entry, if there is a reader and room in `share` times the bounds of commands.
    fn push(&mut self, entry: Inbound, bytes: usize, share: usize) -> Result<(), Inbound> {
        let has_room =
            self.queue.len() < share * ENTRIES_MAX && self.bytes + bytes <= share * BYTES_MAX;
        if !has_room || matches!(self.reader, Reader::Ended | Reader::Leaving(_)) {
            return Err(entry);
        }
        let was_empty = self.queue.is_empty();
        self.queue.push_back(entry);
        self.bytes += bytes;
        if was_empty {
            self.wake();
        }
        Ok(())
    }

    fn wake(&mut self) {
        match &mut self.reader {
            Reader::Opening(waker) => waker.take().into_iter().for_each(Waker::wake),
            Reader::Open(client) => client.notify(Event::Inbox),
            Reader::Leaving(_) | Reader::Ended => {}
        }
    }
}

impl fmt::Debug for AgentInbox {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { user, connection, .. } = self;
        f.debug_struct("AgentInbox").field("user", user).field("connection", connection).finish()
    }
}

/// Upper bound of the commands that wait. Entries of other kinds may fill as many more.
const ENTRIES_MAX: usize = 1024;

/// Upper bound of their bytes.
const BYTES_MAX: usize = 8 * 1024 * 1024;
