#!lua flags=no-writes
local kind, owner = ARGV[4], ARGV[5]
local count = call('ZCARD', records_key(kind) .. ':' .. owner)
local size = tonumber(call('HGET', PREFIX .. ':sizes:' .. kind, owner) or 0)
-- Those whose time is up are counted until they are removed, which is soon: there are few.
for _, id in ipairs(call('ZRANGE', due_key(kind), '-inf', now, 'BYSCORE')) do
  local had = call('HMGET', record_key(kind, id), 'owner', 'size')
  if had[1] == owner then count, size = count - 1, size - had[2] end
end
return {count, size}
