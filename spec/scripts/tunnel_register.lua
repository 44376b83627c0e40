-- Enters the lane of a cluster agent, changes its entry, or enters it again after Redis or a lease was lost, and publishes
-- that.
-- KEYS tunnel:CLUSTER
-- ARGV agent, boot id, number, registration that the lane has or '', entry and announcement (each a JSON object without
--   its end), time to live in ms, agents_max, channel
-- Returns 1, registration.
--   0 or 2, registration of the newer lane of this agent id: of another process, or of the same one.
--   -1, '': the cluster has agents_max agents.
local held=redis.call('HGET',KEYS[1],ARGV[1]) local lane
if held then
  local ok,read=pcall(cjson.decode,held)
  -- A field that no gateway wrote gives way.
  if ok and type(read)=='table' and type(read.number)=='number' and type(read.registration)=='number' then lane=read end
elseif redis.call('HLEN',KEYS[1])>=tonumber(ARGV[8]) then return {-1,''} end
local number,mine=tonumber(ARGV[3]),tonumber(ARGV[4])
local r=lane and lane.registration or 0
if lane then
  local is_newer,is_same=false,lane.boot_id==ARGV[2]
  -- Of one process the numbers decide. Of two, the order in which Redis entered them.
  if is_same then is_newer=lane.number>number else is_newer=mine and r>mine end
  if is_newer then return {is_same and 2 or 0,string.format('%.0f',r)} end
end
if not (lane and mine and r==mine and lane.boot_id==ARGV[2] and lane.number==number) then
  local t=redis.call('TIME')
  r=mine and mine>r and mine or math.max(r+1,t[1]*1000000+t[2])
end
local g=string.format('%.0f',r)
redis.call('HSET',KEYS[1],ARGV[1],ARGV[5]..',"registration":'..g..'}')
if redis.call('PTTL',KEYS[1])<tonumber(ARGV[7]) then redis.call('PEXPIRE',KEYS[1],ARGV[7]) end
redis.call('PUBLISH',ARGV[9],ARGV[6]..',"registration":'..g..'}')
return {1,g}
