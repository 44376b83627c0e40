//! State of a lane that its task and those of its streams share: the core, and the wakers. Knows no socket.

use std::{
    collections::VecDeque,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    task::{Context, Waker},
};

use hashbrown::HashMap;
use parking_lot::Mutex;
use tokio::sync::Notify;
use wsproxy_proto::tunnel::{
    code::Code,
    event::{Answer, End, Event, Request},
    frame::Reset,
    lane::{Lane, LaneConfig, Role},
    memory::Memory,
};

use super::{LaneEnd, LaneNumbers, LaneStatus};
use crate::clock::{self, Micros};

/// State of a lane, behind its lock.
///
/// Invariant: after each change, events of the core are handled under the same lock, and wakers are woken behind it.
#[derive(Debug)]
pub(super) struct Shared {
    /// Lock: held for one call of the core, never across an await. No other lock is taken under it but that of
    /// [`Memory`].
    state: Mutex<State>,
    /// Wakes the tasks that wait for another [`LaneStatus`].
    news: Notify,
    pub(super) bytes_received: AtomicU64,
    pub(super) bytes_sent: AtomicU64,
}

/// Core of a lane, with the tasks that wait for it.
#[derive(Debug)]
pub(super) struct State {
    pub(super) core: Lane,
    /// Streams of which a handle exists, or which wait for [`Self::acceptor`].
    slots: HashMap<u32, Slot>,
    /// Streams that wait for the acceptor, by their numbers, which rise. Bound: the core's streams.
    opened: VecDeque<(u32, Request)>,
    acceptor: Option<Waker>,
    /// Whether the acceptor is gone, or never was: at a gateway.
    is_deaf: bool,
    pub(super) status: LaneStatus,
    has_news: bool,
    pub(super) drain: Option<Drain>,
    /// Driver that waits for something to write.
    driver: Option<Waker>,
}

/// End of a lane that this side wants.
#[derive(Debug, Clone, Copy)]
pub(super) struct Drain {
    pub(super) code: Code,
    /// Time at which the lane ends, even with open streams.
    pub(super) until: Micros,
}

/// One stream, as far as its handles need it beside the core.
#[derive(Debug, Default)]
pub(super) struct Slot {
    reader: Option<Waker>,
    writer: Option<Waker>,
    /// Final head that the reader has not taken.
    answer: Option<Answer>,
    end: Option<End>,
    /// Whether a head with status 100 came that the reader has not taken.
    pub(super) has_continue: bool,
    /// Whether the peer's direction has no body.
    pub(super) is_bodyless: bool,
    /// Whether the peer takes no more of the body.
    pub(super) is_stopped: bool,
    has_reader: bool,
    has_writer: bool,
}

/// Tasks to be woken once the lock is free.
#[derive(Debug, Default)]
struct Woken {
    driver: Option<Waker>,
    /// Most calls concern one other task, which needs no memory here.
    first: Option<Waker>,
    others: Vec<Waker>,
    has_news: bool,
}

impl Shared {
    pub(super) fn new(role: Role, config: LaneConfig, memory: Arc<Memory>) -> Arc<Self> {
        Arc::new(Self {
            state: Mutex::new(State {
                core: Lane::new(role, config, memory, clock::now().0),
                slots: HashMap::new(),
                opened: VecDeque::new(),
                acceptor: None,
                is_deaf: role == Role::Gateway,
                status: LaneStatus::default(),
                has_news: false,
                drain: None,
                driver: None,
            }),
            news: Notify::new(),
            bytes_received: AtomicU64::new(0),
            bytes_sent: AtomicU64::new(0),
        })
    }

    /// Changes the state, and wakes the tasks that the change concerns.
    pub(super) fn call<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let mut woken = Woken::default();
        let mut state = self.state.lock();
        let result = change(&mut state);
        state.settle(&mut woken);
        drop(state);
        woken.wake(&self.news);
        result
    }

    /// Ends the lane: its open streams end. Only the driver calls this.
    pub(super) fn end(&self, end: LaneEnd) {
        self.call(|state| {
            state.core.lost();
            state.status.end = Some(end);
            state.has_news = true;
        });
    }

    /// Begins to drain the lane, unless it drains already and would be over earlier.
    pub(super) fn drain(&self, code: Code, within: Micros) {
        self.call(|state| {
            if state.status.end.is_some() {
                return;
            }
            let now = clock::now();
            let until = now.after(within);
            let until = state.drain.map_or(until, |drain| drain.until.min(until));
            state.drain = Some(Drain { code, until });
            let drain_ms = u32::try_from(until.since(now).0 / 1000).unwrap_or(u32::MAX);
            state.core.go_away(code, drain_ms);
            state.status.is_draining = true;
            state.has_news = true;
        });
    }

    pub(super) fn status(&self) -> LaneStatus {
        self.state.lock().status.clone()
    }

    /// Waits for a status with another version.
    pub(super) async fn changed(&self, seen: u64) -> LaneStatus {
        loop {
            // Made before the look at the status, so that no news in between are lost.
            let news = self.news.notified();
            let status = self.status();
            if status.version != seen {
                return status;
            }
            news.await;
        }
    }

    pub(super) fn streams(&self) -> usize {
        self.state.lock().core.streams()
    }

    /// Returns whether there is something to write, and so many streams that others may follow at once.
    pub(super) fn has_output_of_several(&self) -> bool {
        let state = self.state.lock();
        state.core.streams() >= SEVERAL && state.core.has_output()
    }

    pub(super) fn numbers(&self) -> LaneNumbers {
        let state = self.state.lock();
        LaneNumbers {
            streams: state.core.streams(),
            buffered_bytes: state.core.buffered_bytes(),
            bytes_received: self.bytes_received.load(Relaxed),
            bytes_sent: self.bytes_sent.load(Relaxed),
        }
    }
}

impl Woken {
    /// Notes a task, if there is one.
    fn add(&mut self, task: Option<Waker>) {
        if self.first.is_none() {
            self.first = task;
        } else {
            self.others.extend(task);
        }
    }

    fn wake(self, news: &Notify) {
        self.first.into_iter().chain(self.others).for_each(Waker::wake);
        if self.has_news {
            news.notify_waiters();
        }
        // Last, so that tasks on this thread put more before the driver writes.
        if let Some(driver) = self.driver {
            driver.wake();
        }
    }
}

impl State {
    /// Handles all events of the core, and notes the tasks to wake.
    fn settle(&mut self, woken: &mut Woken) {
        while let Some(event) = self.core.poll() {
            self.on_event(event, woken);
        }
        if std::mem::take(&mut self.has_news) {
            self.status.version += 1;
            woken.has_news = true;
            if self.status.end.is_some() {
                woken.add(self.acceptor.take());
            }
        }
        let is_drained = self.drain.is_some() && self.core.streams() == 0;
        if is_drained || self.core.has_output() {
            woken.driver = self.driver.take();
        }
    }

    fn on_event(&mut self, event: Event, woken: &mut Woken) {
        match event {
            Event::Ready(peer) => self.status.peer = Some(Arc::new(peer)),
            Event::Health(health) => self.status.health = Some(Arc::new(health)),
            Event::GoAway(go_away) => self.status.go_away = Some(go_away),
            Event::RoundTrip { us } => {
                self.status.round_trip = Some(Micros(us));
                return;
            }
            Event::Opened(number, request) => {
                self.on_opened(number, request, woken);
                return;
            }
            Event::Answered(number, answer) => {
                let Some(slot) = self.slots.get_mut(&number) else { return };
                if answer.status == 100 {
                    slot.has_continue = true;
                } else {
                    slot.is_bodyless = answer.end;
                    slot.answer = Some(answer);
                }
                woken.add(slot.reader.take());
                return;
            }
            Event::Readable(number) => {
                let slot = self.slots.get_mut(&number);
                woken.add(slot.and_then(|slot| slot.reader.take()));
                return;
            }
            Event::Writable(number) => {
                let slot = self.slots.get_mut(&number);
                woken.add(slot.and_then(|slot| slot.writer.take()));
                return;
            }
            Event::Stopped(number) => {
                let Some(slot) = self.slots.get_mut(&number) else { return };
                slot.is_stopped = true;
                woken.add(slot.writer.take());
                return;
            }
            Event::Ended(number, end) => {
                self.on_ended(number, end, woken);
                return;
            }
        }
        self.has_news = true;
    }

    fn on_opened(&mut self, number: u32, request: Request, woken: &mut Woken) {
        if self.is_deaf {
            refuse(&mut self.core, number);
            return;
        }
        let slot = Slot { is_bodyless: request.end, ..Slot::default() };
        self.slots.insert(number, slot);
        self.opened.push_back((number, request));
        woken.add(self.acceptor.take());
    }

    fn on_ended(&mut self, number: u32, end: End, woken: &mut Woken) {
        let Some(slot) = self.slots.get_mut(&number) else { return };
        slot.end = Some(end);
        woken.add(slot.reader.take());
        woken.add(slot.writer.take());
        if let Ok(at) = self.opened.binary_search_by_key(&number, |(number, _)| *number) {
            // No task has seen the stream.
            self.opened.remove(at);
            self.slots.remove(&number);
        }
    }

    /// Notes that both handles of a stream exist.
    pub(super) fn hold(&mut self, number: u32) {
        let slot = self.slots.entry(number).or_default();
        (slot.has_reader, slot.has_writer) = (true, true);
    }

    pub(super) fn release_reader(&mut self, number: u32) {
        if let Some(slot) = self.slots.get_mut(&number) {
            (slot.has_reader, slot.reader) = (false, None);
            self.forget(number);
        }
    }

    pub(super) fn release_writer(&mut self, number: u32) {
        if let Some(slot) = self.slots.get_mut(&number) {
            (slot.has_writer, slot.writer) = (false, None);
            self.forget(number);
        }
    }

    fn forget(&mut self, number: u32) {
        if self.slots.get(&number).is_some_and(|slot| !slot.has_reader && !slot.has_writer) {
            self.slots.remove(&number);
        }
    }

    /// Returns the stream of a handle.
    pub(super) fn slot(&mut self, number: u32) -> &mut Slot {
        self.slots.entry(number).or_default()
    }

    /// Returns the end of a stream that takes no further calls.
    pub(super) fn end_of(&self, number: u32) -> End {
        let end = self.slots.get(&number).and_then(|slot| slot.end.clone());
        end.unwrap_or(End::LaneLost { not_dispatched: false })
    }

    /// Returns the next stream for the acceptor. `None`: it has to wait, and its waker is kept.
    pub(super) fn next_opened(&mut self, cx: &Context<'_>) -> Option<(u32, Request)> {
        let opened = self.opened.pop_front();
        if opened.is_none() {
            keep(&mut self.acceptor, cx);
        }
        opened
    }

    /// Refuses all streams that wait for the acceptor, and those that still come.
    pub(super) fn stop_accepting(&mut self) {
        self.is_deaf = true;
        for (number, _) in std::mem::take(&mut self.opened) {
            self.slots.remove(&number);
            refuse(&mut self.core, number);
        }
    }

    /// Notes that the driver waits for something to write.
    pub(super) fn park(&mut self, cx: &Context<'_>) {
        keep(&mut self.driver, cx);
    }
}

impl Slot {
    pub(super) fn wait_reader(&mut self, cx: &Context<'_>) {
        keep(&mut self.reader, cx);
    }

    pub(super) fn wait_writer(&mut self, cx: &Context<'_>) {
        keep(&mut self.writer, cx);
    }

    pub(super) const fn take_answer(&mut self) -> Option<Answer> {
        self.answer.take()
    }

    pub(super) const fn end(&self) -> Option<&End> {
        self.end.as_ref()
    }
}

fn refuse(core: &mut Lane, number: u32) {
    core.reset(number, &Reset { not_dispatched: true, ..Reset::new(Code::Refused) });
}

/// Keeps the waker of a task in place of an earlier one.
fn keep(kept: &mut Option<Waker>, cx: &Context<'_>) {
    if !kept.as_ref().is_some_and(|waker| waker.will_wake(cx.waker())) {
        *kept = Some(cx.waker().clone());
    }
}

/// Number of streams from which on their frames are gathered. With fewer, the wait costs more than the writes that it saves.
const SEVERAL: usize = 4;

#[cfg(test)]
mod tests {
    use wsproxy_proto::tunnel::{
        frame::{Frame, Frames, Open, StreamFrame},
        hello::Hello,
        memory::MemoryLimits,
    };

    use super::*;

    #[test]
    fn a_stream_takes_little_beside_the_core() {
        assert!(size_of::<Slot>() <= 128, "{}", size_of::<Slot>());
    }

    #[test]
    fn streams_that_come_behind_the_last_accept_are_refused() {
        let (memory, config) = (Memory::new(MemoryLimits::default()), LaneConfig::default());
        let shared = Shared::new(Role::Agent, config, memory);
        let open = Open { end: true, ..Open::new(b"GET", b"/") };
        let mut message = Vec::new();
        Frame::Hello(Hello::default()).encode(&mut message).unwrap();
        Frame::Stream(1, StreamFrame::Open(open)).encode(&mut message).unwrap();
        shared.call(|state| state.stop_accepting());
        shared.call(|state| state.core.receive(0, &message).unwrap());
        let mut answer = Vec::new();
        shared.call(|state| state.core.write_batch(0, &mut answer));
        let refused = Frames::new(&answer).unwrap().any(|frame| match frame.unwrap() {
            Frame::Stream(1, StreamFrame::Reset(reset)) => reset.not_dispatched,
            _ => false,
        });
        assert!(refused);
        assert_eq!(shared.streams(), 0);
    }

    #[test]
    fn a_stream_without_handles_takes_nothing() {
        let memory = Memory::new(MemoryLimits::default());
        let shared = Shared::new(Role::Gateway, LaneConfig::default(), memory);
        shared.call(|state| {
            state.hold(1);
            state.release_writer(1);
            assert_eq!(state.slots.len(), 1);
            state.release_reader(1);
            assert_eq!(state.slots.len(), 0);
        });
    }
}
