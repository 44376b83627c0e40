//! What an instance knows of one log: how far it has come, and what waits while a hole is filled.

use crate::history::{Log, Lost, Position, rule};

/// Most messages that wait while a hole is filled; they are in the log too, so more are read again.
const HELD_MAX: usize = 20_000;

/// The same in bytes.
const HELD_BYTES_MAX: usize = 8 * 1024 * 1024;

/// What the clocks of stores that replace each other may differ by; so long a client may have to read again
/// whose log has vanished just after its reader has begun.
const CLOCKS_MS: u64 = 100;

/// The reader of one log on one instance, for all its clients there.
///
/// `M` is a message in whatever form the caller needs it.
#[derive(Debug)]
pub struct Reader<M> {
    /// Everything up to here has been delivered; `None`: it has not begun.
    position: Option<Position>,
    /// Where it began: what is behind this was offered to everybody who waits.
    began: Position,
    /// Up to here some client has read by itself, maybe further than the channel has brought.
    ahead: Position,
    hole: Option<Box<Hole<M>>>,
}

/// Something may be missing behind the position.
#[derive(Debug)]
struct Hole<M> {
    /// When the last message before it can have come, on the caller's clock.
    since: u64,
    /// Live messages behind it.
    held: Vec<Live<M>>,
    held_bytes: usize,
    /// Some were thrown away: the log has to be read again.
    overflowed: bool,
}

/// A message that came over the channel and waits.
#[derive(Debug)]
struct Live<M> {
    id: Position,
    prev: Position,
    bytes: usize,
    message: M,
}

/// What is to be done with a live message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Everybody gets it.
    Deliver,
    /// Whoever waits behind a [closed fence](crate::history::Fence::is_open) may need it; everybody else has it.
    Duplicate,
    /// It waits until the hole before it is filled.
    Held,
    /// It shows that something is missing: the log has to be read, and this message with it.
    Hole,
}

/// What filling a hole came to.
#[derive(Debug)]
pub struct Filled<M> {
    /// Everybody is told this first; the position is where they are then.
    pub lost: Option<(Lost, Position)>,
    /// Whether the entries that were read are to be delivered.
    pub entries: bool,
    /// Live messages that waited: to everybody, or (`false`) only to whoever came meanwhile.
    pub held: Vec<(Position, M, bool)>,
    /// Whether nothing is missing any more; otherwise the log has to be read again.
    pub whole: bool,
}

impl<M> Default for Reader<M> {
    fn default() -> Self {
        Self { position: None, began: Position::START, ahead: Position::START, hole: None }
    }
}

impl<M> Reader<M> {
    /// A client goes on behind `at`, where its snapshot of the log has ended; a reader that has not begun
    /// begins there.
    ///
    /// `false`: the reader began later, and what lies between is not waiting for this client: it has to read
    /// the log again.
    #[must_use]
    pub fn begin(&mut self, at: Position) -> bool {
        if self.position.is_none() {
            (self.position, self.began) = (Some(at), at);
            return true;
        }
        self.ahead = self.ahead.max(at);
        if at.is_entry() || !self.began.is_entry() {
            self.began <= at
        } else {
            // The entry at which it began may be the later one although its time is not.
            self.began.milliseconds.saturating_add(CLOCKS_MS) < at.time_ms()
        }
    }

    /// How far it has come.
    #[must_use]
    pub const fn position(&self) -> Option<Position> {
        self.position
    }

    /// Judges a message that came over a link which was known to be whole at `since`. Where it has to wait,
    /// `message` makes what is kept of it, and how many bytes that is.
    pub fn accept(
        &mut self,
        (id, prev): (Position, Position),
        since: u64,
        message: impl FnOnce() -> (M, usize),
    ) -> Verdict {
        let live = || {
            let (message, bytes) = message();
            Live { id, prev, bytes, message }
        };
        if let Some(hole) = &mut self.hole {
            hole.hold(live());
            return Verdict::Held;
        }
        match rule::step(self.position, id, prev) {
            rule::Step::Next => {
                if self.position.replace(id).is_none() {
                    self.began = prev;
                }
                Verdict::Deliver
            }
            rule::Step::Duplicate => Verdict::Duplicate,
            rule::Step::Gap => {
                // It is in the log, or never will be: keeping it could only open the same hole again.
                self.hole = Some(Box::new(Hole::new(since)));
                Verdict::Hole
            }
        }
    }

    /// The link is lost: until the log was read, something may be missing behind what came until `since`.
    ///
    /// A reader that has not begun misses nothing: whoever waits for it begins with a later snapshot.
    pub fn interrupt(&mut self, since: u64) {
        if self.position.is_none() {
            return;
        }
        let since = self.hole.take().map_or(since, |hole| hole.since.min(since));
        self.hole = Some(Box::new(Hole::new(since)));
    }

    /// Behind which position the log has to be read, and since when something may be missing; `None` where
    /// nothing is. A reader that has not begun has no hole.
    #[must_use]
    pub fn hole(&self) -> Option<(Position, u64)> {
        Some((self.position?, self.hole.as_ref()?.since))
    }

    /// Whether something may be missing.
    #[must_use]
    pub const fn has_hole(&self) -> bool {
        self.hole.is_some()
    }

    /// Whether [`Self::fill`] would leave nothing missing.
    ///
    /// Logs with one order must be made whole together, or a client sees a later message of one before an
    /// earlier one of the other, and its last event id no longer says what it has.
    #[must_use]
    pub fn joins(&self, from: Position, judged: Result<(), Lost>, log: &Log, now_ms: u64) -> bool {
        let Some(hole) = self.hole.as_ref().filter(|hole| !hole.overflowed) else { return false };
        let judged = self.judge(from, judged, log);
        let mut position = match judged {
            Ok(()) => log.entries.last().map_or(from, |entry| entry.id),
            Err(_) => log.position(now_ms),
        };
        if judged.is_ok() && self.ahead.is_entry() && self.ahead > position {
            return false;
        }
        for live in &hole.held {
            match rule::step(Some(position), live.id, live.prev) {
                rule::Step::Next => position = live.id,
                rule::Step::Duplicate => {}
                rule::Step::Gap => return false,
            }
        }
        self.position == Some(from) && log.last.is_none_or(|last| position >= last)
    }

    /// Takes the whole of what the log holds behind `from`, judged by [`rule::heal`]. `is_linked`: the link
    /// was not lost since before the log was read, and what waits may be delivered.
    ///
    /// `None` where the hole is not the one for which the log was read.
    pub fn fill(
        &mut self,
        from: Position,
        judged: Result<(), Lost>,
        log: &Log,
        now_ms: u64,
        is_linked: bool,
    ) -> Option<Filled<M>> {
        if self.position != Some(from) {
            return None;
        }
        let whole = is_linked && self.joins(from, judged, log, now_ms);
        let judged = self.judge(from, judged, log);
        let hole = self.hole.as_mut()?;
        let mut filled = Filled { lost: None, entries: false, held: Vec::new(), whole };
        let mut position = match judged {
            Ok(()) => {
                filled.entries = true;
                log.entries.last().map_or(from, |entry| entry.id)
            }
            Err(lost) => {
                let position = log.position(now_ms);
                (self.began, self.ahead) = (position, Position::START);
                filled.lost = Some((lost, position));
                position
            }
        };
        // What waits is in the log by now, where it has to be read again.
        let held = hole.clear();
        if whole {
            self.hole = None;
            for live in held {
                let is_new = rule::step(Some(position), live.id, live.prev) == rule::Step::Next;
                if is_new {
                    position = live.id;
                }
                filled.held.push((live.id, live.message, is_new));
            }
        }
        self.position = Some(position);
        Some(filled)
    }

    /// What a client has read by itself must be there still, if only behind a [cut](Log::cut).
    fn judge(&self, from: Position, judged: Result<(), Lost>, log: &Log) -> Result<(), Lost> {
        let end = log.entries.last().map_or(from, |entry| entry.id);
        let is_held = log.entries.iter().any(|entry| entry.id == self.ahead)
            || (self.ahead > end && log.last.is_some_and(|last| last >= self.ahead));
        if self.ahead.is_entry() && self.ahead > from && !is_held {
            return judged.and(Err(Lost::Unknown));
        }
        judged
    }
}

impl<M> Hole<M> {
    const fn new(since: u64) -> Self {
        Self { since, held: Vec::new(), held_bytes: 0, overflowed: false }
    }

    fn hold(&mut self, live: Live<M>) {
        self.held_bytes += live.bytes;
        if self.held.len() >= HELD_MAX || self.held_bytes > HELD_BYTES_MAX {
            self.overflowed = true;
            self.held = Vec::new();
        }
        if !self.overflowed {
            self.held.push(live);
        }
    }

    fn clear(&mut self) -> Vec<Live<M>> {
        (self.held_bytes, self.overflowed) = (0, false);
        std::mem::take(&mut self.held)
    }
}
