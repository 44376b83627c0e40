-- Releases the place of a user's agent, unless another connection holds it. The generation stays for a while, so that
-- no older connection takes the place again.
-- KEYS {agent:USER:server}:owner, agent:USER:server
-- ARGV connection, time for which the generation stays in ms (>= 1), channel of commands
-- Returns 1 and the generation, or 0.
local held=redis.call('HMGET',KEYS[1],'connection','gen')
if held[1]~=ARGV[1] then return {0} end
redis.call('HDEL',KEYS[1],'connection','server') redis.call('PEXPIRE',KEYS[1],ARGV[2]) redis.call('DEL',KEYS[2])
redis.call('PUBLISH',ARGV[3],
  '{"type":"owner","connectionId":null,"generation":"'..held[2]..'","former":"'..ARGV[1]..'"}')
return {1,held[2]}
