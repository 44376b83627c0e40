-- Reads logs, and the token streams of a session, as they stand at one moment.
--
-- KEYS  log 1 … log N, epoch (set to now where it is absent: the store is new to us)
-- ARGV  after ("": no entries; "0-0": all that are held), event_id (to continue behind the entry with it),
--       entries_max, bytes_max (of each log; at least one entry), scan_max (of each log, for event_id),
--       and for token streams: index, prefix of their keys, streams_bytes_max (the newest; at least one)
-- Answers {now_ms, epoch_ms, resolved, {log, …}, {stream, …}}
--   resolved: `after`, or the id of the newest entry with event_id; "": there is none
--   log: {last, first, prev of the first, 1 if these are all entries, {id, prev, event_id, data, id, …}};
--   last, first and prev are "" where there is no entry
--   stream, in the order in which they were opened: {stream, state, seq, text, meta, error}
local call = redis.call
local logs, epoch_key = #KEYS - 1, KEYS[#KEYS]
local after, event_id, entries_max, bytes_max = ARGV[1], ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])

local time = call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local epoch = tonumber(call('GET', epoch_key) or nil)
if not epoch then
  epoch = now
  call('SET', epoch_key, string.format('%.0f', now))
end

local function event_id_of(fields)
  return fields[5] == 'event_id' and fields[6] or ''
end

local function find(log)
  local to, left = '+', tonumber(ARGV[5])
  while left > 0 do
    local count = math.min(left, 64)
    local entries = call('XREVRANGE', log, to, '-', 'COUNT', count)
    for _, entry in ipairs(entries) do
      if event_id_of(entry[2]) == event_id then return entry[1] end
      to = '(' .. entry[1]
    end
    if #entries < count then return nil end
    left = left - count
  end
end

local function is_newer(a, b)
  if b == '' then return true end
  local a_ms, a_seq = string.match(a, '(%d+)-(%d+)')
  local b_ms, b_seq = string.match(b, '(%d+)-(%d+)')
  return a_ms * 1 > b_ms * 1 or (a_ms == b_ms and a_seq * 1 > b_seq * 1)
end

if event_id ~= '' then
  after = ''
  for n = 1, logs do
    local id = find(KEYS[n])
    if id and is_newer(id, after) then after = id end
  end
end

local function page(log)
  local list, held, bytes, from, count = {}, 0, 0, '(' .. after, 4
  while true do
    -- One more than wanted tells whether these are all.
    count = math.min(count * 2, 256, entries_max - held + 1)
    local entries = call('XRANGE', log, from, '+', 'COUNT', count)
    for _, entry in ipairs(entries) do
      local fields, size = entry[2], #list
      local data = fields[#fields]
      bytes = bytes + #data
      if held > 0 and (held == entries_max or bytes > bytes_max) then return list, 0 end
      held = held + 1
      list[size + 1], list[size + 2] = entry[1], fields[1] == 'prev' and fields[2] or ''
      list[size + 3], list[size + 4] = event_id_of(fields), data
      from = '(' .. entry[1]
    end
    if #entries < count then return list, 1 end
  end
end

local answer = {}
for n = 1, logs do
  local last = call('XREVRANGE', KEYS[n], '+', '-', 'COUNT', 1)[1]
  if not last then
    answer[n] = {'', '', '', 1, {}}
  else
    local first, list, complete = call('XRANGE', KEYS[n], '-', '+', 'COUNT', 1)[1], {}, 1
    if after ~= '' and after ~= last[1] then list, complete = page(KEYS[n]) end
    answer[n] = {last[1], first[1], first[2][1] == 'prev' and first[2][2] or '', complete, list}
  end
end

local streams = {}
if ARGV[6] then
  local bytes = 0
  for _, stream in ipairs(call('ZREVRANGE', ARGV[6], 0, 15)) do
    local key = ARGV[7] .. stream
    local state = call('HMGET', key, 'state', 'seq', 'meta', 'error', 'bytes')
    if state[1] then
      bytes = bytes + state[5]
      if #streams > 0 and bytes > tonumber(ARGV[8]) then break end
      local text = call('GET', key .. ':text') or ''
      table.insert(streams, 1, {stream, state[1], tonumber(state[2]), text, state[3], state[4]})
    end
  end
end
return {now, epoch, after, answer, streams}
