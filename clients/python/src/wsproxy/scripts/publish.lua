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
-- Beside the log, with `log` at the end of its key replaced: `head` (a hash, whose field `last` is
-- `<time of the next renewal> <sum> <removed> <position>` of the last entry; outlives the log),
-- `ids` and `ids:old` (hashes from event_id to position, "" where it was used twice).
-- Every key beside KEYS is read before the first write. In a Redis Cluster, whose node gives keys away one by one, a
-- key that has gone is an error of that read, and nothing was done; KEYS are looked at before the script begins.
-- Removed are the oldest beyond entries_max or bytes_max, and what is older than ttl_ms; the newest stays.

local call, match, sub = redis.call, string.match, string.sub
local log, clock, once, event_id = KEYS[1], KEYS[2], KEYS[3], ARGV[6]
local channel, payload, bytes_max, ttl = ARGV[1], ARGV[2], ARGV[4] * 1, ARGV[5]
-- Numbers that are only passed on stay text: Redis is slow to print a number.
local entries_max = ARGV[3] == '0' and '1' or ARGV[3]
if clock == '' or clock == log then clock = nil end
if once == '' then once = nil end

-- Event ids of a worker's own must never be taken for positions.
if event_id ~= '' and (#event_id > 128 or string.find(event_id, '[%s%c]') or event_id == '0'
  or match(event_id, '^%d+%-%d+$') or match(event_id, '^%d+%-%d+%-%x+$')) then
  return redis.error_reply(
    'BADEVENTID longer than 128 bytes, with spaces or control characters, or like a position')
end

-- Both indexes are read before the first write, like the head.
if once then
  local first = call('GET', once)
  if first then return {0, first, 1} end
end
local is_private = clock and string.find(log, '}:connection:', 1, true)
-- The client of a connection acknowledges by the position, and may come back with it.
local is_acked = is_private and event_id == '' and string.find(payload, '"ack"', 1, true)
local ids, ids_old, held, first
if event_id ~= '' or is_acked then
  -- Logs of single connections share one index: a client comes back with another connection.
  ids = (match(log, '^({[^}]*}:connection:)[^:]*:log$') or sub(log, 1, -4)) .. 'ids'
  ids_old = ids .. ':old'
  held = call('HLEN', ids)
  -- An error where a slot of a Redis Cluster is on the move, and one of them may be at the other node.
  if held == 0 then call('EXISTS', log, ids, ids_old) end
  local older = call('HGET', ids_old, event_id)
  first = event_id ~= '' and (call('HGET', ids, event_id) or older)
  if first and ARGV[8] == '1' then return {0, first ~= '' and first or '0-0', 1} end
end

local position, receivers, is_due
do
  -- append begins (the same in publish.lua and stream.lua)
  -- Wants log, clock (nil: none), channel, payload, entries_max, bytes_max, ttl and event_id. Gives position, receivers
  -- and is_due (expiries were renewed).
  -- No function is made and no number is passed to Redis for a common message: both cost as much as a command.
  local head = sub(log, 1, -4) .. 'head'
  local held = call('HGET', head, 'last') or ''
  local sum, removed, prev = match(held, '^(%d+) (%d+) (.+)', 15)
  local is_known = prev
  if not prev then
    -- An error where a slot of a Redis Cluster is on the move, and the head, or the log, may be at the other node.
    call('EXISTS', log, head)
    -- The log's last entry tells what the head did.
    local last, tag = call('XREVRANGE', log, '+', '-', 'COUNT', '1')[1], nil
    tag, sum, removed = match(last and last[2][2] or '', '^(%x+) %S+ (%d+) (%d+)')
    prev, sum, removed = tag and last[1] .. '-' .. tag or '0-0', sum or '0', removed or '0'
  end
  -- Every entry weighs one more than its data, so that the first of a life is known by its sum.
  local total = sum + #payload + 1
  if total - removed > bytes_max then
    -- The oldest entries go until the log has room.
    local gone, from, count, entries = {}, '-', 1, nil
    repeat
      entries = call('XRANGE', log, from, '+', 'COUNT', count)
      for _, entry in ipairs(entries) do
        local fields = entry[2]
        local held = tonumber(match(fields[2] or '', '^%x+ %S+ (%d+)') or 0)
        -- The first entry knows how much was removed before it; the head may know less.
        if from == '-' then removed = held - #fields[#fields] - 1 end
        if total - removed <= bytes_max then break end
        gone[#gone + 1], removed, from = entry[1], held, '(' .. entry[1]
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
  local a, b = string.byte(payload, -3, -2)
  -- The tag tells entries apart to which different lives of a log, or different masters, gave one id.
  local tag = bit.tohex(math.random() * 4294967296 + (a or 0) * 256 + (b or 0) + #payload * 65536)
  local add, wanted = call, '*'
  if clock then
    add, wanted = redis.pcall, call('XADD', clock, 'MAXLEN', '~', '1', '*', '', '')
  end
  local sums = string.format('%d ', total) .. removed .. ' '
  local meta = tag .. ' ' .. prev .. ' ' .. sums .. event_id
  local id = add('XADD', log, 'NOMKSTREAM', 'MAXLEN', entries_max, wanted, 'meta', meta, 'data', payload)
  local is_new = not id
  if is_new or (clock and id.err) then
    local prev_ms, prev_seq = match(prev, '(%d+)-(%d+)')
    local least = string.format('%s-%.0f', prev_ms, prev_seq + 1)
    local function is_above(other)
      local ms, seq = match(other, '(%d+)-(%d+)')
      return ms * 1 > prev_ms * 1 or (ms == prev_ms and seq * 1 > prev_seq * 1)
    end
    if clock and not is_above(wanted) then
      wanted = call('XADD', clock, least, '', '')
    elseif not is_new then
      return id
    end
    if is_new then
      -- Nothing of what was before is held.
      sums = string.format('%d %.0f ', total, total - #payload - 1)
      meta = tag .. ' ' .. prev .. ' ' .. sums .. event_id
    end
    id = call('XADD', log, 'MAXLEN', entries_max, wanted, 'meta', meta, 'data', payload)
    if not clock and not is_above(id) then
      -- The log was removed and its head was not, within a millisecond or while the clock went back.
      call('XDEL', log, id)
      id = call('XADD', log, least, 'meta', meta, 'data', payload)
    end
  end
  position = id .. '-' .. tag
  -- Thirteen digits, which an id is compared with as text: an id that has fewer or more is due.
  local due = sub(held, 1, 14)
  is_due = is_new or not is_known or id >= due
  if is_due then
    -- Time moves on in steps of a 64th of the ttl, so that most messages need not look at it. The ttl is thirty years
    -- at most: Redis refuses what is beyond its clock, after the message was kept.
    local ms, lasts = match(id, '%d+'), math.min(math.max(ttl, 1), 1e12)
    due = string.format('%013.0f ', math.min(ms + math.ceil(lasts / 64), 9999999999999))
    call('PEXPIRE', log, string.format('%.0f', math.ceil(lasts * 65 / 64)), is_new and 'NX' or 'GT')
    call('XTRIM', log, 'MINID', string.format('%.0f', math.max(ms - lasts, 0)))
    -- A head outlives its log, and shows for an hour at least that something was published.
    call('HSET', head, 'last', due .. sums .. position)
    local longer = string.format('%.0f', math.ceil(math.max(lasts, 3600000) * 9 / 8))
    call('PEXPIRE', head, longer, is_known and 'GT' or 'NX')
  else
    call('HSET', head, 'last', due .. sums .. position)
  end
  receivers = call('PUBLISH', channel, '\255H2 ' .. position .. ' ' .. prev .. ' ' .. event_id .. '\n' .. payload)
  -- append ends
end

if once and tonumber(ARGV[7] or 0) > 0 then call('SET', once, position, 'PX', ARGV[7]) end
if ids then
  -- It is unknown which of several entries an id means.
  call('HSET', ids, is_acked and position or event_id, first and '' or position)
  if is_due or held == 0 then
    call('PEXPIRE', ids, string.format('%.0f', math.ceil(math.min(math.max(ttl, 1), 1e12) * 65 / 64)))
  end
  -- Two generations hold at least the last ids_max.
  local ids_max = is_private and 50000 or tonumber(entries_max)
  -- Where a slot is on the move it is refused, and done with a later message.
  if held >= ids_max then redis.pcall('RENAME', ids, ids_old) end
end
return {receivers, position, 0}
