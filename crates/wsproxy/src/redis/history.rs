//! Histories and token streams on Redis: calls of the scripts, and their answers.

use std::{sync::Arc, time::Duration};

use futures_util::future::try_join_all;
use wsproxy_proto::{
    history::{After, Entry, Log, Position, Resolved, Snapshot},
    names::{Id, Names},
};

use crate::{
    redis::{
        reply::{array, bytes, odd_reply, parts, unsigned},
        resp::Reply,
        script::{self, EXACT_MAX},
        store::RedisStore,
        words::{Words, milliseconds},
    },
    store::{
        command::{PAGE_BYTES_MAX, STREAMS_BYTES_MAX, SnapshotOf, StoreError},
        token_streams::{
            StreamCommand, StreamError, StreamHead, StreamOp, StreamOutcome, StreamState,
        },
    },
};

impl RedisStore {
    pub(crate) async fn snapshot(
        &self,
        of: &SnapshotOf,
    ) -> Result<(Snapshot, Vec<StreamState>), StoreError> {
        let mut words = Words::default();
        words.number((of.logs.len() + usize::from(of.clock.is_some())) as u64);
        of.logs.iter().chain(&of.clock).for_each(|key| words.text(key));
        words.number(of.logs.len() as u64);
        match &of.after {
            None => words.texts(&["", ""]),
            Some(After::Position(after)) => words.texts(&[&reachable(*after).to_string(), ""]),
            Some(After::Event(id)) => words.texts(&["", id]),
        }
        words.number((of.entries_max as u64).clamp(1, EXACT_MAX));
        words.number(PAGE_BYTES_MAX as u64);
        let head_ms = of.head_ttl.map(|ttl| milliseconds(ttl).to_string());
        words.text(head_ms.as_deref().unwrap_or_default());
        let streams_bytes = of.streams_of.is_some().then(|| STREAMS_BYTES_MAX.to_string());
        words.text(streams_bytes.as_deref().unwrap_or_default());
        let reply = self.0.run(&script::READ, &words.slices()).await?;
        snapshot(reply, of).ok_or_else(odd_reply)
    }

    pub(crate) async fn stream(&self, command: &StreamCommand) -> Result<StreamHead, StreamError> {
        let StreamCommand { session, stream, op, .. } = command;
        let member = Names::stream_lease(session, stream);
        // Leases have another slot. A lease that is noted too early costs one needless look.
        if let StreamOp::Open { lease, .. } | StreamOp::Renew { lease } = op {
            self.note_lease(&member, *lease).await?;
        }
        let done = self.0.run(&script::STREAM, &self.stream_words(command).slices()).await;
        let answer = match done {
            Ok(Reply::Array(answer)) => answer,
            Ok(_) => return Err(odd_reply().into()),
            Err(StoreError::Refused(why)) => {
                let (error, detail) = stream_error(why);
                if error == StreamError::LeaseRuns {
                    self.correct_lease(&member, &detail).await?;
                }
                return Err(error);
            }
            Err(error) => return Err(error.into()),
        };
        if matches!(op, StreamOp::End { .. } | StreamOp::Lost) {
            self.forget_lease(member.as_bytes()).await?;
        }
        match &answer[..] {
            [Reply::Integer(seq), Reply::Text(id)] => {
                let id = Position::parse(id).ok_or_else(odd_reply)?;
                Ok(StreamHead { seq: seq.unsigned_abs(), id })
            }
            _ => Err(odd_reply().into()),
        }
    }

    fn stream_words(&self, command: &StreamCommand) -> Words {
        let names = self.0.names();
        let StreamCommand { session, stream, op, limits } = command;
        let channel = names.session_down(session);
        let mut words = Words::default();
        words.number(4);
        words.text(&names.log(&channel));
        words.text(&names.token_stream(session, stream));
        words.text(&names.token_stream_text(session, stream));
        words.text(&names.session_streams(session));
        words.text(op.name());
        words.texts(&[&channel, stream.as_str()]);
        words.number(limits.entries_max.clamp(1, EXACT_MAX));
        words.number(limits.bytes_max.min(EXACT_MAX));
        words.number(milliseconds(limits.ttl));
        words.number(milliseconds(op.lease().unwrap_or(Duration::ZERO)));
        match op {
            StreamOp::Open { meta, .. } => words.bytes(meta),
            StreamOp::Append { text, seq, .. } => {
                words.bytes(text);
                words.text(&seq.map_or_else(String::new, |seq| seq.to_string()));
            }
            StreamOp::End { outcome, error } => {
                words.text(outcome.label());
                words.bytes(error);
            }
            StreamOp::Renew { .. } | StreamOp::Lost => {}
        }
        words
    }

    /// Notes the end of a lease, in milliseconds, after its worker has renewed it: only the stream has that time.
    async fn correct_lease(&self, member: &str, ends: &str) -> Result<(), StoreError> {
        let leases = self.0.names().stream_leases();
        let words = [b"ZADD", leases.as_bytes(), b"XX", ends.as_bytes(), member.as_bytes()];
        self.0.command(&words).await.map(drop)
    }

    async fn note_lease(&self, member: &str, lease: Duration) -> Result<(), StoreError> {
        let leases = self.0.names().stream_leases();
        let lease = milliseconds(lease).to_string();
        self.0.eval(NOTE_LEASE, &leases, [&lease, member]).await.map(drop)
    }

    pub(crate) async fn keep_heads(
        &self,
        logs: &[Arc<str>],
        ttl: Duration,
    ) -> Result<Vec<bool>, StoreError> {
        let ttl = milliseconds(ttl).to_string();
        let mut kept = Vec::with_capacity(logs.len());
        for logs in logs.chunks(KEPT_AT_ONCE) {
            let keep = async |log: &Arc<str>| {
                let head = Names::head(log);
                let words: [&[u8]; 3] = [b"PEXPIRE", head.as_bytes(), ttl.as_bytes()];
                self.0.command(&words).await
            };
            for reply in try_join_all(logs.iter().map(keep)).await? {
                kept.push(reply == Reply::Integer(1));
            }
        }
        Ok(kept)
    }

    pub(crate) async fn lapsed_streams(&self, count: usize) -> Result<Vec<(Id, Id)>, StoreError> {
        let leases = self.0.names().stream_leases();
        let lapsed = self.0.eval(LAPSED, &leases, [count.to_string()]).await?;
        let Reply::Array(members) = lapsed else { return Err(odd_reply()) };
        let mut lapsed = Vec::new();
        for member in &members {
            let Reply::Text(member) = member else { continue };
            match Names::parse_stream_lease(member) {
                Some(stream) => lapsed.push(stream),
                // No gateway added this member, and many of them would hide leases. If Redis refuses to remove
                // it now, the others are still returned.
                None => drop(self.forget_lease(member).await),
            }
        }
        Ok(lapsed)
    }

    /// Removes a lease that belongs to no stream.
    pub(crate) async fn forget_lease(&self, member: &[u8]) -> Result<(), StoreError> {
        let leases = self.0.names().stream_leases();
        self.0.command(&[b"ZREM", leases.as_bytes(), member]).await.map(drop)
    }
}

/// Reads an error of the stream's script: its code, and the word after it.
fn stream_error(why: String) -> (StreamError, String) {
    // Redis before 7 puts a generic `ERR` in front of it.
    let words = why.strip_prefix("ERR ").unwrap_or(&why);
    let mut words = words.split([' ', ':']).filter(|word| !word.is_empty());
    let (code, detail) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let error = match code {
        "NOSTREAM" => Some(StreamError::NotFound),
        "EXISTS" => Some(StreamError::Exists),
        "ENDED" => StreamOutcome::of(detail).map(StreamError::Ended),
        "SEQ" => detail.parse().ok().map(|last| StreamError::WrongSeq { last }),
        "TOOLARGE" => Some(StreamError::TooLarge),
        "BADJSON" => Some(StreamError::BadJson),
        "ALIVE" => Some(StreamError::LeaseRuns),
        _ => None,
    };
    let detail = detail.to_owned();
    (error.unwrap_or(StreamError::Store(StoreError::Refused(why))), detail)
}

/// Returns a position that Redis accepts: it refuses to read behind the very last one, where no entry can be.
fn reachable(after: Position) -> Position {
    match after.sequence {
        u64::MAX if after.milliseconds == u64::MAX => Position { sequence: u64::MAX - 1, ..after },
        _ => after,
    }
}

fn snapshot(reply: Reply, of: &SnapshotOf) -> Option<(Snapshot, Vec<StreamState>)> {
    let [now, moment, after, known, logs, streams] = parts(reply)?;
    let logs = array(logs)?.into_iter().map(log).collect::<Option<Vec<_>>>()?;
    let streams = array(streams)?.into_iter().map(stream).collect::<Option<_>>()?;
    let after = match &bytes(after)?[..] {
        b"" => Resolved::Nothing,
        b"?" => Resolved::Ambiguous,
        position => Resolved::At(Position::parse(position)?),
    };
    // A clock without a value gives no position; then there is no entry either.
    let moment = match &bytes(moment)?[..] {
        b"" => (u64::MAX, u64::MAX),
        moment => Position::parse_id(moment)?,
    };
    let (now_ms, known) = (unsigned(&now)?, unsigned(&known)? != 0);
    (logs.len() == of.logs.len())
        .then_some((Snapshot { now_ms, moment, after, known, logs }, streams))
}

fn log(reply: Reply) -> Option<Log> {
    let [head, is_new, is_from_start, is_private, complete, entries] = parts(reply)?;
    let head = Position::parse(&bytes(head)?);
    let mut words = array(entries)?.into_iter();
    let mut entries = Vec::with_capacity(words.len() / 4);
    while let Some(id) = words.next() {
        let (id, prev) = (Position::parse(&bytes(id)?)?, bytes(words.next()?)?);
        let (event_id, data) = (bytes(words.next()?)?, bytes(words.next()?)?);
        let event_id = (!event_id.is_empty()).then(|| String::from_utf8_lossy(&event_id).into());
        entries.push(Entry { id, prev: position_or_broken(&prev), event_id, data });
    }
    let [is_new, is_from_start, is_private, complete] =
        [is_new, is_from_start, is_private, complete].map(|flag| unsigned(&flag));
    Some(Log {
        head,
        is_new: is_new? != 0,
        is_from_start: is_from_start? != 0,
        is_private: is_private? != 0,
        entries,
        complete: complete? != 0,
    })
}

/// Reads the position before an entry; an entry that the scripts did not write counts as behind a gap.
fn position_or_broken(prev: &[u8]) -> Position {
    let broken = Position { milliseconds: u64::MAX, sequence: u64::MAX, tag: u32::MAX };
    Position::parse(prev).unwrap_or(broken)
}

fn stream(reply: Reply) -> Option<StreamState> {
    let [stream, state, seq, content, meta, error] = parts(reply)?;
    let utf8 = |reply| Some(String::from_utf8_lossy(&bytes(reply)?).into());
    Some(StreamState {
        stream: utf8(stream)?,
        state: utf8(state)?,
        seq: unsigned(&seq)?,
        text: bytes(content)?,
        meta: bytes(meta)?,
        error: bytes(error)?,
    })
}

/// Heads whose time to live is renewed at a time.
const KEPT_AT_ONCE: usize = 256;

/// Notes the end of a lease by the clock of the server.
const NOTE_LEASE: &str = "\
local t=redis.call('TIME') \
return redis.call('ZADD',KEYS[1],t[1]*1000+math.floor(t[2]/1000)+ARGV[1],ARGV[2])";

/// Returns leases that have run out by the clock of the server.
const LAPSED: &str = "\
local t=redis.call('TIME') \
return redis.call('ZRANGEBYSCORE',KEYS[1],'-inf',t[1]*1000+math.floor(t[2]/1000),'LIMIT',0,ARGV[1])";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_of_the_stream_script_are_read() {
        for (why, error, detail) in [
            ("NOSTREAM there is no stream with this id", StreamError::NotFound, "there"),
            ("ERR ENDED finish", StreamError::Ended(StreamOutcome::Finish), "finish"),
            ("ENDED: cancelled", StreamError::Ended(StreamOutcome::Cancelled), "cancelled"),
            ("SEQ 12", StreamError::WrongSeq { last: 12 }, "12"),
            ("EXISTS there is a stream with this id", StreamError::Exists, "there"),
            ("TOOLARGE the text would exceed 4 MiB", StreamError::TooLarge, "the"),
            ("BADJSON meta is no JSON object", StreamError::BadJson, "meta"),
            ("ALIVE 1700000000000", StreamError::LeaseRuns, "1700000000000"),
        ] {
            assert_eq!(stream_error(why.into()), (error, detail.into()), "{why}");
        }
    }

    #[test]
    fn only_the_scripts_own_words_count() {
        for why in [
            "OOM command not allowed",
            "NOREPLICAS Not enough good replicas",
            "WRONGTYPE",
            "ENDED in another way",
            "BADOP no such operation",
            "",
        ] {
            let refused = StreamError::Store(StoreError::Refused(why.into()));
            assert_eq!(stream_error(why.into()).0, refused, "{why}");
        }
    }
}
