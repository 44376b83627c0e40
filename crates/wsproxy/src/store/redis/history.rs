//! Histories and token streams on Redis: what is asked of the scripts, and what their answers say.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use futures_util::future::try_join_all;
use wsproxy_proto::{
    history::{After, Entry, Log, Position, Resolved, Snapshot},
    names::{Id, Names},
};

use crate::{
    bus::redis::{
        milliseconds,
        resp::Reply,
        script::{self, EXACT_MAX},
    },
    store::{
        PAGE_BYTES_MAX, STREAMS_BYTES_MAX, SnapshotOf, StoreError, StreamCommand, StreamOp,
        StreamState,
        redis::{RedisStore, odd_reply},
    },
};

impl RedisStore {
    pub(in crate::store) async fn snapshot(
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

    pub(in crate::store) async fn stream(
        &self,
        command: &StreamCommand,
    ) -> Result<(u64, Position), StoreError> {
        let StreamCommand { session, stream, op, .. } = command;
        let member = format!("{session}/{stream}");
        let lease = op.lease().unwrap_or(Duration::ZERO);
        // Leases have another slot. One that is noted too early is looked at in vain, once.
        if matches!(op, StreamOp::Open { .. } | StreamOp::Renew { .. }) {
            self.note_lease(&member, lease).await?;
        }
        let done = self.0.run(&script::STREAM, &self.stream_words(command).slices()).await;
        let ended = matches!(op, StreamOp::End { .. } | StreamOp::Lost);
        match &done {
            Ok(_) if ended => self.forget_lease(member.as_bytes()).await?,
            // Its worker has renewed the lease, which only the stream itself knows.
            Err(StoreError::Refused(why)) if why.starts_with("ALIVE ") => {
                let leases = self.0.names().stream_leases();
                let ends = why.trim_start_matches("ALIVE ").as_bytes();
                let words = [b"ZADD", leases.as_bytes(), b"XX", ends, member.as_bytes()];
                self.0.command(&words).await?;
            }
            _ => {}
        }
        let Reply::Array(answer) = done? else { return Err(odd_reply()) };
        match &answer[..] {
            [Reply::Integer(seq), Reply::Text(id)] => {
                let position = Position::parse(id).ok_or_else(odd_reply)?;
                Ok((seq.unsigned_abs(), position))
            }
            _ => Err(odd_reply()),
        }
    }

    fn stream_words(&self, command: &StreamCommand) -> Words {
        let names = self.0.names();
        let StreamCommand { session, stream, op, limits } = command;
        let channel = names.session_down(session);
        let mut words = Words::default();
        words.number(4);
        words.text(&names.log(&channel));
        words.text(&names.stream(session, stream, ""));
        words.text(&names.stream(session, stream, ":text"));
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

    async fn note_lease(&self, member: &str, lease: Duration) -> Result<(), StoreError> {
        let leases = self.0.names().stream_leases();
        let lease = milliseconds(lease).to_string();
        let words: [&[u8]; 6] = [
            b"EVAL",
            NOTE_LEASE.as_bytes(),
            b"1",
            leases.as_bytes(),
            lease.as_bytes(),
            member.as_bytes(),
        ];
        self.0.command(&words).await.map(drop)
    }

    pub(in crate::store) async fn keep_heads(
        &self,
        logs: &[Arc<str>],
        ttl: Duration,
    ) -> Result<Vec<bool>, StoreError> {
        let ttl = milliseconds(ttl).to_string();
        let mut kept = Vec::with_capacity(logs.len());
        for logs in logs.chunks(KEPT_AT_ONCE) {
            let keep = async |log: &Arc<str>| {
                let head = Names::beside(log, "head");
                let words: [&[u8]; 3] = [b"PEXPIRE", head.as_bytes(), ttl.as_bytes()];
                self.0.command(&words).await
            };
            for reply in try_join_all(logs.iter().map(keep)).await? {
                kept.push(reply == Reply::Integer(1));
            }
        }
        Ok(kept)
    }

    pub(in crate::store) async fn lapsed_streams(
        &self,
        count: usize,
    ) -> Result<Vec<(Id, Id)>, StoreError> {
        let leases = self.0.names().stream_leases();
        let count = count.to_string();
        let words: [&[u8]; 5] =
            [b"EVAL", LAPSED.as_bytes(), b"1", leases.as_bytes(), count.as_bytes()];
        let Reply::Array(members) = self.0.command(&words).await? else { return Err(odd_reply()) };
        let parse = |member: &[u8]| {
            let (session, stream) = std::str::from_utf8(member).ok()?.split_once('/')?;
            Some((Id::parse(session).ok()?, Id::parse(stream).ok()?))
        };
        let mut lapsed = Vec::new();
        for member in &members {
            let Reply::Text(member) = member else { continue };
            match parse(member) {
                Some(stream) => lapsed.push(stream),
                // Nobody of ours put it there, and enough of them would hide those that are. A Redis that
                // refuses to remove it now must not hide the others either.
                None => drop(self.forget_lease(member).await),
            }
        }
        Ok(lapsed)
    }

    /// A lease that belongs to no stream.
    pub(in crate::store) async fn forget_lease(&self, member: &[u8]) -> Result<(), StoreError> {
        let leases = self.0.names().stream_leases();
        self.0.command(&[b"ZREM", leases.as_bytes(), member]).await.map(drop)
    }
}

/// Words of a command that are put together.
#[derive(Default)]
struct Words(Vec<Bytes>);

impl Words {
    fn text(&mut self, word: &str) {
        self.0.push(Bytes::copy_from_slice(word.as_bytes()));
    }

    fn texts(&mut self, words: &[&str]) {
        words.iter().for_each(|word| self.text(word));
    }

    fn bytes(&mut self, word: &Bytes) {
        self.0.push(word.clone());
    }

    fn number(&mut self, number: u64) {
        self.0.push(number.to_string().into());
    }

    fn slices(&self) -> Vec<&[u8]> {
        self.0.iter().map(|word| &word[..]).collect()
    }
}

/// Nothing can be behind the last position of all, and Redis refuses to look.
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
    let after = match &text(after)?[..] {
        b"" => Resolved::Nothing,
        b"?" => Resolved::Ambiguous,
        position => Resolved::At(Position::parse(position)?),
    };
    // A clock that has not begun gives no moment; then there is no entry either.
    let moment = match &text(moment)?[..] {
        b"" => (u64::MAX, u64::MAX),
        moment => Position::parse_id(moment)?,
    };
    let (now_ms, known) = (integer(now)?, integer(known)? != 0);
    (logs.len() == of.logs.len())
        .then_some((Snapshot { now_ms, moment, after, known, logs }, streams))
}

fn log(reply: Reply) -> Option<Log> {
    let [head, is_new, is_from_start, is_private, complete, entries] = parts(reply)?;
    let head = Position::parse(&text(head)?);
    let mut words = array(entries)?.into_iter();
    let mut entries = Vec::with_capacity(words.len() / 4);
    while let Some(id) = words.next() {
        let (id, prev) = (Position::parse(&text(id)?)?, text(words.next()?)?);
        let (event_id, data) = (text(words.next()?)?, text(words.next()?)?);
        let event_id = (!event_id.is_empty()).then(|| String::from_utf8_lossy(&event_id).into());
        entries.push(Entry { id, prev: position_or_broken(&prev), event_id, data });
    }
    let [is_new, is_from_start, is_private, complete] =
        [is_new, is_from_start, is_private, complete].map(integer);
    Some(Log {
        head,
        is_new: is_new? != 0,
        is_from_start: is_from_start? != 0,
        is_private: is_private? != 0,
        entries,
        complete: complete? != 0,
    })
}

/// An entry that was not written by the scripts follows nothing that could be known.
fn position_or_broken(prev: &[u8]) -> Position {
    let broken = Position { milliseconds: u64::MAX, sequence: u64::MAX, tag: u32::MAX };
    Position::parse(prev).unwrap_or(broken)
}

fn stream(reply: Reply) -> Option<StreamState> {
    let [stream, state, seq, content, meta, error] = parts(reply)?;
    let utf8 = |reply| Some(String::from_utf8_lossy(&text(reply)?).into());
    Some(StreamState {
        stream: utf8(stream)?,
        state: utf8(state)?,
        seq: integer(seq)?,
        text: text(content)?,
        meta: text(meta)?,
        error: text(error)?,
    })
}

fn parts<const N: usize>(reply: Reply) -> Option<[Reply; N]> {
    array(reply)?.try_into().ok()
}

fn array(reply: Reply) -> Option<Vec<Reply>> {
    if let Reply::Array(replies) = reply { Some(replies) } else { None }
}

fn text(reply: Reply) -> Option<Bytes> {
    if let Reply::Text(text) = reply { Some(text) } else { None }
}

fn integer(reply: Reply) -> Option<u64> {
    if let Reply::Integer(number) = reply { u64::try_from(number).ok() } else { None }
}

/// So many heads are kept at a time.
const KEPT_AT_ONCE: usize = 256;

/// Notes when a lease ends by the clock of the server.
const NOTE_LEASE: &str = "\
local t=redis.call('TIME') \
return redis.call('ZADD',KEYS[1],t[1]*1000+math.floor(t[2]/1000)+ARGV[1],ARGV[2])";

/// Leases that have run out by the clock of the server.
const LAPSED: &str = "\
local t=redis.call('TIME') \
return redis.call('ZRANGEBYSCORE',KEYS[1],'-inf',t[1]*1000+math.floor(t[2]/1000),'LIMIT',0,ARGV[1])";
