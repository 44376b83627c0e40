//! Reads replies: the outcome of a request and, from refusals, the state of the server.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use wsproxy_conn::clock::{self, Micros};
use wsproxy_proto::history::Position;

use crate::{
    bus::publish::Outcome,
    redis::{
        fault::tell,
        resp::{Reply, RespValue},
    },
    store::{command::StoreError, not_done::NotDone},
    telemetry::throttle::Throttle,
};

/// Returns the outcome of a publish.
pub(super) fn outcome_of(value: &RespValue<'_>) -> Outcome {
    match value {
        RespValue::Integer(count @ 0..) => Outcome::Received(count.unsigned_abs()),
        RespValue::Integer(_) => Outcome::Kept,
        RespValue::Array(answer) => stored(answer).unwrap_or(Outcome::Lost),
        RespValue::Error(error) => not_done(error).map_or(Outcome::Lost, Outcome::Refused),
        _ => Outcome::Lost,
    }
}

/// Reads the outcome of a publish with history: receivers, id, and whether it is a duplicate.
fn stored(answer: &[RespValue<'_>]) -> Option<Outcome> {
    let [RespValue::Integer(receivers), RespValue::Text(id), RespValue::Integer(duplicate)] =
        answer
    else {
        return None;
    };
    Some(Outcome::Stored {
        receivers: receivers.unsigned_abs(),
        id: Position::parse(id)?,
        duplicate: *duplicate != 0,
    })
}

/// Returns the result of a command of the store.
pub(super) fn reply_of(value: &RespValue<'_>) -> Result<Reply, StoreError> {
    let RespValue::Error(error) = value else { return Ok(Reply::from(value)) };
    Err(match not_done(error) {
        None | Some(NotDone::Other) => StoreError::Refused(tell(error)),
        Some(refusal) => StoreError::NotDone { refusal, error: tell(error) },
    })
}

/// Returns the reason why the server certainly did not do a request.
pub(super) fn refusal_of(value: &RespValue<'_>) -> Option<NotDone> {
    match value {
        RespValue::Error(error) => not_done(error),
        _ => None,
    }
}

/// Tells from the latest answers whether the server takes writes.
#[derive(Default)]
pub(super) struct Writes {
    /// The number of the refusal plus 1; 0: writes are taken.
    refusal: AtomicU64,
    /// Time of the latest refusal.
    said_at: AtomicU64,
    refused: Throttle,
    accepted: Throttle,
}

impl Writes {
    /// Notes the answer to a request that the server refuses while it takes no writes.
    pub(super) fn answered(&self, refusal: Option<NotDone>) {
        match refusal {
            None => self.accept(),
            Some(why @ (NotDone::Memory | NotDone::Replicas | NotDone::Disk | NotDone::Busy)) => {
                self.refuse(why)
            }
            // A wrong key or user says nothing about others.
            Some(_) => {}
        }
    }

    /// Returns the reason why the server takes no writes. A refusal that is not repeated is forgotten after
    /// `forget_after`.
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
        // The usual case, without a write to memory that other threads read.
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

/// Reads an error of the server; `None` if the request may have been done in part.
pub(super) fn not_done(error: &[u8]) -> Option<NotDone> {
    let (error, is_from_script) = unwrapped(error);
    let code = error.split(|byte| *byte == b' ').next().unwrap_or_default();
    Some(match code {
        // For these a server refuses a script's first write, never a later one.
        b"OOM" => NotDone::Memory,
        b"NOREPLICAS" => NotDone::Replicas,
        b"MISCONF" => NotDone::Disk,
        b"READONLY" => NotDone::ReadOnly,
        b"LOADING" | b"BUSY" | b"MASTERDOWN" | b"TRYAGAIN" | b"CLUSTERDOWN" | b"MOVED" | b"ASK" => {
            NotDone::Busy
        }
        b"NOSCRIPT" => NotDone::Script,
        // The scripts read a key before they write anything.
        b"WRONGTYPE" => NotDone::WrongType,
        // An ACL may allow the first command of a script and deny the next one.
        _ if is_from_script => return None,
        b"NOPERM" | b"NOAUTH" => NotDone::Permission,
        _ => NotDone::Other,
    })
}

/// Returns the error without the words that Redis before 7 puts in front when it stops a script, and whether it
/// stopped one.
fn unwrapped(error: &[u8]) -> (&[u8], bool) {
    const SOURCE: &[u8] = b"@user_script:";
    let starts_with = |at: usize, what: &[u8]| error[at..].starts_with(what);
    // `ERR Error running script (call to f_…): @user_script:12: -OOM command not allowed …`
    if starts_with(0, b"ERR Error running script") {
        let source = (0..error.len()).rev().find(|at| starts_with(*at, SOURCE));
        let rest = source.map_or(error, |at| &error[at + SOURCE.len()..]);
        let line = |byte: &u8| byte.is_ascii_digit() || matches!(byte, b':' | b' ' | b'-');
        let from = rest.iter().position(|byte| !line(byte)).unwrap_or(rest.len());
        return (&rest[from..], true);
    }
    // `OOM command not allowed … script: <sha>, on @user_script:12.`
    (error, error.windows(SOURCE.len()).any(|part| part == SOURCE))
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_secs(60);

    #[test]
    fn a_refusal_lasts_until_a_write_succeeds_or_it_expires() {
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

    #[test]
    fn errors_say_why_nothing_was_done() {
        for (error, refusal) in [
            ("OOM command not allowed when used memory > 'maxmemory'.", NotDone::Memory),
            ("NOREPLICAS Not enough good replicas to write.", NotDone::Replicas),
            ("MISCONF Redis is configured to save RDB snapshots", NotDone::Disk),
            ("READONLY You can't write against a read only replica.", NotDone::ReadOnly),
            ("LOADING Redis is loading the dataset in memory", NotDone::Busy),
            ("BUSY Redis is busy running a script.", NotDone::Busy),
            ("NOSCRIPT No matching script. Please use EVAL.", NotDone::Script),
            ("NOPERM this user has no permissions", NotDone::Permission),
            ("WRONGTYPE Operation against a key", NotDone::WrongType),
            ("ERR something new", NotDone::Other),
            ("", NotDone::Other),
        ] {
            assert_eq!(not_done(error.as_bytes()), Some(refusal), "{error}");
        }
    }

    #[test]
    fn errors_in_the_middle_of_a_script_are_recognised() {
        let old = "ERR Error running script (call to f_ab12): @user_script:42: ";
        let new = " script: ab12, on @user_script:42.";
        for (code, refusal) in [
            ("OOM command not allowed", Some(NotDone::Memory)),
            ("READONLY You can't write", Some(NotDone::ReadOnly)),
            ("MISCONF Errors writing to the AOF file", Some(NotDone::Disk)),
            ("WRONGTYPE Operation against a key", Some(NotDone::WrongType)),
            // A script may have written before these errors.
            ("NOPERM ACL failure in script", None),
            ("ERR attempt to compare number with nil", None),
        ] {
            for error in
                [format!("{old}{code}"), format!("{old}-{code}\r\n"), format!("{code}{new}")]
            {
                assert_eq!(not_done(error.as_bytes()), refusal, "{error}");
            }
        }
    }
}
