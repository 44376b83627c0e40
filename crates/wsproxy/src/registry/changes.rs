//! The changes of this instance's entries that the shared registry does not have yet; without IO. Knows no kind of entry.

use std::hash::Hash;

use hashbrown::{Equivalent, HashMap};

/// Keys of entries that Redis does not have as they are now, each with the data of its change.
///
/// Invariant: of each key at most one change. The owner bounds the keys.
pub(super) struct Changes<K, D = ()> {
    waiting: HashMap<K, D>,
    /// Set while Redis has not answered to the changes that were taken.
    is_writing: bool,
    /// Set if a writer takes the changes; without a shared registry there is none, and nothing is noted.
    is_shared: bool,
}

impl<K: Hash + Eq, D> Changes<K, D> {
    pub(super) fn new(is_shared: bool) -> Self {
        Self { waiting: HashMap::new(), is_writing: false, is_shared }
    }

    /// Returns whether a writer takes the changes.
    pub(super) fn is_shared(&self) -> bool {
        self.is_shared
    }

    /// Notes a change in place of an older one of the same key. Returns whether there is something to write.
    pub(super) fn put(&mut self, key: K, change: D) -> bool {
        if self.is_shared {
            self.waiting.insert(key, change);
        }
        self.is_shared
    }

    /// Notes a change unless another one of the same key waits. Returns whether it is noted.
    pub(super) fn put_if_absent(&mut self, key: K, change: D) -> bool {
        self.is_shared && self.waiting.try_insert(key, change).is_ok()
    }

    /// Forgets the change of a key.
    pub(super) fn cancel<Q: Hash + Equivalent<K> + ?Sized>(&mut self, key: &Q) {
        self.waiting.remove(key);
    }

    pub(super) fn contains<Q: Hash + Equivalent<K> + ?Sized>(&self, key: &Q) -> bool {
        self.waiting.contains_key(key)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    /// Returns whether Redis has every change.
    pub(super) fn is_written(&self) -> bool {
        self.waiting.is_empty() && !self.is_writing
    }

    /// Takes at most `count` changes, which Redis may have from now on. [`Self::answered`] or [`Self::give_back`] follows.
    pub(super) fn take(&mut self, count: usize) -> Vec<(K, D)> {
        let taken: Vec<_> = self.waiting.extract_if(|_, _| true).take(count).collect();
        if self.waiting.is_empty() {
            self.waiting.shrink_to(KEPT);
        }
        self.is_writing = !taken.is_empty();
        taken
    }

    /// Notes that Redis has answered to the changes that were taken.
    pub(super) fn answered(&mut self) {
        self.is_writing = false;
    }

    /// Puts back changes that may or may not have been written, unless newer ones replace them.
    pub(super) fn give_back(&mut self, taken: impl IntoIterator<Item = (K, D)>) {
        self.is_writing = false;
        for (key, change) in taken {
            self.put_if_absent(key, change);
        }
    }
}

/// Changes for which memory is kept after a burst.
const KEPT: usize = 256;
