#!lua
local job, number, rows, adapters, kept = unpack(ARGV, 4)
staged(job)
local key = job_key(job)
-- Sent again, since nobody knew whether it had arrived: not counted again.
if call('EXISTS', shard_key(job, number)) == 0 then
  call('HINCRBY', key, 'total', rows)
  call('HINCRBY', key, 'shards', 1)
  call('HSET', key, 'top', math.max(call('HGET', key, 'top'), number + 1))
end
call('HSET', shard_key(job, number), 'state', 'ready', 'rows', rows, 'done', 0, 'adapters', adapters)
call('SET', key .. ':input:' .. tonumber(number), kept)
