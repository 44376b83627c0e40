-- Removes members from a room whose connections still hold their places, with their entities and positions. A
-- client that came back with another connection stays.
-- KEYS {room:ROOM}:members, :meta, :entities, :positions
-- ARGV channel, origin of the head (server 8, connection 8, flags 1), time in ms for which an empty room is kept,
--   number of members, then client, connection, … ('': a client that is no member has left fields behind), then the
--   fields '<client> <entity>' of these members; '*' instead: all fields are searched
-- Returns the clients that were removed. Published: L for each.
local gone,left={},{}
local last=4+2*tonumber(ARGV[4])
-- All keys are read before the first write, and the members never after one: a hash that has become empty is gone, which
-- is an error where its slot of a Redis Cluster is on the move.
local held,count={},redis.call('HLEN',KEYS[1])
for i=5,last,2 do held[i]=redis.call('HGET',KEYS[1],ARGV[i]) end
for i=5,last,2 do
  local client=ARGV[i]
  if not held[i] then left[client]=true
  elseif held[i]:match('^(%S+)')==ARGV[i+1] and not left[client] then
    redis.call('HDEL',KEYS[1],client) gone[#gone+1]=client left[client]=true count=count-1
    local n=redis.call('HINCRBY',KEYS[2],'v',1)
    -- A new life of the room begins at the time, so that no version comes back.
    if n==1 then
      local t=redis.call('TIME') n=t[1]*1000000+t[2]
      redis.call('HSET',KEYS[2],'v',string.format('%.0f',n))
    end
    redis.call('PUBLISH',ARGV[1],'\255R\1L'..ARGV[2]..string.format('%.0f',n)..' '..client)
  end
end
if next(left)==nil then return gone end
if count==0 then
  redis.call('DEL',KEYS[3],KEYS[4])
  if #gone>0 then redis.call('PEXPIRE',KEYS[2],ARGV[3]) end
  return gone
end
-- A room has few fields by its limits. Where it has too many, those that stay are removed as left behind.
local function remove(key,n,fields,from)
  local some={}
  for i=from,#fields do
    local owner=fields[i]:match('^(%S+) ')
    if owner and left[owner] then some[#some+1]=fields[i] end
    if #some==1000 or (i==#fields and #some>0) then n=n-redis.call('HDEL',key,unpack(some)) some={} end
    if n==0 then return end
  end
end
for k=3,4 do
  local n=redis.call('HLEN',KEYS[k])
  if n>0 and ARGV[last+1]~='*' then remove(KEYS[k],n,ARGV,last+1)
  elseif n>0 and n<=50000 then remove(KEYS[k],n,redis.call('HKEYS',KEYS[k]),1) end
end
return gone
