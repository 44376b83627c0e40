-- Writes positions of members whose connections hold their places. Publishes nothing.
-- KEYS {room:ROOM}:members, :meta, :entities, :positions
-- ARGV time to live in ms, then client, connection, entity, position, … (at most 1,000 positions)
-- Returns the number of positions that were written: those of members that have left or have another connection are not.
local clients,fields={},{}
for i=2,#ARGV,4 do clients[#clients+1]=ARGV[i] end
if #clients==0 then return 0 end
local records=redis.call('HMGET',KEYS[1],unpack(clients))
for n=1,#clients do
  local i,held=4*n-2,records[n]
  if held and held:match('^(%S+)')==ARGV[i+1] then
    fields[#fields+1]=ARGV[i]..' '..ARGV[i+2]
    fields[#fields+1]=ARGV[i+3]
  end
end
if #fields==0 then return 0 end
-- Members renew all keys at half-time; a key that is new expires with the others.
if redis.call('HSET',KEYS[4],unpack(fields))>0 and redis.call('PTTL',KEYS[4])<ARGV[1]/2 then redis.call('PEXPIRE',KEYS[4],ARGV[1]) end
return #fields/2
