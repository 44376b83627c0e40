-- Reads logs, and the token streams of a session, as they stand at one moment.
--
-- KEYS  log 1 … log N, and behind them the clock where they share one
-- ARGV  N, after ("": no entries; "0-0": all that are held), event_id (to continue behind the entry with it),
--       entries_max, bytes_max (of each log; at least one entry), head_ms (a log without head gets one that lives
--       so long; "": none), and streams_bytes_max for the token streams of log 1 (the newest; at least one; "": none)
-- Answers {now_ms, moment, resolved, known, {log, …}, {stream, …}}
--   moment: the last id of the clock, or the time as an id: what is not above it is complete
--   resolved: `after`, or the position of the entry with event_id; "": there is none, "?": there are several
--   known: 1 if it is of a message to one connection, which none of the logs holds
--   log: {head, 1 if the head was made now, 1 if the entries begin where the log's life does, 1 if no client
--         that comes back has this log, 1 if these are all behind `after`, {position, prev, event_id, data, position, …}};
--         head is "" where there is none, and `1-0-<tag>` where its life has no entry yet
--   stream, in the order in which they were opened: {stream, state, seq, text, meta, error}
local call, match = redis.call, string.match
local logs, clock = tonumber(ARGV[1]), KEYS[tonumber(ARGV[1]) + 1]
local after, event_id, entries_max, bytes_max = ARGV[2], ARGV[3], tonumber(ARGV[4]), tonumber(ARGV[5])
local head_ms, streams_bytes_max = ARGV[6], tonumber(ARGV[7])

local time = call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local moment = string.format('%.0f-0', now)
if clock then moment = (call('XREVRANGE', clock, '+', '-', 'COUNT', 1)[1] or {''})[1] end

local function beside(log, what)
  return string.sub(log, 1, -4) .. what
end

local function meta_of(entry)
  local fields = entry[2]
  if fields[1] ~= 'meta' then return '00000000', '', 0, 0, '' end
  local tag, prev, sum, removed, own = match(fields[2], '^(%x+) (%S+) (%d+) (%d+) (.*)$')
  return tag or '00000000', prev or '', tonumber(sum or 0), removed or 0, own or ''
end

-- An error where a slot of a Redis Cluster is on the move, and something that seems not to be there may be at the other
-- node: no key that is not there is read as empty then.
local function surely(key, other)
  call('EXISTS', key, other)
end

local function find(ids, text)
  local found = call('HGET', ids, text) or call('HGET', ids .. ':old', text) or nil
  if not found then
    surely(KEYS[1], ids)
    surely(KEYS[1], ids .. ':old')
  end
  return found
end

local known, connections = 0, clock and string.sub(clock, 1, -6) .. 'connection:ids'
if event_id ~= '' then
  local found = {}
  for n = 1, logs do found[#found + 1] = find(beside(KEYS[n], 'ids'), event_id) end
  local private = connections and find(connections, event_id)
  if private then
    found[#found + 1] = private
    known = 1
  end
  after = (#found > 1 or found[1] == '') and '?' or found[1] or ''
elseif connections and after ~= '' and after ~= '0-0' and find(connections, after) then
  known = 1
end
local resolved, from = after, match(after, '^%d+%-%d+')

-- A client that comes back has a new connection, and never the log of its old one.
local function is_private(log)
  return match(log, '}:connection:[^:]*:log$') ~= nil
end

-- All heads are read before the first one is made.
local heads = {}
for n = 1, logs do
  heads[n] = call('HMGET', beside(KEYS[n], 'head'), 'position', 'sum')
  if not heads[n][1] then surely(KEYS[n], beside(KEYS[n], 'head')) end
end

local streams = {}
if streams_bytes_max then
  local bytes, index = 0, beside(KEYS[1], 'streams')
  local found = call('ZREVRANGE', index, 0, 15)
  if #found == 0 then surely(KEYS[1], index) end
  for _, stream in ipairs(found) do
    local key = beside(KEYS[1], 'stream:' .. stream)
    local state = call('HMGET', key, 'state', 'seq', 'meta', 'error', 'bytes')
    local text = call('GET', key .. ':text')
    if not state[1] or not text then surely(key, key .. ':text') end
    if state[1] then
      bytes = bytes + state[5]
      if #streams > 0 and bytes > streams_bytes_max then break end
      table.insert(streams, 1, {stream, state[1], tonumber(state[2]), text or '', state[3], state[4]})
    end
  end
end

-- Answers head, sum, and 1 if it was made now.
local function head_of(n)
  local log, head = KEYS[n], heads[n]
  local key = beside(log, 'head')
  if head[1] then
    if head_ms ~= '' then call('PEXPIRE', key, head_ms, 'GT') end
    return head[1], head[2], 0
  end
  local last = call('XREVRANGE', log, '+', '-', 'COUNT', 1)[1]
  local position, sum, removed = '', 0, 0
  if last then
    local tag, _
    tag, _, sum, removed = meta_of(last)
    position = last[1] .. '-' .. tag
  end
  if head_ms == '' or is_private(log) then return position, sum, 0 end
  local is_new = position == '' and 1 or 0
  if position == '' then
    position = '1-0-' .. string.sub(redis.sha1hex(log .. time[1] .. time[2]), 1, 8)
  end
  call('HSET', key, 'position', position, 'sum', string.format('%.0f', sum), 'removed', removed)
  call('PEXPIRE', key, head_ms)
  return position, sum, is_new
end

local function page(log)
  local list, held, bytes, next_from, count, is_start = {}, 0, 0, '(' .. from, 4, nil
  while true do
    -- One more than wanted tells whether these are all.
    count = math.min(count * 2, 256, entries_max - held + 1)
    local entries = call('XRANGE', log, next_from, '+', 'COUNT', count)
    for _, entry in ipairs(entries) do
      local fields, size = entry[2], #list
      local data, tag, prev, sum, _, own = fields[#fields], meta_of(entry)
      if is_start == nil then is_start = sum == #data + 1 end
      bytes = bytes + #data
      if held > 0 and (held == entries_max or bytes > bytes_max) then return list, 0, is_start end
      held = held + 1
      list[size + 1], list[size + 2] = entry[1] .. '-' .. tag, prev
      list[size + 3], list[size + 4] = own, data
      next_from = '(' .. entry[1]
    end
    if #entries < count then return list, 1, is_start end
  end
end

local answer = {}
for n = 1, logs do
  local head, sum, is_new = head_of(n)
  local list, complete, is_start = {}, 1, nil
  if from and after ~= head then list, complete, is_start = page(KEYS[n]) end
  if is_start == nil then is_start = tonumber(sum or 0) == 0 end
  answer[n] = {head, is_new, is_start and 1 or 0, is_private(KEYS[n]) and 1 or 0, complete, list}
end

return {now, moment, resolved, known, answer, streams}
