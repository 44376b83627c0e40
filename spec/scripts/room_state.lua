-- Changes the state of a member and publishes its message, if its connection still holds its place.
-- KEYS {room:ROOM}:members, :meta, :entities, :positions
-- ARGV client, connection, channel, message with its head, time to live in ms, op, and by op
--   spawn    entity, snapshot (a spawn, or an update merged into it)
--   despawn  entity
--   presence json of the record
-- Returns the receivers of the message; -1 where the member has left or has another connection: nothing was done.
local held=redis.call('HGET',KEYS[1],ARGV[1])
local c,u if held then c,u=held:match('^(%S+) (%S+) ') end
if c~=ARGV[2] then return -1 end
if ARGV[6]=='presence' then redis.call('HSET',KEYS[1],ARGV[1],c..' '..u..' '..ARGV[7])
else
  local field=ARGV[1]..' '..ARGV[7]
  if ARGV[6]=='spawn' then
    redis.call('HSET',KEYS[3],field,ARGV[8])
    -- Members renew all keys at half-time; a key that is new expires with the others.
    if redis.call('PTTL',KEYS[3])<ARGV[5]/2 then redis.call('PEXPIRE',KEYS[3],ARGV[5]) end
  else redis.call('HDEL',KEYS[3],field) redis.call('HDEL',KEYS[4],field) end
end
return redis.call('PUBLISH',ARGV[3],ARGV[4])
