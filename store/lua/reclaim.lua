#!lua
local worker, job, number, lease_ms = unpack(ARGV, 4)
local key = shard_key(job, number)
local state, deadline = unpack(call('HMGET', key, 'state', 'deadline'))
if state == 'ready' and status_of(job) == 'in_progress' then
  not_ready(job, number)
elseif state == 'leased' and now > tonumber(deadline) then
  unlease(job, number)
  call('HINCRBY', key, 'attempts', 1)
else
  return false
end
event(job, string.format('shard %d taken up again by %s', number, worker))
return lease(job, tonumber(number), worker, lease_ms)
