#!lua flags=allow-oom
local job, number, token, position = unpack(ARGV, 4)
local key = held(job, number, token)
if not key then fail('FENCED') end
local suspects = suspects_of(key)
suspects[position] = (suspects[position] or 0) + 1
call('HSET', key, 'suspects', cjson.encode(suspects))
event(job, string.format('the engine died with row %s of shard %s alone in it', position, number))
return suspects[position]
