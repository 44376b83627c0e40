-- Publishes a message and appends it to the history of its channel, atomically.
--
-- KEYS  log of the channel: `<channel>:log`
--       clock (a stream of ids) for logs that share one order; absent or "": the log's own
--       dedup: set to the id for dedup_ms; where it is set already nothing happens; absent or "": none
-- ARGV  channel, payload, entries_max, bytes_max, ttl_ms, event_id ("": none), dedup_ms (0 or absent: none)
-- Answers {receivers, id, 0}, or {0, id of the first time, 1}.
--
-- Entry: `prev` (id before it, "0-0" for the first of a log's life), `sum` (bytes of all data so far, itself
-- included; after the colon at most what of it has been removed), `event_id` where there is one, `data`.
-- Message: byte FF, "H1 <id> <prev> <event_id>", line feed, payload.
-- Removed are the oldest beyond entries_max or bytes_max, and what is older than ttl_ms; the newest stays.
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

local clock, dedup, event_id = KEYS[2], KEYS[3], ARGV[6]
if #event_id > 128 or string.find(event_id, '[%s%c]') then
  return redis.error_reply('BADEVENTID longer than 128 bytes, or spaces or control characters in it')
end
local first = dedup and dedup ~= '' and call('GET', dedup)
if first then return {0, first, 1} end
local receivers, id = append(KEYS[1], clock ~= '' and clock, ARGV[1], ARGV[2],
  math.max(ARGV[3], 1), tonumber(ARGV[4]), math.max(ARGV[5], 1), event_id)
if dedup and dedup ~= '' and tonumber(ARGV[7] or 0) > 0 then call('SET', dedup, id, 'PX', ARGV[7]) end
return {receivers, id, 0}
