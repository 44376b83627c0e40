//! Work on large messages, which would hold up the messages of others on the task that reads the bus. Knows no message.

use std::{collections::VecDeque, sync::Arc};

use parking_lot::Mutex;
use tokio::task::yield_now;
use tokio_util::task::TaskTracker;

/// Queue of work on large messages, and the task that does it in its order. The task lives while work waits.
///
/// Invariant: the messages that wait have at most [`BYTES_MAX`] bytes. Work beyond that is done at once, on the task of
/// the caller: it is late rather than lost.
pub(super) struct Aside {
    tasks: TaskTracker,
    /// Guards the queue.
    waiting: Mutex<Waiting>,
}

#[derive(Default)]
struct Waiting {
    queue: VecDeque<(usize, Box<dyn FnOnce() + Send>)>,
    bytes: usize,
    /// A task takes from the queue.
    is_running: bool,
}

impl Aside {
    /// Makes a queue whose task runs on `tasks`.
    pub(super) fn new(tasks: TaskTracker) -> Arc<Self> {
        Arc::new(Self { tasks, waiting: Mutex::default() })
    }

    /// Does work on a message of so many bytes: at once where the message is small.
    pub(super) fn run(self: &Arc<Self>, bytes: usize, work: impl FnOnce() + Send + 'static) {
        if !is_large(bytes) {
            return work();
        }
        let is_idle = {
            let mut waiting = self.waiting.lock();
            if waiting.bytes + bytes > BYTES_MAX {
                drop(waiting);
                return work();
            }
            waiting.bytes += bytes;
            waiting.queue.push_back((bytes, Box::new(work)));
            !std::mem::replace(&mut waiting.is_running, true)
        };
        if is_idle {
            let aside = Arc::clone(self);
            self.tasks.spawn(async move {
                while let Some(work) = aside.next() {
                    work();
                    yield_now().await;
                }
            });
        }
    }

    fn next(&self) -> Option<Box<dyn FnOnce() + Send>> {
        let mut waiting = self.waiting.lock();
        let Some((bytes, work)) = waiting.queue.pop_front() else {
            *waiting = Waiting::default();
            return None;
        };
        waiting.bytes -= bytes;
        Some(work)
    }
}

/// Returns whether a message takes too long for the task that reads the bus. Markers and cancels are never large.
pub(super) const fn is_large(bytes: usize) -> bool {
    bytes > SMALL_BYTES_MAX
}

/// Upper bound of small messages. One is read, hashed and noted for the audit log within some 100 µs.
const SMALL_BYTES_MAX: usize = 16 * 1024;

/// Upper bound of the bytes that wait.
const BYTES_MAX: usize = 16 * 1024 * 1024;

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn large_messages_wait_for_a_task_in_their_order() {
        let tasks = TaskTracker::new();
        let aside = Aside::new(tasks.clone());
        let done: Arc<Mutex<Vec<usize>>> = Arc::default();
        let run = |bytes| {
            let done = Arc::clone(&done);
            aside.run(bytes, move || done.lock().push(bytes));
        };
        let half = BYTES_MAX / 2;
        [half + 1, SMALL_BYTES_MAX + 1, SMALL_BYTES_MAX].into_iter().for_each(run);
        assert_eq!(*done.lock(), [SMALL_BYTES_MAX], "large ones are not done here");
        run(half);
        assert_eq!(done.lock().pop(), Some(half), "no more than the bound waits");
        tasks.close();
        tasks.wait().await;
        assert_eq!(*done.lock(), [SMALL_BYTES_MAX, half + 1, SMALL_BYTES_MAX + 1]);
        run(BYTES_MAX);
        tasks.wait().await;
        assert_eq!(done.lock().len(), 4, "the room is free again");
    }
}
