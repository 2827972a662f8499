#!lua flags=no-writes
local after, limit = ARGV[4], tonumber(ARGV[5])
local start = 0
if after ~= '' then
  local rank = call('ZREVRANK', PREFIX .. ':jobs', after)
  if not rank then fail('NOTFOUND') end
  start = rank + 1
end
local found = {}
for _, job in ipairs(call('ZRANGE', PREFIX .. ':jobs', start, start + limit - 1, 'REV')) do
  found[#found + 1] = {call('HGETALL', job_key(job)), call('LLEN', job_key(job) .. ':chunks')}
end
return found
