//! Spells publishes: plain, kept where no subscriber receives them, or with history.

use bytes::BytesMut;
use wsproxy_proto::history::HistoryLimits;

use crate::{
    bus::publish::{History, Keep, Publish, RoomOp, RoomPositions, RoomWrite},
    redis::{
        resp,
        script::{self, EXACT_MAX, PUBLISH, ROOM_POSITIONS, ROOM_STATE},
        words::milliseconds,
    },
};

/// Spells a publish.
pub(super) fn spell_publish(publish: &Publish, is_script_loaded: bool, out: &mut BytesMut) {
    match &publish.keep {
        Keep::Nothing => {
            out.extend_from_slice(b"*3\r\n$7\r\nPUBLISH\r\n");
            resp::word(out, publish.channel.as_bytes());
            resp::word(out, &publish.payload);
        }
        Keep::History(history) => {
            let Publish { channel, payload, .. } = publish;
            spell_with_history(channel, payload, history, is_script_loaded, out);
        }
        Keep::Room(write) => spell_room_write(publish, write, is_script_loaded, out),
        Keep::Positions(write) => spell_positions(write, is_script_loaded, out),
        Keep::IfNoReceiver { log, entries_max, bytes_max, ttl } => {
            resp::command(out, 9);
            resp::word(out, b"EVAL");
            resp::word(out, PUBLISH_OR_KEEP.as_bytes());
            resp::number(out, 1);
            resp::word(out, log.as_bytes());
            resp::word(out, publish.channel.as_bytes());
            resp::word(out, &publish.payload);
            resp::number(out, (*entries_max).max(1));
            resp::number(out, milliseconds(*ttl));
            resp::number(out, *bytes_max);
        }
    }
}

/// Spells a publish with history.
fn spell_with_history(
    channel: &str,
    payload: &[u8],
    history: &History,
    is_loaded: bool,
    out: &mut BytesMut,
) {
    let HistoryLimits { entries_max, bytes_max, ttl } = history.limits;
    let (clock, dedup) = (history.clock.as_deref(), history.dedup.as_ref());
    // Only the last arguments may be left out.
    let keys = if dedup.is_some() { 3 } else { 1 + usize::from(clock.is_some()) };
    resp::command(out, 11 + keys);
    for word in PUBLISH.call(is_loaded) {
        resp::word(out, word);
    }
    resp::number(out, keys as u64);
    resp::word(out, history.log.as_bytes());
    if keys > 1 {
        // An empty key would have a slot of its own.
        resp::word(out, clock.unwrap_or(&history.log).as_bytes());
    }
    if let Some((key, _)) = dedup {
        resp::word(out, key.as_bytes());
    }
    resp::word(out, channel.as_bytes());
    resp::word(out, payload);
    resp::number(out, entries_max.clamp(1, EXACT_MAX));
    resp::number(out, bytes_max.min(EXACT_MAX));
    resp::number(out, milliseconds(ttl));
    resp::word(out, history.event_id.as_deref().unwrap_or_default().as_bytes());
    resp::number(out, dedup.map_or(0, |(_, ttl)| milliseconds(*ttl)));
    resp::number(out, u64::from(history.unique));
    let further = [clock, dedup.map(|(key, _)| &**key)].into_iter().flatten();
    let keys = further.filter(|key| !key.is_empty()).chain([&*history.log]);
    script::assert_one_slot(keys.map(str::as_bytes));
}

/// Spells a change of a member's state with the message that tells of it.
fn spell_room_write(publish: &Publish, write: &RoomWrite, is_loaded: bool, out: &mut BytesMut) {
    let RoomWrite { keys, client, connection, ttl, op } = write;
    let (name, arguments): (&[u8], [Option<&[u8]>; 2]) = match op {
        RoomOp::Spawn { entity, snapshot } => (b"spawn", [Some(entity.as_bytes()), Some(snapshot)]),
        RoomOp::Despawn { entity } => (b"despawn", [Some(entity.as_bytes()), None]),
        RoomOp::Presence { json } => (b"presence", [Some(json.as_bytes()), None]),
    };
    resp::command(out, 13 + arguments.iter().flatten().count());
    for word in ROOM_STATE.call(is_loaded) {
        resp::word(out, word);
    }
    resp::number(out, keys.len() as u64);
    script::assert_one_slot(keys.iter().map(|key| key.as_bytes()));
    keys.iter().for_each(|key| resp::word(out, key.as_bytes()));
    resp::word(out, client.as_bytes());
    resp::word(out, connection.as_bytes());
    resp::word(out, publish.channel.as_bytes());
    resp::word(out, &publish.payload);
    resp::number(out, milliseconds(*ttl));
    resp::word(out, name);
    arguments.into_iter().flatten().for_each(|argument| resp::word(out, argument));
}

/// Spells a write of positions.
fn spell_positions(write: &RoomPositions, is_loaded: bool, out: &mut BytesMut) {
    let RoomPositions { keys, ttl, positions } = write;
    resp::command(out, 8 + 4 * positions.len());
    for word in ROOM_POSITIONS.call(is_loaded) {
        resp::word(out, word);
    }
    resp::number(out, keys.len() as u64);
    script::assert_one_slot(keys.iter().map(|key| key.as_bytes()));
    keys.iter().for_each(|key| resp::word(out, key.as_bytes()));
    resp::number(out, milliseconds(*ttl));
    for one in positions {
        for word in [&one.client, &one.connection, &one.entity] {
            resp::word(out, word.as_bytes());
        }
        resp::word(out, &one.position);
    }
}

/// Returns the number of receivers, or -1 if the message was kept instead. Every entry has in `sum` the bytes of
/// data kept until then, so that the oldest entries can be removed beyond the limit.
const PUBLISH_OR_KEEP: &str = "\
local call,log,data=redis.call,KEYS[1],ARGV[2] \
local n=call('PUBLISH',ARGV[1],data) \
if n>0 then return n end \
local function sum_of(entry) return tonumber(entry[2][4] or 0) or 0 end \
local last=call('XREVRANGE',log,'+','-','COUNT',1)[1] \
local sum=#data+(last and sum_of(last) or 0) \
local id=call('XADD',log,'MAXLEN','~',ARGV[3],'*','data',data,'sum',string.format('%.0f',sum)) \
call('PEXPIRE',log,ARGV[4]) \
while true do \
local first=call('XRANGE',log,'-','+','COUNT',1)[1] \
if not first or first[1]==id or sum-sum_of(first)+#(first[2][2] or '')<=tonumber(ARGV[5]) then return -1 end \
call('XDEL',log,first[1]) \
end";
