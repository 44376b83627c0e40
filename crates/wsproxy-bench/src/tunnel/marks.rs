//! Notes of the service behind a tunnel: when each marked request came and ended, and how often each marked POST came.

use std::collections::HashMap;
use std::sync::Arc;

use parking_lot::Mutex;

use crate::clock::now_ns;

/// The notes of one service. Invariant: at most [`NOTES_MAX`] of each kind; further requests are served without a note.
#[derive(Debug, Clone, Default)]
pub(super) struct Marks(Arc<Mutex<Notes>>);

#[derive(Debug, Default)]
struct Notes {
    /// Start and end of each marked request; the end is 0 while it lasts.
    times: HashMap<u64, (u64, u64)>,
    posts: HashMap<u64, u64>,
}

/// Notes the end of a request when it is dropped.
#[derive(Debug)]
pub(super) struct Mark {
    marks: Marks,
    id: u64,
}

impl Marks {
    /// Notes the start of a request.
    pub(super) fn start(&self, id: u64) -> Option<Mark> {
        let mut notes = self.0.lock();
        if notes.times.len() >= NOTES_MAX {
            return None;
        }
        notes.times.insert(id, (now_ns(), 0));
        Some(Mark { marks: self.clone(), id })
    }

    /// Returns start and end of a request as text, in nanoseconds of the monotonic clock; `0 0` where none came.
    pub(super) fn times(&self, id: u64) -> String {
        let (start, end) = self.0.lock().times.get(&id).copied().unwrap_or_default();
        format!("{start} {end}")
    }

    /// Counts a marked POST.
    pub(super) fn count(&self, id: u64) {
        let mut notes = self.0.lock();
        if notes.posts.len() < NOTES_MAX {
            *notes.posts.entry(id).or_default() += 1;
        }
    }

    /// Returns how often a marked POST came.
    pub(super) fn posts(&self, id: u64) -> u64 {
        self.0.lock().posts.get(&id).copied().unwrap_or_default()
    }

    /// Returns the number of marked POSTs, and of those that came more than once, as text.
    pub(super) fn totals(&self) -> String {
        let notes = self.0.lock();
        let repeated = notes.posts.values().filter(|count| **count > 1).count();
        format!("{} {repeated}", notes.posts.len())
    }
}

impl Drop for Mark {
    fn drop(&mut self) {
        if let Some((_, end)) = self.marks.0.lock().times.get_mut(&self.id) {
            *end = now_ns();
        }
    }
}

const NOTES_MAX: usize = 1_000_000;
