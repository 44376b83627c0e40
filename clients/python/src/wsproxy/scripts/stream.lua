-- Changes a token stream of a session and publishes the change with history, atomically.
--
-- KEYS  log of the session's channel, state (hash `…:stream:<id>`), text (`<state>:text`), index of the
--       session's streams (zset by time of opening), leases (zset `<session>/<stream>` by end in ms)
-- ARGV  op, channel, session, stream, entries_max, bytes_max, ttl_ms, lease_ms (0 where op has none), and by op
--       open    meta (a JSON object; "": {})
--       append  text, seq that it must get ("": any)
--       renew   (only the lease)
--       end     finish|error|cancelled, error (a JSON object; "": none)
--       lost    (ends it with the error `worker_lost` if the lease has run out)
-- Answers {seq of the last append, id of the last message}. What has taken effect already may be said again.
-- Errors: NOSTREAM, EXISTS, ENDED <outcome>, TOOLARGE, SEQ <last seq>, ALIVE (lost: the lease still runs),
--       BADJSON, BADOP.
-- State, text and index live for ttl_ms after the last change or longer, by an eighth at most; so do leases.
local call = redis.call

-- append begins (the same in publish.lua and stream.lua)
local function room(log, total, removed, bytes_max)
  -- What the last entry says of removed bytes may be less than the truth: the first entry knows it.
  local gone, from, count, entries = {}, '-', 1, nil
  repeat
    entries = call('XRANGE', log, from, '+', 'COUNT', count)
    for _, entry in ipairs(entries) do
      local fields = entry[2]
      local sum = tonumber(string.match(fields[4] or '', '%d+') or 0)
      if from == '-' then removed = sum - #fields[#fields] end
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
  return removed
end

local function append(log, clock, channel, payload, entries_max, bytes_max, ttl, event_id)
  local last = call('XREVRANGE', log, '+', '-', 'COUNT', 1)[1]
  local prev, total, removed = '0-0', #payload, 0
  if last then
    local sum, rest = string.match(last[2][4] or '', '(%d+):(%d+)')
    prev, total, removed = last[1], (sum or 0) + total, tonumber(rest or 0)
    if total - removed > bytes_max then removed = room(log, total, removed, bytes_max) end
  end
  local id = '*'
  if clock then
    id = call('XADD', clock, 'MAXLEN', '~', 1, '*', '', '')
    local ms, seq = string.match(prev, '(%d+)-(%d+)')
    local id_ms, id_seq = string.match(id, '(%d+)-(%d+)')
    if id_ms * 1 < ms * 1 or (id_ms == ms and id_seq * 1 <= seq * 1) then
      -- The clock was lost and time went back.
      id = call('XADD', clock, string.format('%s-%.0f', ms, seq + 1), '', '')
    end
  end
  local sum = string.format('%.0f:%.0f', total, removed)
  if event_id == '' then
    id = call('XADD', log, 'MAXLEN', entries_max, id, 'prev', prev, 'sum', sum, 'data', payload)
  else
    id = call('XADD', log, 'MAXLEN', entries_max, id, 'prev', prev, 'sum', sum, 'event_id', event_id,
      'data', payload)
  end
  -- Time moves on in steps of a 64th of the ttl, so that most messages need not look at it.
  local step, ms = ttl / 64, string.match(id, '%d+')
  if math.floor(ms / step) ~= math.floor(string.match(prev, '%d+') / step) then
    call('PEXPIRE', log, math.ceil(ttl + step))
    if last then call('XTRIM', log, 'MINID', string.format('%.0f', math.max(ms - ttl, 0))) end
  end
  return call('PUBLISH', channel, '\255H1 ' .. id .. ' ' .. prev .. ' ' .. event_id .. '\n' .. payload), id
end
-- append ends

local log, state, text, index, leases = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local op, channel, session, stream = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local entries_max, bytes_max = math.max(ARGV[5], 1), tonumber(ARGV[6])
local ttl, lease = math.max(ARGV[7], 1), math.max(ARGV[8], 1)
local member = session .. '/' .. stream
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

local function keep()
  local longer = math.ceil(ttl * 9 / 8)
  call('PEXPIRE', state, longer)
  call('PEXPIRE', text, longer)
  call('PEXPIRE', index, longer)
end

local function close(key, id, seq, outcome, error)
  local rest = ',"outcome":"' .. outcome .. '","seq":' .. seq
  if error ~= '' then rest = rest .. ',"error":' .. error end
  local position = publish('end', id, rest)
  call('HSET', key, 'state', outcome, 'error', error, 'id', position)
  call('ZREM', leases, session .. '/' .. id)
  return position
end

local function forget_oldest()
  local prefix = string.sub(state, 1, #state - #stream)
  for _, id in ipairs(call('ZRANGE', index, 0, -STREAMS_MAX - 1)) do
    local key = prefix .. id
    local held = call('HMGET', key, 'state', 'seq')
    if held[1] == 'open' then
      close(key, id, held[2], 'error', '{"code":"replaced","message":"too many streams in this session"}')
    end
    call('DEL', key, key .. ':text')
    call('ZREM', index, id)
  end
end

local held = call('HMGET', state, 'state', 'seq', 'id', 'bytes', 'due', 'lease')
local is, seq, id, bytes = held[1], tonumber(held[2] or 0), held[3], tonumber(held[4] or 0)

if op == 'open' then
  local meta = ARGV[9] ~= '' and ARGV[9] or '{}'
  if is then
    if is == 'open' and seq == 0 and call('HGET', state, 'meta') == meta then return {0, id} end
    return fail('EXISTS there is a stream with this id')
  end
  if not is_object(meta) then return fail('BADJSON meta is no JSON object') end
  local now = now_ms()
  id = publish('open', stream, ',"meta":' .. meta)
  call('HSET', state, 'state', 'open', 'seq', 0, 'id', id, 'bytes', 0, 'meta', meta, 'error', '', 'due', 0, 'lease', lease)
  call('SET', text, '')
  call('ZADD', index, now, stream)
  call('ZADD', leases, now + lease, member)
  keep()
  forget_oldest()
  return {0, id}
end

if not is then
  call('ZREM', leases, member)
  return fail('NOSTREAM there is no stream with this id')
end

if op == 'append' then
  local piece, wanted = ARGV[9], tonumber(ARGV[10] or '')
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
    call('HSET', state, 'seq', seq, 'id', id, 'bytes', bytes + #piece, 'due', due, 'lease', lease)
    call('ZADD', leases, now + math.ceil(lease * 9 / 8), member)
    keep()
  else
    call('HSET', state, 'seq', seq, 'id', id, 'bytes', bytes + #piece)
  end
  return {seq, id}
end

if op == 'end' then
  local outcome, error = ARGV[9], ARGV[10] or ''
  if outcome ~= 'finish' and outcome ~= 'error' and outcome ~= 'cancelled' then
    return fail('BADOP no such outcome')
  end
  if is ~= 'open' then
    if is == outcome and call('HGET', state, 'error') == error then return {seq, id} end
    return fail('ENDED ' .. is)
  end
  if error ~= '' and not is_object(error) then return fail('BADJSON error is no JSON object') end
  id = close(state, stream, seq, outcome, error)
  keep()
  return {seq, id}
end

if is ~= 'open' then
  call('ZREM', leases, member)
  return fail('ENDED ' .. is)
end

if op == 'renew' then
  call('ZADD', leases, now_ms() + lease, member)
  call('HSET', state, 'due', 0)
  keep()
  return {seq, id}
end

if op == 'lost' then
  local ends = call('ZSCORE', leases, member)
  if ends and tonumber(ends) > now_ms() then return fail('ALIVE the lease still runs') end
  id = close(state, stream, seq, 'error',
    '{"code":"worker_lost","message":"the worker stopped without ending the stream"}')
  keep()
  return {seq, id}
end

return fail('BADOP no such operation')
