//! The sender's side of one direction of a stream: bytes that wait for the writer, and credit. Knows no order of frames.

use std::{collections::VecDeque, mem};

use bytes::{Bytes, BytesMut};

use crate::tunnel::{DATA_BYTES_MAX, frame::DataFlag};

/// Bytes of a stream that wait for the writer, within the credit of their receiver (§5).
///
/// Bound: [`QUEUE_BYTES_MAX`]. Small pieces are copied into one, so that no line of 20 bytes keeps a buffer of 32 KiB.
#[derive(Debug)]
pub(crate) struct Sending {
    pieces: VecDeque<Bytes>,
    /// Small pieces behind `pieces`.
    small: BytesMut,
    len: usize,
    /// Credit that is left, that of the waiting bytes included.
    credit: u64,
    /// Whether the producer has more than it could put.
    has_more: bool,
    /// Whether the receiver knows that the sender waits for this credit.
    is_blocked_told: bool,
    end: End,
}

/// End of a direction, as far as it got.
#[derive(Debug)]
enum End {
    /// The producer may put more.
    Open,
    /// END goes behind the waiting bytes.
    Wanted,
    /// These whole frames, TRAILERS, go behind the waiting bytes.
    Trailers(Vec<u8>),
    /// The end is written, or the receiver wants no more.
    Over,
}

/// More credit was granted than one direction may have.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct CreditOverflow;

impl Sending {
    pub(crate) fn new(window: u32) -> Self {
        Self {
            pieces: VecDeque::new(),
            small: BytesMut::new(),
            len: 0,
            credit: window.into(),
            has_more: false,
            is_blocked_told: false,
            end: End::Open,
        }
    }

    /// Adds credit. Returns whether the producer waits for it.
    pub(crate) fn credit(&mut self, bytes: u32) -> Result<bool, CreditOverflow> {
        self.credit += u64::from(bytes);
        if self.credit > super::WINDOW_MAX.into() {
            return Err(CreditOverflow);
        }
        self.is_blocked_told = false;
        Ok(self.wakes_producer())
    }

    /// Takes as many bytes from the front of `bytes` as there is credit and room for. Where a rest stays, the producer
    /// is woken later.
    pub(crate) fn put(&mut self, bytes: &mut Bytes) {
        let piece = bytes.split_to(bytes.len().min(self.room()));
        self.has_more = !bytes.is_empty();
        self.len += piece.len();
        if piece.len() < PIECE_BYTES_MIN {
            self.small.extend_from_slice(&piece);
            return;
        }
        if !self.small.is_empty() {
            self.pieces.push_back(mem::take(&mut self.small).freeze());
        }
        self.pieces.push_back(piece);
    }

    /// Bytes that the producer may put now.
    fn room(&self) -> usize {
        let credit = usize::try_from(self.credit).unwrap_or(usize::MAX);
        (credit - self.len).min(QUEUE_BYTES_MAX - self.len)
    }

    /// Returns whether the producer waits and now can put bytes, and notes that it was told.
    pub(crate) fn wakes_producer(&mut self) -> bool {
        self.has_more && self.room() > 0 && mem::take(&mut self.has_more)
    }

    /// END goes behind the waiting bytes.
    pub(crate) fn finish(&mut self) {
        self.end = End::Wanted;
    }

    /// TRAILERS go behind the waiting bytes, as whole frames.
    pub(crate) fn finish_with_trailers(&mut self, frames: Vec<u8>) {
        self.end = End::Trailers(frames);
    }

    /// Forgets the waiting bytes: the receiver wants no more, or END went with a head.
    pub(crate) fn close(&mut self) {
        *self = Self { end: End::Over, ..Self::new(0) };
    }

    pub(crate) const fn is_over(&self) -> bool {
        matches!(self.end, End::Over)
    }

    /// Bytes that wait for the writer.
    pub(crate) const fn len(&self) -> usize {
        self.len
    }

    /// Returns whether bytes wait, or the producer waits for credit.
    pub(crate) const fn is_waiting(&self) -> bool {
        self.len > 0 || self.has_more
    }

    /// Returns the frame to be written next.
    pub(crate) fn next(&self) -> Option<Next> {
        let length = self.len.min(DATA_BYTES_MAX);
        let is_last = length == self.len;
        let is_blocked = self.has_more && self.credit == length as u64 && !self.is_blocked_told;
        match self.end {
            End::Wanted if is_last => Some(Next::Data(length, DataFlag::End)),
            End::Open if is_last && is_blocked => Some(Next::Data(length, DataFlag::Blocked)),
            _ if length > 0 => Some(Next::Data(length, DataFlag::None)),
            End::Trailers(ref frame) => Some(Next::Trailers(frame.len())),
            _ => None,
        }
    }

    /// Appends what [`Self::next`] returned, without the header of DATA.
    pub(crate) fn write(&mut self, next: Next, out: &mut Vec<u8>) {
        match next {
            Next::Data(length, flag) => {
                self.write_bytes(length, out);
                match flag {
                    DataFlag::None => {}
                    DataFlag::End => self.close(),
                    DataFlag::Blocked => self.is_blocked_told = true,
                }
            }
            Next::Trailers(_) => {
                if let End::Trailers(frame) = &self.end {
                    out.extend_from_slice(frame);
                }
                self.close();
            }
        }
    }

    fn write_bytes(&mut self, length: usize, out: &mut Vec<u8>) {
        self.len -= length;
        self.credit -= length as u64;
        let mut wanted = length;
        while let Some(piece) = self.pieces.front_mut().filter(|_| wanted > 0) {
            let part = piece.split_to(piece.len().min(wanted));
            wanted -= part.len();
            out.extend_from_slice(&part);
            if piece.is_empty() {
                self.pieces.pop_front();
            }
        }
        out.extend_from_slice(&self.small.split_to(wanted));
    }
}

/// Frame that a stream has for the writer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Next {
    /// DATA with so many bytes.
    Data(usize, DataFlag),
    /// TRAILERS, which have so many bytes with their header.
    Trailers(usize),
}

/// Upper bound of the bytes that wait for the writer.
pub(crate) const QUEUE_BYTES_MAX: usize = 32 << 10;

/// Size of the smallest piece that is kept as it came, in bytes.
const PIECE_BYTES_MIN: usize = 4 << 10;

#[cfg(test)]
mod tests {
    use super::*;

    fn put(sending: &mut Sending, length: usize) -> usize {
        let mut bytes = Bytes::from(vec![7; length]);
        sending.put(&mut bytes);
        length - bytes.len()
    }

    fn write(sending: &mut Sending) -> Option<Next> {
        let next = sending.next()?;
        let mut out = Vec::new();
        sending.write(next, &mut out);
        if let Next::Data(length, _) = next {
            assert_eq!(out.len(), length);
        }
        Some(next)
    }

    #[test]
    fn a_producer_puts_what_there_is_credit_and_room_for() {
        let mut sending = Sending::new(100);
        assert_eq!(put(&mut sending, 60), 60);
        assert_eq!(put(&mut sending, 60), 40);
        assert_eq!(sending.credit(50), Ok(true));
        assert_eq!(put(&mut sending, 50), 50);
        let mut rich = Sending::new(1 << 20);
        assert_eq!(put(&mut rich, 100_000), QUEUE_BYTES_MAX);
        assert!(!rich.wakes_producer());
        write(&mut rich).unwrap();
        assert!(rich.wakes_producer() && !rich.wakes_producer());
        assert_eq!(rich.credit(u32::MAX >> 1), Err(CreditOverflow));
    }

    #[test]
    fn the_last_frame_within_the_credit_says_that_more_waits() {
        let mut sending = Sending::new(20_000);
        put(&mut sending, 30_000);
        assert_eq!(write(&mut sending), Some(Next::Data(DATA_BYTES_MAX, DataFlag::None)));
        assert_eq!(write(&mut sending), Some(Next::Data(3616, DataFlag::Blocked)));
        assert_eq!(write(&mut sending), None);
        // Once for each credit.
        assert_eq!((put(&mut sending, 1), sending.next()), (0, None));
        assert_eq!(sending.credit(1), Ok(true));
        assert_eq!(put(&mut sending, 1), 1);
        assert_eq!(write(&mut sending), Some(Next::Data(1, DataFlag::None)));
        // More came behind the frame that used the credit up.
        assert_eq!(put(&mut sending, 1), 0);
        assert_eq!(write(&mut sending), Some(Next::Data(0, DataFlag::Blocked)));
        assert_eq!(write(&mut sending), None);
    }

    #[test]
    fn the_end_goes_with_the_last_bytes() {
        let mut sending = Sending::new(40_000);
        put(&mut sending, 20_000);
        sending.finish();
        assert_eq!(write(&mut sending), Some(Next::Data(DATA_BYTES_MAX, DataFlag::None)));
        assert!(!sending.is_over());
        assert_eq!(write(&mut sending), Some(Next::Data(3616, DataFlag::End)));
        assert!(sending.is_over() && sending.next().is_none());

        let mut empty = Sending::new(40_000);
        empty.finish();
        assert_eq!(write(&mut empty), Some(Next::Data(0, DataFlag::End)));

        let mut trailers = Sending::new(40_000);
        put(&mut trailers, 10);
        trailers.finish_with_trailers(vec![1; 9]);
        assert_eq!(write(&mut trailers), Some(Next::Data(10, DataFlag::None)));
        assert_eq!(write(&mut trailers), Some(Next::Trailers(9)));
        assert!(trailers.is_over());
    }

    #[test]
    fn small_and_large_pieces_keep_their_order_in_few_buffers() {
        let (mut sending, mut sent) = (Sending::new(1 << 20), Vec::new());
        for round in 0..200u8 {
            let length = if round % 50 == 49 { 4096 } else { 20 };
            let mut bytes = Bytes::from(vec![round; length]);
            sent.extend_from_slice(&bytes);
            sending.put(&mut bytes);
            assert!(bytes.is_empty());
        }
        assert!(sending.pieces.len() <= 8);
        let mut out = Vec::new();
        while let Some(next) = sending.next() {
            sending.write(next, &mut out);
        }
        assert_eq!(out, sent);
    }
}
