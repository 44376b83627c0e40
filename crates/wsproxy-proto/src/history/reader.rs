//! What an instance knows of one log: how far it has come, and what waits while a hole is filled.

use crate::history::{Log, Lost, Position, rule};

/// Most messages that wait while a hole is filled; they are in the log too, so more are read again.
const HELD_MAX: usize = 1000;

/// The same in bytes.
const HELD_BYTES_MAX: usize = 1024 * 1024;

/// The reader of one log on one instance, for all its clients there.
///
/// `M` is a message in whatever form the caller needs it.
#[derive(Debug)]
pub struct Reader<M> {
    /// Everything up to here has been delivered; `None`: it has not begun.
    position: Option<Position>,
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
    /// Whoever came while the log was read may need it; everybody else has it.
    Duplicate,
    /// It waits until the hole before it is filled.
    Held,
    /// The same, and the hole is new: the log has to be read.
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
        Self { position: None, hole: None }
    }
}

impl<M> Reader<M> {
    /// Begins where a snapshot has ended, unless a live message was faster.
    pub fn begin(&mut self, at: Position) {
        self.position.get_or_insert(at);
    }

    /// How far it has come.
    #[must_use]
    pub const fn position(&self) -> Option<Position> {
        self.position
    }

    /// Judges a message that came over the channel at `now`. Where it has to wait, `message` makes what is
    /// kept of it, and how many bytes that is.
    pub fn accept(
        &mut self,
        (id, prev): (Position, Position),
        now: u64,
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
                self.position = Some(id);
                Verdict::Deliver
            }
            rule::Step::Duplicate => Verdict::Duplicate,
            rule::Step::Gap => {
                let mut hole = Hole::new(now);
                hole.hold(live());
                self.hole = Some(Box::new(hole));
                Verdict::Hole
            }
        }
    }

    /// The link is lost: until the log was read, something may be missing behind what came until `since`.
    pub fn interrupt(&mut self, since: u64) {
        let since = self.hole.take().map_or(since, |hole| hole.since.min(since));
        self.hole = Some(Box::new(Hole::new(since)));
    }

    /// Behind which position the log has to be read, and since when something may be missing; `None` where
    /// nothing is, or where it has not begun.
    #[must_use]
    pub fn hole(&self) -> Option<(Position, u64)> {
        Some((self.position?, self.hole.as_ref()?.since))
    }

    /// Whether something may be missing, begun or not.
    #[must_use]
    pub const fn has_hole(&self) -> bool {
        self.hole.is_some()
    }

    /// Takes the whole of what the log holds behind `from`, judged by [`rule::heal`]. `is_linked`: the link
    /// was not lost since before the log was read.
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
        let mut hole = self.hole.take()?;
        let mut filled = Filled { lost: None, entries: false, held: Vec::new(), whole: false };
        match judged {
            Ok(()) => {
                filled.entries = true;
                self.position = log.entries.last().map_or(Some(from), |entry| Some(entry.id));
            }
            Err(lost) => {
                let position = log.last.unwrap_or_else(|| Position::nothing_at(now_ms));
                self.position = Some(position);
                filled.lost = Some((lost, position));
            }
        }
        if !is_linked || hole.overflowed {
            hole.clear();
            self.hole = Some(hole);
            return Some(filled);
        }
        let mut held = std::mem::take(&mut hole.held).into_iter();
        while let Some(live) = held.next() {
            match rule::step(self.position, live.id, live.prev) {
                rule::Step::Next => {
                    self.position = Some(live.id);
                    filled.held.push((live.id, live.message, true));
                }
                rule::Step::Duplicate => filled.held.push((live.id, live.message, false)),
                rule::Step::Gap => {
                    hole.clear();
                    hole.hold(live);
                    held.for_each(|live| hole.hold(live));
                    self.hole = Some(hole);
                    return Some(filled);
                }
            }
        }
        filled.whole = true;
        Some(filled)
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

    fn clear(&mut self) {
        self.held = Vec::new();
        self.held_bytes = 0;
        self.overflowed = false;
    }
}
