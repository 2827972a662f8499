#!lua flags=no-writes
local found = {}
for _, worker in ipairs(call('ZRANGE', PREFIX .. ':seen', now - ARGV[4], '+inf', 'BYSCORE')) do
  found[#found + 1] = call('HGET', PREFIX .. ':workers', worker)
end
return found
