#!lua
local job, lead_ms = ARGV[4], tonumber(ARGV[5])
local key = job_key(job)
-- Sent again, since nobody knew whether it had arrived.
if call('HGET', key, 'accepted') then return end
staged(job)
local had = call('HMGET', key, 'handicap', 'window', 'base', 'top', 'total', 'completed', 'failed', 'lane')
local rank, top, rows = now - had[1], tonumber(had[4]), had[5] - had[6] - had[7]
if had[2] then
  local expires = now + had[2]
  rank = math.min(rank, expires - lead_ms)
  call('HSET', key, 'expires', expires)
  call('ZADD', PREFIX .. ':windows', expires, job)
end
call('HSET', key, 'status', 'in_progress', 'accepted', now, 'rank', rank)
call('HINCRBY', STORE, 'pending', rows)
call('ZREM', PREFIX .. ':staged', job)
if had[8] == 'bulk' then call('SADD', PREFIX .. ':bases', had[3]) end
event(job, 'accepted')
local shards = 0
for number = 0, top - 1 do
  if call('EXISTS', shard_key(job, number)) == 1 then
    into_ready(job, number)
    shards = shards + 1
  end
end
count_ready(job, shards, rows)
settle(job)
