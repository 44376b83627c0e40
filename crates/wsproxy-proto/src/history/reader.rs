//! What an instance knows of one log: how far it has come, and what waits while a hole is filled.

use crate::history::{Log, Lost, Position, rule};

/// Most messages that wait while a hole is filled; they are in the log too, so more are read again.
const HELD_MAX: usize = 20_000;

/// The same in bytes.
const HELD_BYTES_MAX: usize = 8 * 1024 * 1024;

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
    /// Where the life of the log began in which it reads, where that is known.
    life: Option<Position>,
    hole: Option<Box<Hole<M>>>,
}

/// Something may be missing behind the position.
#[derive(Debug)]
struct Hole<M> {
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
    latest_ms: u64,
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
        let (began, ahead) = (Position::START, Position::START);
        Self { position: None, began, ahead, life: None, hole: None }
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
            (self.position, self.began, self.life) = (Some(at), at, life_of(at));
            return true;
        }
        self.ahead = self.ahead.later(at);
        self.began == at || self.began.is_before(at)
    }

    /// Whether all that comes from now on is behind `at`: a client that was there needs no fence any more.
    #[must_use]
    pub fn has_passed(&self, at: Position) -> bool {
        self.position.is_some_and(|position| !position.is_before(at))
    }

    /// How far it has come.
    #[must_use]
    pub const fn position(&self) -> Option<Position> {
        self.position
    }

    /// Judges a message that came over the link while the store's clock showed `latest_ms` at most. Where it has to
    /// wait, `message` makes what is kept of it, and how many bytes that is.
    pub fn accept(
        &mut self,
        id: Position,
        prev: Position,
        latest_ms: u64,
        message: impl FnOnce() -> (M, usize),
    ) -> Verdict {
        if let Some(hole) = &mut self.hole {
            let (message, bytes) = message();
            hole.hold(Live { id, prev, latest_ms, bytes, message });
            return Verdict::Held;
        }
        match rule::step(self.position, id, prev, latest_ms) {
            // The link lost nothing, so what begins another life comes next, although its id may be lower.
            rule::Step::Gap if self.begins_another_life(id, prev, latest_ms) => {
                (self.position, self.began, self.ahead) = (Some(id), prev, Position::START);
                self.life = Some(id);
                Verdict::Deliver
            }
            // What a client has read by itself must come over the channel too, unless it was of another life.
            rule::Step::Next if self.passes_ahead(id) => {
                self.interrupt();
                Verdict::Hole
            }
            rule::Step::Next => {
                if self.position.replace(id).is_none() {
                    self.began = prev;
                }
                if prev.is_beginning() {
                    self.life = Some(if prev == Position::START { id } else { prev });
                }
                Verdict::Deliver
            }
            rule::Step::Duplicate => Verdict::Duplicate,
            rule::Step::Gap => {
                // It is in the log, or never will be: keeping it could only open the same hole again.
                self.interrupt();
                Verdict::Hole
            }
        }
    }

    fn begins_another_life(&self, id: Position, prev: Position, latest_ms: u64) -> bool {
        let is_plausible = id.milliseconds <= latest_ms && !id.is_beginning();
        is_plausible && prev == Position::START && self.life.is_some_and(|life| life != id)
    }

    fn passes_ahead(&self, id: Position) -> bool {
        let is_behind = self.position.is_some_and(|position| position.is_before(self.ahead));
        is_behind && !id.is_before(self.ahead) && id != self.ahead
    }

    /// The link is lost: until the log was read, something may be missing behind the position.
    ///
    /// A reader that has not begun misses nothing: its clients begin with a later snapshot.
    pub fn interrupt(&mut self) {
        if self.position.is_some() {
            self.hole = Some(Box::default());
        }
    }

    /// Behind which position the log has to be read; `None` where nothing is missing. A reader that has not begun
    /// has no hole.
    #[must_use]
    pub fn hole(&self) -> Option<Position> {
        self.hole.as_ref().and(self.position)
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
    pub fn joins(&self, from: Position, judged: Result<(), Lost>, log: &Log) -> bool {
        let Some(hole) = self.hole.as_ref().filter(|hole| !hole.overflowed) else { return false };
        let judged = self.judge(from, judged, log);
        let mut position = match judged {
            Ok(()) => log.entries.last().map_or(from, |entry| entry.id),
            Err(_) => log.position(),
        };
        if judged.is_ok() && position.is_before(self.ahead) {
            return false;
        }
        for live in &hole.held {
            match rule::step(Some(position), live.id, live.prev, live.latest_ms) {
                rule::Step::Next => position = live.id,
                rule::Step::Duplicate => {}
                rule::Step::Gap => return false,
            }
        }
        self.position == Some(from) && log.head.is_none_or(|head| !position.is_before(head))
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
        is_linked: bool,
    ) -> Option<Filled<M>> {
        if self.position != Some(from) {
            return None;
        }
        let whole = is_linked && self.joins(from, judged, log);
        let judged = self.judge(from, judged, log);
        let hole = self.hole.as_mut()?;
        let mut filled = Filled { lost: None, entries: false, held: Vec::new(), whole };
        let mut position = match judged {
            Ok(()) => {
                filled.entries = true;
                log.entries.last().map_or(from, |entry| entry.id)
            }
            Err(lost) => {
                let position = log.position();
                (self.began, self.ahead) = (position, Position::START);
                self.life = life_of(position);
                filled.lost = Some((lost, position));
                position
            }
        };
        // What waits is in the log by now, where it has to be read again.
        let held = hole.clear();
        if whole {
            self.hole = None;
            for live in held {
                let step = rule::step(Some(position), live.id, live.prev, live.latest_ms);
                if step == rule::Step::Next {
                    position = live.id;
                }
                filled.held.push((live.id, live.message, step == rule::Step::Next));
            }
        }
        self.position = Some(position);
        Some(filled)
    }

    /// What a client has read by itself must be there still, if only behind a [cut](Log::cut).
    fn judge(&self, from: Position, judged: Result<(), Lost>, log: &Log) -> Result<(), Lost> {
        let end = log.entries.last().map_or(from, |entry| entry.id);
        let is_held = log.entries.iter().any(|entry| entry.id == self.ahead)
            || (end.is_before(self.ahead)
                && log.head.is_some_and(|head| !head.is_before(self.ahead)));
        if from.is_before(self.ahead) && !is_held {
            return judged.and(Err(Lost::Unknown));
        }
        judged
    }
}

/// A log that is at its beginning begins there.
fn life_of(at: Position) -> Option<Position> {
    at.is_beginning().then_some(at)
}

impl<M> Default for Hole<M> {
    fn default() -> Self {
        Self { held: Vec::new(), held_bytes: 0, overflowed: false }
    }
}

impl<M> Hole<M> {
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
