//! Two lanes and the two directions of a connection between them, with a model of each stream.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Arc;

use bytes::Bytes;
use wsproxy_proto::tunnel::{
    code::Code,
    event::{End, Event},
    frame::{DataFlag, Frame, Frames, Head, Open, Reset, Source, StreamFrame},
    headers::{HeaderBlock, Headers},
    lane::{BATCH_BYTES_MAX, Lane, LaneConfig, OpenError, Role, SendError, Taken},
    memory::{Memory, MemoryLimits},
};

/// One side of a stream, as its tasks know it.
#[derive(Debug, Default)]
pub(crate) struct Side {
    /// Bytes that this side put.
    pub(crate) put: usize,
    pub(crate) is_finished: bool,
    pub(crate) has_trailers: bool,
    /// Whether the peer takes no more.
    pub(crate) is_stopped: bool,
    /// Bytes that this side took.
    pub(crate) taken: usize,
    pub(crate) took_end: bool,
    /// Whether this side takes no more.
    pub(crate) has_stopped: bool,
    pub(crate) has_head: bool,
    /// Whether the task that puts, or the one that takes, was told to wait.
    pub(crate) is_put_waiting: bool,
    pub(crate) is_take_waiting: bool,
    pub(crate) ends: Vec<End>,
}

/// Credit of one direction of one stream, as the frames on the wire say.
#[derive(Debug, Default)]
struct Wire {
    sent: usize,
    granted: usize,
}

pub(crate) struct Pair {
    pub(crate) now: u64,
    pub(crate) lanes: [Lane; 2],
    pub(crate) memories: [Arc<Memory>; 2],
    /// Messages on their way to each side.
    pub(crate) flying: [VecDeque<Vec<u8>>; 2],
    pub(crate) streams: BTreeMap<u32, [Side; 2]>,
    wires: HashMap<(usize, u32), Wire>,
    limits: MemoryLimits,
    pub(crate) events: Vec<(usize, Event)>,
}

impl Pair {
    pub(crate) fn new(limits: MemoryLimits, config: &LaneConfig) -> Self {
        let memories = [Memory::new(limits), Memory::new(limits)];
        let lane = |role, at: usize| Lane::new(role, config.clone(), Arc::clone(&memories[at]), 0);
        let lanes = [lane(Role::Gateway, GATEWAY), lane(Role::Agent, AGENT)];
        let mut pair = Self {
            now: 0,
            lanes,
            memories,
            flying: Default::default(),
            streams: BTreeMap::new(),
            wires: HashMap::new(),
            limits,
            events: Vec::new(),
        };
        [GATEWAY, AGENT].into_iter().for_each(|side| assert!(pair.write(side)));
        pair.settle();
        pair
    }

    pub(crate) fn open(&mut self, end: bool) -> Result<u32, OpenError> {
        let open = Open { end, ..request() };
        let number = self.lanes[GATEWAY].open(self.now, &open)?;
        let mut sides: [Side; 2] = Default::default();
        sides[GATEWAY].is_finished = end;
        sides[GATEWAY].has_head = true;
        // There is nothing to take.
        sides[AGENT].took_end = end;
        assert!(self.streams.insert(number, sides).is_none());
        self.take_events(GATEWAY);
        Ok(number)
    }

    /// Returns whether the tasks of this side have the stream.
    pub(crate) fn has(&self, side: usize, number: u32) -> bool {
        side == GATEWAY
            || self
                .events
                .iter()
                .any(|(_, event)| matches!(event, Event::Opened(n, _) if *n == number))
    }

    /// Returns the sides whose tasks have the stream.
    pub(crate) fn sides(&self, number: u32) -> Vec<usize> {
        [GATEWAY, AGENT].into_iter().filter(|side| self.has(*side, number)).collect()
    }

    pub(crate) fn head(&mut self, number: u32, status: u16, end: bool) {
        let head = Head { end, status, source: Source::Upstream, headers: Headers::default() };
        let sent = self.lanes[AGENT].send_head(number, &head);
        let side = self.side(AGENT, number);
        if sent.is_ok() && status != 100 {
            side.has_head = true;
            side.is_finished = end;
        }
        self.take_events(AGENT);
    }

    pub(crate) fn put(&mut self, side: usize, number: u32, length: usize) {
        let model = self.side(side, number);
        if model.is_finished || !model.has_head || length == 0 {
            return;
        }
        let at = model.put;
        let mut bytes = Bytes::from(pattern(side, number, at..at + length));
        match self.lanes[side].put(number, &mut bytes) {
            Ok(()) => {
                let model = self.side(side, number);
                model.put += length - bytes.len();
                model.is_put_waiting = !bytes.is_empty();
            }
            Err(error) => assert!(
                error == SendError::Gone || error == SendError::Stopped,
                "{error:?} of {number}"
            ),
        }
        self.take_events(side);
    }

    pub(crate) fn finish(&mut self, side: usize, number: u32, has_trailers: bool) {
        let model = self.side(side, number);
        if model.is_finished || !model.has_head {
            return;
        }
        let mut block = HeaderBlock::new();
        block.push(b"x-sum", b"1").unwrap();
        let finished = if has_trailers {
            self.lanes[side].finish_with_trailers(number, block.headers())
        } else {
            self.lanes[side].finish(number)
        };
        if finished.is_ok() {
            let model = self.side(side, number);
            (model.is_finished, model.has_trailers) = (true, has_trailers);
        }
        self.take_events(side);
    }

    /// Takes once, and returns whether there was anything.
    pub(crate) fn take(&mut self, side: usize, number: u32) -> bool {
        let taken = self.lanes[side].take(self.now, number);
        let peer = self.side(1 - side, number);
        let (put, is_finished, has_trailers) = (peer.put, peer.is_finished, peer.has_trailers);
        let model = self.side(side, number);
        let is_clean = |trailers| {
            (put, is_finished, has_trailers) == (model.taken, true, trailers) && !model.took_end
        };
        let is_something = match taken {
            Taken::Bytes(chunk) => {
                let bytes = chunk.as_ref();
                assert!(!bytes.is_empty() && !model.took_end && !model.has_stopped);
                let at = model.taken;
                model.taken += bytes.len();
                assert!(
                    bytes == pattern(1 - side, number, at..at + bytes.len()),
                    "bytes of {number}"
                );
                true
            }
            Taken::End => {
                assert!(is_clean(false), "an end that is none of {number}: {model:?}");
                model.took_end = true;
                true
            }
            Taken::Trailers(block) => {
                assert!(is_clean(true), "an end that is none of {number}: {model:?}");
                assert_eq!(block.headers().iter().count(), 1);
                model.took_end = true;
                true
            }
            Taken::Pending => {
                model.is_take_waiting = true;
                false
            }
            Taken::Gone => {
                // Gone without an end is the end that was told, and never a clean one.
                let is_told = model.ends.iter().any(|end| *end != End::Complete);
                assert!(model.took_end || model.has_stopped || is_told, "{number}: {model:?}");
                false
            }
        };
        self.take_events(side);
        is_something
    }

    pub(crate) fn stop(&mut self, side: usize, number: u32) {
        self.lanes[side].stop(number);
        self.side(side, number).has_stopped = true;
        self.take_events(side);
    }

    pub(crate) fn reset(&mut self, side: usize, number: u32, code: Code) {
        self.lanes[side].reset(number, &Reset::new(code));
        self.side(side, number).has_stopped = true;
        self.take_events(side);
    }

    pub(crate) fn side(&mut self, side: usize, number: u32) -> &mut Side {
        &mut self.streams.get_mut(&number).unwrap()[side]
    }

    /// Writes one batch of a side into its connection. Returns whether there was one.
    pub(crate) fn write(&mut self, side: usize) -> bool {
        let mut message = Vec::new();
        let is_something = self.lanes[side].write_batch(self.now, &mut message);
        assert_eq!(is_something, !message.is_empty());
        if is_something {
            let frames: Result<Vec<_>, _> = Frames::new(&message).unwrap().collect();
            let frames = frames.unwrap();
            assert!(message.len() <= BATCH_BYTES_MAX);
            for frame in frames {
                if let Frame::Stream(number, StreamFrame::Data(data)) = frame {
                    let wire = self.wires.entry((side, number)).or_default();
                    wire.sent += data.bytes.len();
                    let credit = self.limits.window as usize + wire.granted;
                    assert!(wire.sent <= credit, "stream {number} exceeds its credit");
                    assert!(data.flag != DataFlag::Blocked || wire.sent == credit);
                }
            }
            self.flying[1 - side].push_back(message);
        }
        self.take_events(side);
        is_something
    }

    /// Delivers one message to a side. Returns whether there was one.
    pub(crate) fn deliver(&mut self, side: usize) -> bool {
        let Some(message) = self.flying[side].pop_front() else { return false };
        for frame in Frames::new(&message).unwrap() {
            if let Frame::Stream(number, StreamFrame::Credit(bytes)) = frame.unwrap() {
                self.wires.entry((side, number)).or_default().granted += bytes as usize;
            }
        }
        self.lanes[side].receive(self.now, &message).unwrap();
        self.take_events(side);
        true
    }

    /// Writes and delivers until nothing is on its way.
    pub(crate) fn settle(&mut self) {
        loop {
            let written = [GATEWAY, AGENT].map(|side| self.write(side));
            let delivered = [GATEWAY, AGENT].map(|side| self.deliver(side));
            if !written.iter().chain(&delivered).any(|is_something| *is_something) {
                break;
            }
        }
    }

    pub(crate) fn lose(&mut self) {
        for side in [GATEWAY, AGENT] {
            self.lanes[side].lost();
            self.flying[side].clear();
            self.take_events(side);
        }
    }

    pub(crate) fn take_events(&mut self, side: usize) {
        while let Some(event) = self.lanes[side].poll() {
            match &event {
                Event::Ended(number, end) => {
                    let model = self.side(side, *number);
                    model.ends.push(end.clone());
                    (model.is_put_waiting, model.is_take_waiting) = (false, false);
                    assert_eq!(model.ends.len(), 1, "the ends of {number}: {:?}", model.ends);
                }
                Event::Answered(number, answer) if answer.end => {
                    self.side(side, *number).took_end = true;
                }
                Event::Stopped(number) => {
                    let model = self.side(side, *number);
                    (model.is_stopped, model.is_put_waiting) = (true, false);
                }
                Event::Readable(number) => self.side(side, *number).is_take_waiting = false,
                Event::Writable(number) => self.side(side, *number).is_put_waiting = false,
                _ => {}
            }
            self.events.push((side, event));
        }
        self.check_memory(side);
    }

    fn check_memory(&self, side: usize) {
        let Self { limits, .. } = self;
        let growth = self.memories[side].growth_bytes();
        assert!(growth <= limits.growth_bytes_max + limits.bytes_max / 2);
        // A window, what is to be sent, one chunk that is not full, and a head.
        let stream = limits.window as usize + (32 << 10) + (16 << 10) + 200;
        let bound = self.lanes[side].streams() * stream + usize::try_from(growth).unwrap();
        let held = self.lanes[side].buffered_bytes();
        assert!(held <= bound, "{held} bytes of {bound}");
    }
}

pub(crate) fn request() -> Open<'static> {
    Open { end: true, ..Open::new(b"GET", b"/") }
}

/// Bytes that a side puts on a stream. No two places near each other look the same.
fn pattern(side: usize, number: u32, range: std::ops::Range<usize>) -> Vec<u8> {
    let key = side + 3 * number as usize;
    range.map(|at| ((at + key) % 251) as u8 ^ (at >> 8) as u8).collect()
}

pub(crate) const GATEWAY: usize = 0;
pub(crate) const AGENT: usize = 1;
