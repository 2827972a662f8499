#!lua flags=no-writes
local kind, limit = ARGV[4], ARGV[5]
local found = {}
for _, id in ipairs(call('ZRANGE', due_key(kind), '-inf', now, 'BYSCORE', 'LIMIT', 0, limit)) do
  found[#found + 1] = fields(kind, id)
end
return found
