-- Removes the lane of a cluster agent and publishes that, unless a newer lane has its place.
-- KEYS tunnel:CLUSTER
-- ARGV agent, server, boot id and number ('': any lane of the server), announcement (a JSON object without its end),
--   channel
-- Returns 1, or 0: another lane has the place, or none.
local held=redis.call('HGET',KEYS[1],ARGV[1])
if not held then return 0 end
local ok,lane=pcall(cjson.decode,held)
if not ok or type(lane)~='table' or type(lane.number)~='number' or type(lane.registration)~='number' then return 0 end
if lane.server_id~=ARGV[2] then return 0 end
if ARGV[3]~='' and (lane.boot_id~=ARGV[3] or lane.number~=tonumber(ARGV[4])) then return 0 end
redis.call('HDEL',KEYS[1],ARGV[1])
redis.call('PUBLISH',ARGV[6],ARGV[5]..string.format(',"boot_id":%s,"number":%.0f,"registration":%.0f}',
  cjson.encode(lane.boot_id),lane.number,lane.registration))
return 1
