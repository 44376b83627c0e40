-- Joins a client to a room, changes its record, or joins it again after Redis or its lease was lost.
-- KEYS {room:ROOM}:members, :meta, :entities, :positions
-- ARGV client, connection, user, json, members_max (0: no limit), channel, origin of the head (server 8, connection 8,
--   flags 1), time to live in ms, 'again' or '', then entity, snapshot, … of a member that joins again: it has these
--   entities. All are written where the client became a member, otherwise those that are not there.
-- Returns 1, presence version, connection before ('': the client was no member).
--   0, 'taken', '': another user has this client id.
--   0, 'replaced', connection: another connection holds the place, which 'again' never takes.
--   0, 'full', '': the room has members_max members.
-- Published: J where the client became a member, X where another connection held its place, then E for each entity that
--   was written.
local held=redis.call('HGET',KEYS[1],ARGV[1]) local record=ARGV[2]..' '..ARGV[3]..' '..ARGV[4]
local c,u if held then c,u=held:match('^(%S+) (%S+) ') end
if held and u~=ARGV[3] then return {0,'taken',''} end
if held and c~=ARGV[2] and ARGV[9]=='again' then return {0,'replaced',c} end
local most=tonumber(ARGV[5])
if not held and most>0 and redis.call('HLEN',KEYS[1])>=most then return {0,'full',''} end
redis.call('HSET',KEYS[1],ARGV[1],record)
local v=redis.call('HGET',KEYS[2],'v') or '0'
if not held then
  local n=redis.call('HINCRBY',KEYS[2],'v',1)
  -- A new life of the room begins at the time, so that no version comes back.
  if n==1 then
    local t=redis.call('TIME') n=t[1]*1000000+t[2]
    redis.call('HSET',KEYS[2],'v',string.format('%.0f',n))
  end
  v=string.format('%.0f',n)
  redis.call('PUBLISH',ARGV[6],'\255R\1J'..ARGV[7]..v..' '..ARGV[1]..' '..record)
elseif c~=ARGV[2] then
  redis.call('PUBLISH',ARGV[6],'\255R\1X'..ARGV[7]..c..' '..ARGV[1]..' '..record)
end
for i=10,#ARGV,2 do
  local is_new=redis.call(held and 'HSETNX' or 'HSET',KEYS[3],ARGV[1]..' '..ARGV[i],ARGV[i+1])
  if not held or is_new==1 then redis.call('PUBLISH',ARGV[6],'\255R\1E'..ARGV[7]..ARGV[i+1]) end
end
for _,key in ipairs(KEYS) do redis.call('PEXPIRE',key,ARGV[8]) end
return {1,v,c or ''}
