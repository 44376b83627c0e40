//! Order of the frames of one direction of a stream; the same rules judge a peer's frames and the own side's calls.
//! Knows no bytes and no credit.

/// One direction of a stream (§6).
#[derive(Debug)]
pub(crate) struct Direction {
    step: Step,
    /// Whether TRAILERS may end the direction: not of upgraded connections.
    has_trailers: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    /// A head with status 100, or a final one.
    Head,
    /// A final head.
    FinalHead,
    Body,
    Ended,
    /// The receiver wants no more. Frames that crossed its STOP are in order, whatever they are.
    Stopped,
}

/// Frame that may come now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Accepted {
    /// The frame counts.
    Counts,
    /// The receiver of the direction wants no more: the frame is dropped.
    Dropped,
}

/// Frame that may not come now.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct OutOfOrder;

impl Direction {
    /// Returns the direction of a request behind its OPEN.
    pub(crate) const fn request(is_upgrade: bool, end: bool) -> Self {
        Self { step: if end { Step::Ended } else { Step::Body }, has_trailers: !is_upgrade }
    }

    /// Returns the direction of an answer.
    pub(crate) const fn answer() -> Self {
        Self { step: Step::Head, has_trailers: true }
    }

    /// HEAD. The request of the stream may be one for an upgrade.
    pub(crate) const fn head(
        &mut self,
        status: u16,
        end: bool,
        is_upgrade: bool,
    ) -> Result<Accepted, OutOfOrder> {
        match self.step {
            Step::Stopped => return Ok(Accepted::Dropped),
            Step::Head if status == 100 => self.step = Step::FinalHead,
            Step::Head | Step::FinalHead if status != 100 && (status != 101 || is_upgrade) => {
                self.step = if end { Step::Ended } else { Step::Body };
                self.has_trailers = status != 101;
            }
            _ => return Err(OutOfOrder),
        }
        Ok(Accepted::Counts)
    }

    /// DATA, with END or without.
    pub(crate) const fn data(&mut self, end: bool) -> Result<Accepted, OutOfOrder> {
        match self.step {
            Step::Stopped => return Ok(Accepted::Dropped),
            Step::Body if end => self.step = Step::Ended,
            Step::Body => {}
            _ => return Err(OutOfOrder),
        }
        Ok(Accepted::Counts)
    }

    /// TRAILERS.
    pub(crate) const fn trailers(&mut self) -> Result<Accepted, OutOfOrder> {
        match self.step {
            Step::Body if !self.has_trailers => Err(OutOfOrder),
            _ => self.data(true),
        }
    }

    /// STOP of the receiver.
    pub(crate) const fn stop(&mut self) {
        self.step = Step::Stopped;
    }

    /// Returns whether nothing more comes that counts.
    pub(crate) const fn is_ended(&self) -> bool {
        matches!(self.step, Step::Ended | Step::Stopped)
    }

    /// Returns whether a final head went by.
    pub(crate) const fn has_head(&self) -> bool {
        matches!(self.step, Step::Body | Step::Ended)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, Clone, Copy)]
    enum Is {
        Head(u16, bool),
        Data(bool),
        Trailers,
        Stop,
    }

    /// Returns the accepted frames, and whether the direction has ended.
    fn run(mut direction: Direction, is_upgrade: bool, frames: &[Is]) -> (usize, bool) {
        let mut accepted = 0;
        for frame in frames {
            let read = match *frame {
                Is::Head(status, end) => direction.head(status, end, is_upgrade),
                Is::Data(end) => direction.data(end),
                Is::Trailers => direction.trailers(),
                Is::Stop => {
                    direction.stop();
                    Ok(Accepted::Dropped)
                }
            };
            if read.is_err() {
                break;
            }
            accepted += 1;
        }
        (accepted, direction.is_ended())
    }

    #[test]
    fn a_request_has_a_body_and_one_end() {
        use Is::{Data, Head, Stop, Trailers};
        for (is_upgrade, end, frames, expected) in [
            (false, false, &[Data(false), Data(true)][..], (2, true)),
            (false, false, &[Data(false), Trailers], (2, true)),
            (false, false, &[Data(true), Data(false)], (1, true)),
            (false, false, &[Trailers, Trailers], (1, true)),
            (false, true, &[Data(true)], (0, true)),
            (false, false, &[Head(200, false)], (0, false)),
            (true, false, &[Data(false), Trailers], (1, false)),
            (false, false, &[Stop, Data(true), Data(false), Trailers], (4, true)),
        ] {
            let request = Direction::request(is_upgrade, end);
            assert_eq!(run(request, is_upgrade, frames), expected, "{frames:?}");
        }
    }

    #[test]
    fn an_answer_has_its_heads_first() {
        use Is::{Data, Head, Stop, Trailers};
        for (is_upgrade, frames, expected) in [
            (false, &[Data(false)][..], (0, false)),
            (false, &[Trailers], (0, false)),
            (false, &[Head(200, true), Data(true)], (1, true)),
            (false, &[Head(100, false), Head(100, false)], (1, false)),
            (false, &[Head(100, false), Data(true)], (1, false)),
            (false, &[Head(100, false), Head(404, false), Data(true)], (3, true)),
            (false, &[Head(200, false), Head(100, false)], (1, false)),
            (false, &[Head(200, false), Trailers], (2, true)),
            (false, &[Head(101, false)], (0, false)),
            (true, &[Head(101, false), Data(false), Data(true)], (3, true)),
            (true, &[Head(101, false), Trailers], (1, false)),
            (true, &[Head(403, false), Trailers], (2, true)),
            (false, &[Stop, Head(200, false), Data(true)], (3, true)),
        ] {
            assert_eq!(run(Direction::answer(), is_upgrade, frames), expected, "{frames:?}");
        }
    }
}
