//! A bounded queue in front of one task; knows the weights of items, but not the items.

use std::{
    collections::VecDeque,
    task::{Context, Poll, Waker},
};

use hashbrown::HashMap;
use parking_lot::Mutex;
use tokio::sync::Notify;

/// Invariant: never holds more than `bytes_max`, except for one item that alone is heavier. An item that does not fit
/// is given back to the caller. [`Queue::poll_open`] asks producers to pause before that.
pub(crate) struct Queue<T> {
    bytes_max: usize,
    /// Guards everything; never held while a waker runs.
    state: Mutex<State<T>>,
    filled: Notify,
}

struct State<T> {
    items: VecDeque<(T, usize)>,
    bytes: usize,
    /// Set from three quarters full until half empty, so that producers pause and go on rarely.
    paused: bool,
    closed: bool,
    /// One entry for each waiting task, however often the task polls.
    waiting: HashMap<(usize, usize), Waker>,
}

/// The reason why an item was given back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Back {
    /// The item did not fit.
    Full,
    /// [`Queue::close`] was called.
    Closed,
}

impl<T> Queue<T> {
    /// Creates an empty queue.
    pub(crate) fn new(bytes_max: usize) -> Self {
        let state = State {
            items: VecDeque::new(),
            bytes: 0,
            paused: false,
            closed: false,
            waiting: HashMap::new(),
        };
        Self { bytes_max, state: Mutex::new(state), filled: Notify::new() }
    }

    /// Appends an item of `bytes` bytes, or gives the item back unchanged.
    pub(crate) fn push<I: Into<T>>(&self, item: I, bytes: usize) -> Result<(), (Back, I)> {
        let was_empty = {
            let mut state = self.state.lock();
            if state.closed {
                return Err((Back::Closed, item));
            }
            let was_empty = state.items.is_empty();
            if !was_empty && state.bytes + bytes > self.bytes_max {
                state.paused = true;
                return Err((Back::Full, item));
            }
            state.items.push_back((item.into(), bytes));
            state.bytes += bytes;
            state.paused |= state.bytes > self.bytes_max / 4 * 3;
            was_empty
        };
        if was_empty {
            self.filled.notify_one();
        }
        Ok(())
    }

    /// Appends an item of `bytes` bytes that was within the bound of another queue; gives it back once this one is closed.
    pub(crate) fn push_beyond(&self, item: T, bytes: usize) -> Result<(), T> {
        {
            let mut state = self.state.lock();
            if state.closed {
                return Err(item);
            }
            state.items.push_back((item, bytes));
            state.bytes += bytes;
            state.paused |= state.bytes > self.bytes_max / 4 * 3;
        }
        self.filled.notify_one();
        Ok(())
    }

    /// Lets producers go on that wait in [`Self::poll_open`], though the queue may be full: no room comes for the moment.
    pub(crate) fn release(&self) {
        let woken = std::mem::take(&mut self.state.lock().waiting);
        wake(woken);
    }

    /// Moves items to `into`, oldest first, until they weigh `bytes` or are `count`; at least one, if there is one.
    pub(crate) fn take(&self, bytes: usize, count: usize, into: &mut Vec<T>) {
        let woken = {
            let mut state = self.state.lock();
            let mut taken = 0;
            let mut left = count.max(1);
            while taken < bytes.max(1) && left > 0 {
                let Some((item, weight)) = state.items.pop_front() else { break };
                into.push(item);
                taken += weight;
                left -= 1;
            }
            state.bytes -= taken;
            state.give_memory_back();
            state.open_below(self.bytes_max / 2)
        };
        wake(woken);
    }

    /// Drops the items that `keep` refuses, to make room.
    pub(crate) fn retain(&self, mut keep: impl FnMut(&T) -> bool) {
        let (woken, dropped) = {
            let mut state = self.state.lock();
            let mut dropped = Vec::new();
            for (item, weight) in std::mem::take(&mut state.items) {
                if keep(&item) {
                    state.items.push_back((item, weight));
                } else {
                    state.bytes -= weight;
                    dropped.push(item);
                }
            }
            (state.open_below(self.bytes_max / 2), dropped)
        };
        drop(dropped);
        wake(woken);
    }

    /// Resolves once after the queue went from empty to filled; may resolve without an item.
    pub(crate) async fn filled(&self) {
        self.filled.notified().await;
    }

    /// Returns `Pending` while producers should pause.
    pub(crate) fn poll_open(&self, cx: &mut Context<'_>) -> Poll<()> {
        let mut state = self.state.lock();
        if !state.paused || state.closed {
            return Poll::Ready(());
        }
        let waker = cx.waker();
        let key = (waker.data() as usize, std::ptr::from_ref(waker.vtable()) as usize);
        state.waiting.insert(key, waker.clone());
        Poll::Pending
    }

    /// Refuses items from now on; queued ones can still be taken.
    pub(crate) fn close(&self) {
        let woken = {
            let mut state = self.state.lock();
            state.closed = true;
            std::mem::take(&mut state.waiting)
        };
        wake(woken);
        self.filled.notify_one();
    }

    /// Returns whether the queue is empty.
    pub(crate) fn is_empty(&self) -> bool {
        self.state.lock().items.is_empty()
    }

    /// Returns the bytes of queued items.
    pub(crate) fn bytes(&self) -> usize {
        self.state.lock().bytes
    }
}

impl<T> State<T> {
    fn open_below(&mut self, bytes: usize) -> HashMap<(usize, usize), Waker> {
        if !self.paused || self.bytes > bytes {
            return HashMap::new();
        }
        self.paused = false;
        std::mem::take(&mut self.waiting)
    }

    fn give_memory_back(&mut self) {
        if self.items.is_empty() && self.items.capacity() > ITEMS_KEPT {
            self.items = VecDeque::new();
        }
    }
}

fn wake(waiting: HashMap<(usize, usize), Waker>) {
    for (_, waker) in waiting {
        waker.wake();
    }
}

/// Items for which memory is kept after a burst.
const ITEMS_KEPT: usize = 1024;

#[cfg(test)]
mod tests {
    use std::{
        sync::{
            Arc,
            atomic::{AtomicUsize, Ordering},
        },
        task::Wake,
    };

    use super::*;

    struct Count(AtomicUsize);

    impl Wake for Count {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    #[test]
    fn what_does_not_fit_comes_back_and_order_is_kept() {
        let queue = Queue::<i32>::new(100);
        for item in 0..10 {
            queue.push(item, 10).unwrap();
        }
        assert_eq!(queue.push(10, 1), Err((Back::Full, 10)));
        let mut taken = Vec::new();
        queue.take(30, 100, &mut taken);
        assert_eq!(taken, [0, 1, 2]);
        queue.take(1000, 2, &mut taken);
        assert_eq!(taken, [0, 1, 2, 3, 4]);
        assert_eq!(queue.bytes(), 50);
        queue.retain(|item| item % 2 == 0);
        queue.take(1000, 100, &mut taken);
        assert_eq!(taken[5..], [6, 8]);
        assert_eq!(queue.bytes(), 0);
    }

    #[test]
    fn one_item_heavier_than_the_bound_passes_alone() {
        let queue = Queue::<char>::new(100);
        queue.push('a', 1000).unwrap();
        assert_eq!(queue.push('b', 1), Err((Back::Full, 'b')));
    }

    #[test]
    fn producers_pause_at_three_quarters_until_half() {
        let queue = Queue::<i32>::new(100);
        let count = Arc::new(Count(AtomicUsize::new(0)));
        let waker = Waker::from(count.clone());
        let mut cx = Context::from_waker(&waker);
        (0..7).for_each(|item| queue.push(item, 10).unwrap());
        assert!(queue.poll_open(&mut cx).is_ready());
        queue.push(7, 10).unwrap();
        assert!(queue.poll_open(&mut cx).is_pending());
        assert!(queue.poll_open(&mut cx).is_pending());
        let mut taken = Vec::new();
        queue.take(1, 2, &mut taken);
        assert!(queue.poll_open(&mut cx).is_pending());
        queue.take(20, 2, &mut taken);
        assert_eq!(count.0.load(Ordering::Relaxed), 1);
        assert!(queue.poll_open(&mut cx).is_ready());
    }

    #[test]
    fn closing_wakes_everybody_and_refuses() {
        let queue = Queue::<char>::new(8);
        queue.push('a', 8).unwrap();
        let count = Arc::new(Count(AtomicUsize::new(0)));
        let waker = Waker::from(count.clone());
        assert!(queue.poll_open(&mut Context::from_waker(&waker)).is_pending());
        queue.close();
        assert_eq!(count.0.load(Ordering::Relaxed), 1);
        assert_eq!(queue.push('b', 1), Err((Back::Closed, 'b')));
    }
}
