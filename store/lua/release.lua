#!lua flags=allow-oom
local job, number, token = ARGV[4], ARGV[5], ARGV[6]
local key = held(job, number, token)
if not key then return end
if #ARGV > 6 then
  local suspects = suspects_of(key)
  for at = 7, #ARGV do suspects[ARGV[at]] = suspects[ARGV[at]] or 0 end
  call('HSET', key, 'suspects', cjson.encode(suspects))
  event(job, string.format('the engine died with %d rows of shard %s in it', #ARGV - 6, number))
end
give_back(job, number)
