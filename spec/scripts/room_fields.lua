-- Writes entities or positions of members whose connections hold their places. Publishes nothing.
-- KEYS {room:ROOM}:members, :meta, :entities, :positions
-- ARGV 'entities' or 'positions', time to live in ms, 'absent' or '' ('absent': fields of clients that are no members are
--   written too, since these are about to join again), then client, connection, entity, value, … (at most 1,000 fields)
-- Returns the number of fields that were written: those of members that have left or have another connection are not.
local key=ARGV[1]=='entities' and KEYS[3] or KEYS[4]
local clients,fields={},{}
for i=4,#ARGV,4 do clients[#clients+1]=ARGV[i] end
if #clients==0 then return 0 end
local records=redis.call('HMGET',KEYS[1],unpack(clients))
for n=1,#clients do
  local i,held=4*n,records[n]
  local c=held and held:match('^(%S+)')
  if c==ARGV[i+1] or (not held and ARGV[3]=='absent') then
    fields[#fields+1]=ARGV[i]..' '..ARGV[i+2]
    fields[#fields+1]=ARGV[i+3]
  end
end
if #fields==0 then return 0 end
-- Members renew all keys at half-time; a key that is new expires with the others.
if redis.call('HSET',key,unpack(fields))>0 and redis.call('PTTL',key)<ARGV[2]/2 then redis.call('PEXPIRE',key,ARGV[2]) end
return #fields/2
