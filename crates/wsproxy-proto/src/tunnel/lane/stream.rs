//! State of one stream of a lane; knows no other stream.

use bytes::Bytes;

use crate::tunnel::{
    direction::Direction,
    frame::{Frame, Open},
    memory::Share,
    receiving::Receiving,
    schedule::List,
    sending::Sending,
};

/// One stream, as one side knows it.
#[derive(Debug)]
pub(super) struct Stream {
    pub(super) phase: Phase,
    pub(super) is_upgrade: bool,
    /// Whether OPEN was written or read.
    pub(super) is_opened: bool,
    pub(super) incoming: Direction,
    pub(super) outgoing: Direction,
    pub(super) receiving: Receiving,
    pub(super) sending: Sending,
    pub(super) share: Share,
    /// OPEN, or HEADs, which wait for the writer as whole frames.
    pub(super) head: Vec<u8>,
    /// Trailers that wait behind the bytes for the consumer.
    pub(super) trailers: Option<Bytes>,
    pub(super) consumer: Consumer,
    /// RESET that waits for the writer, as a whole frame; empty: none.
    pub(super) reset: Vec<u8>,
    /// Whether the stream is in the list of those with control frames to write.
    pub(super) is_due: bool,
    pub(super) list: List,
    /// Time at which the consumer took bytes, or else of OPEN, in microseconds.
    pub(super) taken_at: u64,
    /// Time at which the writer wrote a frame, or else of OPEN, in microseconds.
    pub(super) written_at: u64,
}

/// Part of its life in which a stream is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    /// Its end was not told.
    Open,
    /// Complete. The consumer has not taken everything, or STOP waits for the writer.
    Closed,
    /// Reset by this side. RESET waits for the writer.
    Resetting,
}

/// State of the task that takes received bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Consumer {
    Busy,
    /// It found nothing, and is to be told when there is something.
    Waits,
    /// It has everything, or wants no more.
    Done,
}

impl Stream {
    /// Returns the stream of a gateway, with its OPEN as a whole frame.
    pub(super) fn of_gateway(
        now: u64,
        open: &Open<'_>,
        head: Vec<u8>,
        window: u32,
        share: Share,
    ) -> Self {
        let mut stream = Self::new(now, open, window, share);
        stream.outgoing = Direction::request(open.upgrade, open.end);
        stream.head = head;
        if open.end {
            stream.sending.close();
        }
        stream
    }

    /// Returns the stream of an agent.
    pub(super) fn of_agent(now: u64, open: &Open<'_>, window: u32, share: Share) -> Self {
        let mut stream = Self::new(now, open, window, share);
        stream.incoming = Direction::request(open.upgrade, open.end);
        stream.is_opened = true;
        if open.end {
            stream.consumer = Consumer::Done;
        }
        stream
    }

    fn new(now: u64, open: &Open<'_>, window: u32, share: Share) -> Self {
        Self {
            phase: Phase::Open,
            is_upgrade: open.upgrade,
            is_opened: false,
            incoming: Direction::answer(),
            outgoing: Direction::answer(),
            receiving: Receiving::new(&share),
            sending: Sending::new(window),
            share,
            head: Vec::new(),
            trailers: None,
            consumer: Consumer::Busy,
            reset: Vec::new(),
            is_due: false,
            list: List::None,
            taken_at: now,
            written_at: now,
        }
    }

    /// Returns whether both directions have ended.
    pub(super) fn is_complete(&self) -> bool {
        self.incoming.is_ended() && self.sending.is_over() && self.head.is_empty()
    }

    pub(super) fn is_forgettable(&self) -> bool {
        match self.phase {
            Phase::Open => false,
            Phase::Closed => self.consumer == Consumer::Done && self.reset.is_empty(),
            Phase::Resetting => self.reset.is_empty(),
        }
    }

    /// Returns whether bytes of the stream can be taken although its lane is lost.
    pub(super) fn is_left_after_lane(&self) -> bool {
        self.phase == Phase::Closed && self.consumer != Consumer::Done
    }

    /// Returns whether bytes wait for the consumer or for the peer.
    pub(super) fn is_stuck(&self) -> bool {
        self.phase != Phase::Resetting && (self.receiving.len() > 0 || self.sending.is_waiting())
    }

    /// Frees everything, and leaves RESET for the writer.
    pub(super) fn begin_reset(&mut self, frame: &Frame<'_>) {
        self.phase = Phase::Resetting;
        self.reset.clear();
        // A frame of RESET is valid: its text is cut.
        let _ = frame.encode(&mut self.reset);
        self.head = Vec::new();
        self.sending.close();
        self.abandon();
        // A new stream can take the place before RESET is written.
        self.share.release();
    }

    /// The consumer wants no more.
    pub(super) fn abandon(&mut self) {
        self.receiving.clear(&mut self.share);
        self.trailers = None;
        self.consumer = Consumer::Done;
    }

    /// The peer's direction has ended, or its end was found.
    pub(super) fn end_incoming(&mut self) {
        self.receiving.end(&mut self.share);
    }

    /// Returns whether the consumer waited, and notes that it is told.
    pub(super) fn wakes_consumer(&mut self) -> bool {
        let is_waiting = self.consumer == Consumer::Waits;
        if is_waiting {
            self.consumer = Consumer::Busy;
        }
        is_waiting
    }

    /// Returns whether CREDIT or RESET is to be written.
    pub(super) fn has_control(&self) -> bool {
        !self.reset.is_empty() || self.grants()
    }

    /// Returns whether CREDIT is to be written.
    pub(super) fn grants(&self) -> bool {
        self.phase == Phase::Open && !self.incoming.is_ended() && self.receiving.is_due()
    }

    /// Takes growth back where the consumer took nothing for a second. Returns whether the stream has growth still.
    pub(super) fn tick(&mut self, now: u64) -> bool {
        if self.share.is_growing() && now >= self.taken_at + STALL {
            self.receiving.narrow(&mut self.share);
        }
        self.share.is_growing()
    }

    pub(super) fn progress_at(&self) -> u64 {
        self.taken_at.max(self.written_at)
    }

    pub(super) fn is_consumer_waiting(&self) -> bool {
        self.consumer == Consumer::Waits
    }

    pub(super) fn heap_bytes(&self) -> usize {
        let trailers = self.trailers.as_ref().map_or(0, Bytes::len);
        self.receiving.heap_bytes() + self.sending.len() + self.head.len() + trailers
    }
}

/// Time after which a consumer that takes nothing loses its growth, in microseconds.
const STALL: u64 = 1_000_000;
