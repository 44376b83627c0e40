-- Changes a token stream of a session and publishes the change with history, atomically.
--
-- KEYS  log of the session's channel (`{session:<id>:down}:log`), and with `log` at the end replaced: state (hash,
--       `stream:<stream>`), text (`stream:<stream>:text`), index of the session's streams (zset by time of
--       opening, `streams`)
-- ARGV  op, channel, stream, entries_max, bytes_max, ttl_ms, lease_ms (0 where op has none), and by op
--       open    meta (a JSON object; "": {})
--       append  text, seq that it must get ("": any)
--       renew   (only the lease)
--       end     finish|error|cancelled, error (a JSON object; "": none)
--       lost    (ends it with the error `worker_lost` if the lease has run out)
-- Answers {seq of the last append, position of the last message}. What has taken effect already may be said again.
-- Errors: NOSTREAM, EXISTS, ENDED <outcome>, TOOLARGE, SEQ <last seq>, ALIVE <end of the lease in ms> (lost: the
--       lease still runs), BADJSON, BADOP.
-- State, text and index live for ttl_ms after the last change or longer, by an eighth at most; so does a lease.
-- Leases are found in the zset `streams:leases` (`<session>/<stream>` by end in ms), which has another slot: write
-- it before `open` and `renew`, and remove from it after `end`. It may name ends that are too early, never too late.

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

local log, state, text, index = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local op, channel, stream = ARGV[1], ARGV[2], ARGV[3]
local entries_max, bytes_max = ARGV[4] * 1 < 1 and '1' or ARGV[4], tonumber(ARGV[5])
-- Thirty years, in milliseconds: Redis refuses what is beyond its clock, after the message was kept.
local ttl, lease = math.min(math.max(ARGV[6], 1), 1e12), math.max(ARGV[7], 1)
local STREAMS_MAX, TEXT_BYTES_MAX = 16, 4 * 1024 * 1024

local function fail(why)
  return redis.error_reply(why)
end

local function now_ms()
  local time = call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end

local function publish(kind, id, rest)
  local message = '{"type":"stream_' .. kind .. '","stream":' .. cjson.encode(id) .. rest .. '}'
  local _, position = append(log, nil, channel, message, entries_max, bytes_max, ttl, '')
  return position
end

local function is_object(json)
  local ok, value = pcall(cjson.decode, json)
  return ok and type(value) == 'table' and string.find(json, '^%s*{') ~= nil
end

local function keep(position)
  local longer = math.ceil(ttl * 9 / 8)
  call('PEXPIRE', state, longer)
  call('PEXPIRE', text, longer)
  -- The index is of all streams: none with a smaller ttl may take the others out of it.
  call('ZADD', index, 'NX', match(position, '%d+'), stream)
  if call('PEXPIRE', index, longer, 'GT') == 0 then call('PEXPIRE', index, longer, 'NX') end
end

local function close(key, id, seq, outcome, error)
  local rest = ',"outcome":"' .. outcome .. '","seq":' .. seq
  if error ~= '' then rest = rest .. ',"error":' .. error end
  local position = publish('end', id, rest)
  call('HSET', key, 'state', outcome, 'error', error, 'id', position)
  return position
end

-- Streams that a further one displaces. Their keys are read before anything is written: one that is at another node of a
-- Redis Cluster is an error with which nothing was done.
local function oldest()
  local prefix, found = string.sub(state, 1, #state - #stream), {}
  for _, id in ipairs(call('ZRANGE', index, 0, -STREAMS_MAX)) do
    local key = prefix .. id
    local held = call('HMGET', key, 'state', 'seq')
    call('EXISTS', key .. ':text')
    found[#found + 1] = {id, key, held[1] == 'open', held[2]}
  end
  return found
end

local function forget(streams)
  for _, each in ipairs(streams) do
    local id, key, is_open, seq = unpack(each)
    if is_open then
      close(key, id, seq, 'error', '{"code":"replaced","message":"too many streams in this session"}')
    end
    call('DEL', key)
    call('DEL', key .. ':text')
    call('ZREM', index, id)
  end
end

local held = call('HMGET', state, 'state', 'seq', 'id', 'bytes', 'due', 'lease')
local is, seq, id, bytes = held[1], tonumber(held[2] or 0), held[3], tonumber(held[4] or 0)

if op == 'open' then
  local meta = ARGV[8] ~= '' and ARGV[8] or '{}'
  if is then
    if is == 'open' and seq == 0 and call('HGET', state, 'meta') == meta then return {0, id} end
    return fail('EXISTS there is a stream with this id')
  end
  if not is_object(meta) then return fail('BADJSON meta is no JSON object') end
  local now, displaced = now_ms(), oldest()
  id = publish('open', stream, ',"meta":' .. meta)
  call('HSET', state, 'state', 'open', 'seq', 0, 'id', id, 'bytes', 0, 'meta', meta, 'error', '',
    'due', 0, 'lease', lease, 'ends', string.format('%.0f', now + lease))
  call('SET', text, '')
  call('ZADD', index, now, stream)
  keep(id)
  forget(displaced)
  return {0, id}
end

if not is then return fail('NOSTREAM there is no stream with this id') end

if op == 'append' then
  local piece, wanted = ARGV[8], tonumber(ARGV[9] or '')
  if wanted == seq and seq > 0 and #piece <= bytes
    and call('GETRANGE', text, bytes - #piece, -1) == piece then
    return {seq, id}
  end
  if is ~= 'open' then return fail('ENDED ' .. is) end
  if wanted and wanted ~= seq + 1 then return fail('SEQ ' .. seq) end
  if bytes + #piece > TEXT_BYTES_MAX then return fail('TOOLARGE the text would exceed 4 MiB') end
  seq = seq + 1
  id = publish('append', stream, ',"seq":' .. seq .. ',"text":' .. cjson.encode(piece))
  call('APPEND', text, piece)
  local now = tonumber(string.match(id, '%d+'))
  if now >= tonumber(held[5]) or lease ~= tonumber(held[6]) then
    -- Not with every append: leases and expiry are as much longer as the next time may be away.
    local due = now + math.floor(math.min(ttl, lease) / 8)
    local ends = now + math.ceil(lease * 9 / 8)
    call('HSET', state, 'seq', seq, 'id', id, 'bytes', bytes + #piece, 'due', due, 'lease', lease,
      'ends', string.format('%.0f', ends))
    keep(id)
  else
    call('HSET', state, 'seq', seq, 'id', id, 'bytes', bytes + #piece)
  end
  return {seq, id}
end

if op == 'end' then
  local outcome, error = ARGV[8], ARGV[9] or ''
  if outcome ~= 'finish' and outcome ~= 'error' and outcome ~= 'cancelled' then
    return fail('BADOP no such outcome')
  end
  if is ~= 'open' then
    if is == outcome and call('HGET', state, 'error') == error then return {seq, id} end
    return fail('ENDED ' .. is)
  end
  if error ~= '' and not is_object(error) then return fail('BADJSON error is no JSON object') end
  id = close(state, stream, seq, outcome, error)
  keep(id)
  return {seq, id}
end

if is ~= 'open' then return fail('ENDED ' .. is) end

if op == 'renew' then
  call('HSET', state, 'due', 0, 'ends', string.format('%.0f', now_ms() + lease))
  keep(id)
  return {seq, id}
end

if op == 'lost' then
  local ends = call('HGET', state, 'ends')
  if ends and tonumber(ends) > now_ms() then return fail('ALIVE ' .. ends) end
  id = close(state, stream, seq, 'error',
    '{"code":"worker_lost","message":"the worker stopped without ending the stream"}')
  keep(id)
  return {seq, id}
end

return fail('BADOP no such operation')
