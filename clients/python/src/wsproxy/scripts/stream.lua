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
-- State: a hash with `state` (open or the outcome), `meta`, `error`, `ends` (of the lease) and `last`, which is
--       `<time of the next renewal> <seq> <lease> <position of the last message>`; the lease is `ended` after the end.
-- Every key beside KEYS is read before the first write. In a Redis Cluster, whose node gives keys away one by one, a
-- key that has gone is an error of that read, and nothing was done; KEYS are looked at before the script begins.
-- State, text and index live for ttl_ms after the last change or longer, by an eighth at most; so does a lease.
-- Leases are found in the zset `streams:leases` (`<session>/<stream>` by end in ms), which has another slot: write
-- it before `open` and `renew`, and remove from it after `end`. It may name ends that are too early, never too late.

local call, match, sub = redis.call, string.match, string.sub
local log, state, text, index = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local op, channel, stream = ARGV[1], ARGV[2], ARGV[3]
-- Numbers that are only passed on stay text: Redis is slow to print a number.
local entries_max, bytes_max = ARGV[4] == '0' and '1' or ARGV[4], ARGV[5] * 1
local ttl, lease = ARGV[6], ARGV[7]

local last = call('HGET', state, 'last') or ''
local seq, mark, at = match(last, '^(%d+) (%S+) (.+)', 15)
local bytes = call('STRLEN', text)

local clock, event_id, payload, others, next_seq
local outcome, problem, meta, gone
if op == 'append' then
  -- The common case calls as little as it can.
  local piece, wanted = ARGV[8], ARGV[9] or ''
  local number = (seq or 0) + 1
  next_seq = string.format('%d', number)
  if wanted == next_seq then wanted = '' end
  wanted = wanted ~= '' and tonumber(wanted)
  if wanted and wanted == number - 1 and wanted > 0 and #piece <= bytes
    and call('GETRANGE', text, bytes - #piece, -1) == piece then
    return {wanted, at}
  end
  if not seq then return redis.error_reply('NOSTREAM there is no stream with this id') end
  if mark == 'ended' then return redis.error_reply('ENDED ' .. call('HGET', state, 'state')) end
  if wanted then return redis.error_reply('SEQ ' .. seq) end
  if bytes + #piece > 4 * 1024 * 1024 then
    return redis.error_reply('TOOLARGE the text would exceed 4 MiB')
  end
  payload = '{"type":"stream_append","stream":' .. cjson.encode(stream) .. ',"seq":' .. next_seq
    .. ',"text":' .. cjson.encode(piece) .. '}'
else
  local function is_object(json)
    local ok, value = pcall(cjson.decode, json)
    return ok and type(value) == 'table' and string.find(json, '^%s*{') ~= nil
  end
  local function end_of(name, last, how, why)
    local rest = why ~= '' and ',"error":' .. why or ''
    return '{"type":"stream_end","stream":' .. cjson.encode(name) .. ',"outcome":"' .. how .. '","seq":' .. last
      .. rest .. '}'
  end
  if op == 'open' then
    meta = ARGV[8] ~= '' and ARGV[8] or '{}'
    if seq then
      if mark ~= 'ended' and seq == '0' and call('HGET', state, 'meta') == meta then return {0, at} end
      return redis.error_reply('EXISTS there is a stream with this id')
    end
    if not is_object(meta) then return redis.error_reply('BADJSON meta is no JSON object') end
    next_seq, gone, others = '0', {}, {}
    -- The oldest give way, so that there are at most sixteen.
    local listed = call('ZRANGE', index, 0, -1)
    for n, name in ipairs(listed) do
      if name ~= stream and n <= #listed - 15 then
        local key = sub(state, 1, #state - #stream) .. name
        local count, how = match(call('HGET', key, 'last') or '', '^(%d+) (%S+)', 15)
        call('STRLEN', key .. ':text')
        if count and how ~= 'ended' then
          others[#others + 1] = end_of(name, count, 'error',
            '{"code":"replaced","message":"too many streams in this session"}')
        end
        gone[#gone + 1] = name
      end
    end
    payload = '{"type":"stream_open","stream":' .. cjson.encode(stream) .. ',"meta":' .. meta .. '}'
  else
    if not seq then return redis.error_reply('NOSTREAM there is no stream with this id') end
    local is = call('HGET', state, 'state')
    next_seq = seq
    if op == 'end' then
      outcome, problem = ARGV[8], ARGV[9] or ''
      if outcome ~= 'finish' and outcome ~= 'error' and outcome ~= 'cancelled' then
        return redis.error_reply('BADOP no such outcome')
      end
      if is == outcome and call('HGET', state, 'error') == problem then return {tonumber(seq), at} end
    end
    if is ~= 'open' then return redis.error_reply('ENDED ' .. is) end
    if op == 'end' then
      if problem ~= '' and not is_object(problem) then return redis.error_reply('BADJSON error is no JSON object') end
    elseif op == 'lost' then
      local ends, time = call('HGET', state, 'ends'), call('TIME')
      if ends and tonumber(ends) > time[1] * 1000 + math.floor(time[2] / 1000) then
        return redis.error_reply('ALIVE ' .. ends)
      end
      outcome, problem = 'error', '{"code":"worker_lost","message":"the worker stopped without ending the stream"}'
    elseif op ~= 'renew' then
      return redis.error_reply('BADOP no such operation')
    end
    payload = outcome and end_of(stream, seq, outcome, problem)
  end
end

local count, position, receivers, is_due = 0, nil, nil, nil
event_id = ''
while payload do
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
  if count == 0 then at = position end
  count = count + 1
  payload = others and others[count]
end

if op == 'append' then
  call('APPEND', text, ARGV[8])
  if at < last and mark == lease then
    call('HSET', state, 'last', sub(last, 1, 14) .. next_seq .. ' ' .. mark .. ' ' .. at)
    return {next_seq * 1, at}
  end
end

-- Not with every append: leases and expiries are as much longer as the next renewal may be away.
ttl, lease = math.min(math.max(ttl, 1), 1e12), math.min(math.max(lease, 1), 1e12)
local now = match(at, '%d+')
if op == 'open' or op == 'renew' then
  local time = call('TIME')
  now = string.format('%.0f', time[1] * 1000 + math.floor(time[2] / 1000))
end
if outcome then
  call('HSET', state, 'state', outcome, 'error', problem, 'last', sub(last, 1, 14) .. seq .. ' ended ' .. at)
else
  -- Thirteen digits, which a position is compared with as text.
  local due = math.min(now + math.floor(math.min(ttl, lease) / 8), 9999999999999)
  call('HSET', state, 'last', string.format('%013.0f %s %.0f %s', due, next_seq, lease, at),
    'ends', string.format('%.0f', now + math.ceil(lease * 9 / 8)))
end
if op == 'open' then
  call('HSET', state, 'state', 'open', 'meta', meta, 'error', '')
  call('SET', text, '')
  call('ZADD', index, now, stream)
  for _, name in ipairs(gone) do
    local key = sub(state, 1, #state - #stream) .. name
    call('DEL', key)
    call('DEL', key .. ':text')
    call('ZREM', index, name)
  end
end
local longer = string.format('%.0f', math.ceil(ttl * 9 / 8))
call('PEXPIRE', state, longer)
call('PEXPIRE', text, longer)
-- The index is of all streams: none with a smaller ttl may take the others out of it.
call('ZADD', index, 'NX', now, stream)
if call('PEXPIRE', index, longer, 'GT') == 0 then call('PEXPIRE', index, longer, 'NX') end
return {tonumber(next_seq), at}
