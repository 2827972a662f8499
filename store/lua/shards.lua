#!lua flags=no-writes
local job = ARGV[4]
local status, top = unpack(call('HMGET', job_key(job), 'status', 'top'))
if not status then fail('NOTFOUND') end
local found = {}
for number = 0, top - 1 do
  local had = call('HMGET', shard_key(job, number), 'state', 'rows', 'done', 'adapters', 'attempts', 'worker', 'suspects')
  if had[1] then
    if status == 'validating' then had[1] = 'staged' end
    found[#found + 1] = {number, had}
  end
end
return found
