-- Claims, keeps or takes again the place of a user's agent, and publishes the marker when the holder changes.
-- KEYS {agent:USER:server}:owner, agent:USER:server
-- ARGV connection, server, held generation or '', time to live in ms, channel of commands, '1' to announce or '',
--   replacements per minute (0: no limit)
-- Returns 1, generation, connection before, server before, subscribers of the channel (-1: unknown).
--   0, generation, connection and server of the newer holder ('': it has left).
--   -1, seconds to wait, connection and server of the holder: too many replacements.
local t=redis.call('TIME') local now=t[1]*1000000+t[2]
local held=redis.call('HMGET',KEYS[1],'gen','connection','server','window','replaced')
local gen=tonumber(held[1] or '0') local mine=tonumber(ARGV[3]) local most=tonumber(ARGV[7])
if mine and held[2]~=ARGV[1] and gen>=mine then
  return {0,string.format('%.0f',gen),held[2] or '',held[3] or ''}
end
if not mine and held[2] and held[2]~=ARGV[1] and most>0 then
  local window,n=tonumber(held[4] or '0'),tonumber(held[5] or '0')
  -- A clock that was set back begins a new minute.
  if now-window>=60000000 or now<window then window,n=now,0 end
  if n>=most then
    return {-1,string.format('%.0f',math.ceil((window+60000000-now)/1000000)),held[2],held[3]}
  end
  redis.call('HSET',KEYS[1],'window',string.format('%.0f',window),'replaced',n+1)
end
local g=string.format('%.0f',mine and math.max(mine,gen) or math.max(gen+1,now))
redis.call('HSET',KEYS[1],'gen',g,'connection',ARGV[1],'server',ARGV[2])
redis.call('PEXPIRE',KEYS[1],ARGV[4]) redis.call('SET',KEYS[2],ARGV[2],'PX',ARGV[4])
if held[2]~=ARGV[1] or ARGV[6]=='1' then
  -- A reader that missed messages sees by the former holder whether it has missed a marker.
  local former=held[2] and cjson.encode(held[2]) or 'null'
  redis.call('PUBLISH',ARGV[5],
    '{"type":"owner","connectionId":"'..ARGV[1]..'","generation":"'..g..'","former":'..former..'}')
end
-- A user without the permission for PUBSUB gets an error, which must not end the script.
local listening=-1
if held[2]~=ARGV[1] then
  local counted=redis.pcall('PUBSUB','NUMSUB',ARGV[5])
  if not counted.err then listening=tonumber(counted[2]) end
end
return {1,g,held[2] or '',held[3] or '',listening}
