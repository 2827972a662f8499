#!lua flags=allow-oom
local staging_ms, retention_ms, ask_retention_ms, worker_ttl_ms, most = unpack(ARGV, 4)
local function due(set, time_ms)
  return call('ZRANGE', PREFIX .. ':' .. set, '-inf', time_ms, 'BYSCORE', 'LIMIT', 0, most)
end

local expired = due('windows', now)
for _, job in ipairs(expired) do begin_ending(job, 'finalizing') end
local leases = due('leased', '(' .. now)
for _, name in ipairs(leases) do
  local job, number = parse_name(name)
  local worker = call('HGET', shard_key(job, number), 'worker')
  event(job, string.format('shard %d taken back: %s was not heard of in time', number, worker))
  call('HINCRBY', shard_key(job, number), 'attempts', 1)
  give_back(job, number)
end
if #leases > 0 then call('HINCRBY', STORE, 'expired', #leases) end
local abandoned = due('staged', now - staging_ms)
for _, job in ipairs(abandoned) do remove_job(job) end
for _, worker in ipairs(due('seen', '(' .. now - worker_ttl_ms)) do
  call('HDEL', PREFIX .. ':workers', worker)
  call('ZREM', PREFIX .. ':seen', worker)
end
-- Those past their retention are only named: their files go first, and then they.
return {#leases, #expired, abandoned, due('ended', now - retention_ms), due('answered', now - ask_retention_ms)}
