//! What a reply of the server says about the request, and what refusals say about the server.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use wsproxy_conn::clock::{self, Micros};
use wsproxy_proto::history::Position;

use crate::{
    bus::{
        Outcome,
        not_done::NotDone,
        redis::{
            fault::tell,
            resp::{Reply, Value},
        },
    },
    store::StoreError,
    telemetry::throttle::Throttle,
};

/// What became of a publish.
pub(super) fn outcome_of(value: &Value<'_>) -> Outcome {
    match value {
        Value::Integer(count @ 0..) => Outcome::Received(count.unsigned_abs()),
        Value::Integer(_) => Outcome::Kept,
        Value::Array(answer) => stored(answer).unwrap_or(Outcome::Lost),
        Value::Error(error) => NotDone::of(error).map_or(Outcome::Lost, Outcome::Refused),
        _ => Outcome::Lost,
    }
}

/// Receivers, id, and whether it is a duplicate.
fn stored(answer: &[Value<'_>]) -> Option<Outcome> {
    let [Value::Integer(receivers), Value::Text(id), Value::Integer(duplicate)] = answer else {
        return None;
    };
    Some(Outcome::Stored {
        receivers: receivers.unsigned_abs(),
        id: Position::parse(id)?,
        duplicate: *duplicate != 0,
    })
}

/// What became of a command of the store.
pub(super) fn reply_of(value: &Value<'_>) -> Result<Reply, StoreError> {
    let Value::Error(error) = value else { return Ok(Reply::from(value)) };
    Err(match NotDone::of(error) {
        None | Some(NotDone::Other) => StoreError::Refused(tell(error)),
        Some(refusal) => StoreError::NotDone { refusal, error: tell(error) },
    })
}

/// The reason why the server did not do it, where it certainly did not.
pub(super) fn refusal_of(value: &Value<'_>) -> Option<NotDone> {
    match value {
        Value::Error(error) => NotDone::of(error),
        _ => None,
    }
}

/// Whether the server takes writes, as far as the latest answers tell.
#[derive(Default)]
pub(super) struct Writes {
    /// The number of the refusal and 1; 0: writes are taken.
    refusal: AtomicU64,
    /// When it was said last.
    said_at: AtomicU64,
    refused: Throttle,
    accepted: Throttle,
}

impl Writes {
    /// The server answered to something that it refuses while it takes no writes.
    pub(super) fn answered(&self, refusal: Option<NotDone>) {
        match refusal {
            None => self.accept(),
            Some(why @ (NotDone::Memory | NotDone::Replicas | NotDone::Disk | NotDone::Busy)) => {
                self.refuse(why)
            }
            // A key or a user that is not as it should be says nothing about others.
            Some(_) => {}
        }
    }

    /// Why the server takes no writes. Unless it is said again, that is forgotten after `forget_after`.
    pub(super) fn refusal(&self, forget_after: Duration) -> Option<NotDone> {
        let number = self.refusal.load(Ordering::Acquire).checked_sub(1)?;
        let said_at = Micros(self.said_at.load(Ordering::Acquire));
        if clock::now().since(said_at) > forget_after.into() {
            return None;
        }
        NotDone::ALL.get(usize::try_from(number).ok()?).copied()
    }

    fn refuse(&self, why: NotDone) {
        self.said_at.store(clock::now().0, Ordering::Release);
        let number = why as u64 + 1;
        if self.refusal.swap(number, Ordering::AcqRel) != number
            && let Some(left_out) = self.refused.pass()
        {
            tracing::warn!(reason = why.label(), left_out, "Redis takes no writes now.");
        }
    }

    fn accept(&self) {
        // Nearly always so: hence no write to memory that other threads read.
        if self.refusal.load(Ordering::Acquire) == 0 {
            return;
        }
        if self.refusal.swap(0, Ordering::AcqRel) != 0
            && let Some(left_out) = self.accepted.pass()
        {
            tracing::info!(left_out, "Redis takes writes again.");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_secs(60);

    #[test]
    fn a_refusal_lasts_until_a_write_is_taken_or_nobody_says_it_any_more() {
        let writes = Writes::default();
        assert_eq!(writes.refusal(LONG), None);
        writes.answered(Some(NotDone::WrongType));
        assert_eq!(writes.refusal(LONG), None);
        writes.answered(Some(NotDone::Memory));
        writes.answered(Some(NotDone::Replicas));
        writes.answered(Some(NotDone::Permission));
        assert_eq!(writes.refusal(LONG), Some(NotDone::Replicas));
        std::thread::sleep(Duration::from_millis(2));
        assert_eq!(writes.refusal(Duration::ZERO), None);
        writes.answered(None);
        assert_eq!(writes.refusal(LONG), None);
    }
}
