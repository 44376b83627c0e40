//! Logs that are read page by page, and the check that their pages belong together.

use crate::history::{Entry, Log, Lost, Position, Snapshot, rule};

/// Pages of some logs that were read so far.
///
/// Every page is judged by itself, since the store may be emptied or rolled back between two pages.
#[derive(Debug, Default)]
pub struct Pages {
    logs: Vec<Log>,
    /// Position at which each log must go on in the next page; empty before the first page.
    expected: Vec<Position>,
}

/// Place behind which the logs are read.
#[derive(Debug, Clone, Copy)]
pub enum Since {
    /// Position of a client, which stands for all logs.
    Client(Position),
    /// Position of an instance in the one log.
    Reader(Position),
}

impl Pages {
    /// Adds a page. Returns the position behind which the next page is to be read, if there is one.
    ///
    /// # Errors
    /// The reason why entries may be missing. The pages are of no use then.
    pub fn push(
        &mut self,
        since: Since,
        ttl_ms: u64,
        page: &mut Snapshot,
    ) -> Result<Option<Position>, Lost> {
        match (since, self.expected.is_empty()) {
            (Since::Client(after), true) => rule::resume(after, ttl_ms, page)?,
            (Since::Reader(last), true) => {
                let judge = |log| rule::heal(last, ttl_ms, page.now_ms, log);
                page.logs.iter().try_for_each(judge)?;
            }
            (_, false) => {
                let mut logs = page.logs.iter().zip(&self.expected);
                logs.try_for_each(|(log, last)| rule::heal(*last, ttl_ms, page.now_ms, log))?;
            }
        }
        let behind = self.merge(&mut page.logs);
        if behind.is_none() && !self.logs.iter().all(Log::is_chain) {
            return Err(Lost::Trimmed);
        }
        Ok(behind)
    }

    /// Returns the logs with all entries that were read.
    #[must_use]
    pub fn into_logs(self) -> Vec<Log> {
        self.logs
    }

    fn merge(&mut self, page: &mut [Log]) -> Option<Position> {
        let ends = page.iter().filter(|log| !log.complete);
        let ends = ends.filter_map(|log| log.entries.last().map(|entry| entry.id));
        // Of logs with one order the page ends where the log ends that was read least far.
        let behind = ends.min_by_key(|end| end.id());
        self.logs.resize(page.len(), Log::default());
        let mut expected = Vec::with_capacity(page.len());
        for (number, (log, all)) in page.iter_mut().zip(&mut self.logs).enumerate() {
            let previous = self.expected.get(number).copied().unwrap_or_else(|| log.previous());
            let is_within =
                |entry: &Entry| behind.is_none_or(|behind| entry.id.id() <= behind.id());
            all.entries.extend(std::mem::take(&mut log.entries).into_iter().filter(is_within));
            (all.head, all.is_private, all.complete) = (log.head, log.is_private, behind.is_none());
            expected.push(all.entries.last().map_or(previous, |entry| entry.id));
        }
        self.expected = expected;
        behind
    }
}
