-- Publishes a message and appends it to the history of its channel, atomically.
--
-- KEYS  log of the channel: `{<channel>}:log`; of an event channel `ws:<rest>`: `{ws}:<rest>:log`
--       clock (a stream of ids, `{ws}:clock`) for logs that share one order; absent, "" or the log again: its own
--       once: set to the position for once_ms; where it is set already nothing happens; absent or "": none
-- ARGV  channel, payload, entries_max, bytes_max, ttl_ms, event_id ("": none), once_ms (0 or absent: none),
--       unique ("1": nothing happens where the log knows event_id already; absent or "": publish again)
-- Answers {receivers, position, 0}, or {0, position of the first time, 1}.
-- Errors: BADEVENTID. With any error of Redis' own nothing was done, but for NOPERM where the channel is denied: then
-- the message is in the log and was not published.
--
-- Position: `<id>-<tag>`; the id is the stream's, the tag is of this entry alone.
-- Entry: `meta` is `<tag> <prev> <sum> <removed> <event_id>`; `data` is the payload. `prev` is the position
-- before it ("0-0" for the first of a log's life), `sum` the bytes of all data so far and one for each entry,
-- `removed` at most that part of it which is held no more.
-- Message: byte FF, "H2 <position> <prev> <event_id>", line feed, payload.
-- Beside the log, with `log` at the end of its key replaced: `head` (a hash: position, sum and removed of the
-- last entry; outlives the log), `ids` and `ids:old` (hashes from event_id to position, "" where it was used twice).
-- Removed are the oldest beyond entries_max or bytes_max, and what is older than ttl_ms; the newest stays.

-- append begins (the same in publish.lua and stream.lua)
-- Every function costs time in every call, so that what is used in one place stands there.
local call, match = redis.call, string.match

-- The lowest id above prev, or nothing where id is above it already.
local function id_above(prev, id)
  local ms, seq = match(id, '(%d+)-(%d+)')
  local prev_ms, prev_seq = match(prev, '(%d+)-(%d+)')
  if ms * 1 > prev_ms * 1 or (ms == prev_ms and seq * 1 > prev_seq * 1) then return nil end
  return string.format('%s-%.0f', prev_ms, prev_seq + 1)
end

-- Answers receivers and position.
local function append(log, clock, channel, payload, entries_max, bytes_max, ttl, event_id)
  local head = string.sub(log, 1, -4) .. 'head'
  local held = call('HMGET', head, 'position', 'sum', 'removed')
  local prev, total, removed = held[1], held[2], held[3]
  if not prev then
    -- An error where a slot of a Redis Cluster is on the move, and the head, or the log, may be at the other node.
    call('EXISTS', log, head)
    -- The log's last entry tells what the head did.
    local last = call('XREVRANGE', log, '+', '-', 'COUNT', 1)[1]
    local tag, sum, gone = match(last and last[2][2] or '', '^(%x+) %S+ (%d+) (%d+)')
    prev, total, removed = tag and last[1] .. '-' .. tag or '0-0', sum or 0, gone or 0
  end
  -- Every entry weighs one more than its data, so that the first of a life is known by its sum.
  total = total + #payload + 1
  if total - removed > bytes_max then
    -- The oldest entries go until the log has room.
    local gone, from, count, entries = {}, '-', 1, nil
    repeat
      entries = call('XRANGE', log, from, '+', 'COUNT', count)
      for _, entry in ipairs(entries) do
        local fields = entry[2]
        local sum = tonumber(match(fields[2] or '', '^%x+ %S+ (%d+)') or 0)
        -- The first entry knows how much was removed before it; the head may know less.
        if from == '-' then removed = sum - #fields[#fields] - 1 end
        if total - removed <= bytes_max then break end
        gone[#gone + 1], removed, from = entry[1], sum, '(' .. entry[1]
      end
      count = math.min(count * 2, 64)
      if #gone > 1000 or (#gone > 0 and total - removed <= bytes_max) then
        call('XDEL', log, unpack(gone))
        gone = {}
      end
    until total - removed <= bytes_max or #entries == 0
    if #gone > 0 then call('XDEL', log, unpack(gone)) end
    removed = string.format('%.0f', removed)
  end
  if prev == '0-0' then
    -- Redis seeds every server alike; from here on this one has numbers of its own.
    local time = call('TIME')
    math.randomseed(time[1] * 1000003 % 2147483648 + time[2])
  end
  local a, b, c = string.byte(payload, -3, -1)
  -- The tag tells entries apart to which different lives of a log, or different masters, gave one id.
  local tag = string.format('%08x',
    (math.random() * 4294967296 + (a or 0) * 65536 + (b or 0) * 256 + (c or 0)) % 4294967296)
  local wanted = '*'
  if clock then
    wanted = call('XADD', clock, 'MAXLEN', '~', '1', '*', '', '')
    local above = id_above(prev, wanted)
    if above then wanted = call('XADD', clock, above, '', '') end
  end
  local sum = string.format('%.0f', total)
  local meta = tag .. ' ' .. prev .. ' ' .. sum .. ' ' .. removed .. ' ' .. event_id
  local id = call('XADD', log, 'NOMKSTREAM', 'MAXLEN', entries_max, wanted, 'meta', meta, 'data', payload)
  local is_new = not id
  if is_new then
    removed = string.format('%.0f', total - #payload - 1)
    meta = tag .. ' ' .. prev .. ' ' .. sum .. ' ' .. removed .. ' ' .. event_id
    id = call('XADD', log, wanted, 'meta', meta, 'data', payload)
    local above = id_above(prev, id)
    if above then
      -- The log was removed and its head was not, within a millisecond or while the clock went back.
      call('XDEL', log, id)
      id = call('XADD', log, above, 'meta', meta, 'data', payload)
    end
  end
  local position = id .. '-' .. tag
  call('HSET', head, 'position', position, 'sum', sum, 'removed', removed)
  -- Time moves on in steps of a 64th of the ttl, so that most messages need not look at it.
  local ms, step = match(id, '%d+'), ttl / 64
  if is_new or not held[1] or math.floor(ms / step) ~= math.floor(match(prev, '%d+') / step) then
    call('PEXPIRE', log, math.ceil(ttl + step), is_new and 'NX' or 'GT')
    -- A head outlives its log, and shows for an hour at least that something was published.
    call('PEXPIRE', head, math.ceil(math.max(ttl, 3600000) * 9 / 8), held[1] and 'GT' or 'NX')
    call('XTRIM', log, 'MINID', string.format('%.0f', math.max(ms - ttl, 0)))
  end
  local message = '\255H2 ' .. position .. ' ' .. prev .. ' ' .. event_id .. '\n' .. payload
  return call('PUBLISH', channel, message), position
end
-- append ends

-- Thirty years, in milliseconds: Redis refuses what is beyond its clock, after the message was kept.
local TTL_MAX = 1e12
local log, clock, once, event_id = KEYS[1], KEYS[2], KEYS[3], ARGV[6]
-- Numbers that are only passed on stay text: Redis is slow to print a number.
local entries_max, ttl = ARGV[3] * 1 < 1 and '1' or ARGV[3], math.min(math.max(ARGV[5], 1), TTL_MAX)
local is_private = string.find(log, '}:connection:', 1, true)
-- The client of a connection acknowledges by the position, and may come back with it.
local is_acked = event_id == '' and is_private and string.find(ARGV[2], '"ack"', 1, true)
local ids
if event_id ~= '' or is_acked then
  -- Logs of single connections share one index: a client comes back with another connection.
  ids = (match(log, '^({[^}]*}:connection:)[^:]*:log$') or string.sub(log, 1, -4)) .. 'ids'
end

-- Event ids of a worker's own must never be taken for positions.
if event_id ~= '' and (#event_id > 128 or event_id == '0' or string.find(event_id, '[%s%c]')
  or string.find(event_id, '^%d+%-%d+$') or string.find(event_id, '^%d+%-%d+%-%x+$')) then
  return redis.error_reply(
    'BADEVENTID longer than 128 bytes, with spaces or control characters, or like a position')
end
local first = once and once ~= '' and call('GET', once)
if first then return {0, first, 1} end
if ARGV[8] == '1' and event_id ~= '' then
  first = call('HGET', ids, event_id) or call('HGET', ids .. ':old', event_id)
  if first then return {0, first ~= '' and first or '0-0', 1} end
end
-- Before anything is written, so that a key of another type, or one at another node, is an error with which nothing was
-- done.
local held, is_old = ids and call('HLEN', ids), nil
if ids then
  is_old = call('HEXISTS', ids .. ':old', event_id) == 1
  if held == 0 then call('EXISTS', log, ids, ids .. ':old') end
end
local receivers, position = append(log, clock ~= '' and clock ~= log and clock, ARGV[1], ARGV[2],
  entries_max, tonumber(ARGV[4]), ttl, event_id)
if once and once ~= '' and tonumber(ARGV[7] or 0) > 0 then call('SET', once, position, 'PX', ARGV[7]) end
if ids then
  local name = is_acked and position or event_id
  local is_used = call('HSETNX', ids, name, position) == 0 or is_old
  -- It is unknown which of several entries the id means.
  if is_used then call('HSET', ids, name, '') end
  call('PEXPIRE', ids, math.ceil(ttl * 65 / 64))
  -- Two generations hold at least the last ids_max.
  local ids_max = is_private and 50000 or tonumber(entries_max)
  -- Where a slot is on the move it is refused, and done with a later message.
  if held >= ids_max then redis.pcall('RENAME', ids, ids .. ':old') end
end
return {receivers, position, 0}
