#!lua flags=allow-oom
local renew, lease_ms = ARGV[4] == '1', ARGV[5]
local verdicts = {}
for at = 6, #ARGV, 3 do
  local job, number, token = ARGV[at], ARGV[at + 1], ARGV[at + 2]
  local key = held(job, number, token)
  if not key then
    verdicts[#verdicts + 1] = 'fenced'
  else
    if renew then
      call('HSET', key, 'deadline', now + lease_ms)
      call('ZADD', PREFIX .. ':leased', now + lease_ms, shard_name(job, number))
    end
    verdicts[#verdicts + 1] = ENDING[status_of(job)] and 'over' or 'held'
  end
end
return verdicts
