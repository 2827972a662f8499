#!lua
local kind, id, owner, data, size, ttl_ms = unpack(ARGV, 4)
local key = record_key(kind, id)
if call('EXISTS', key) == 1 then fail('EXISTS') end
local number = call('HINCRBY', STORE, 'records', 1)
call('HSET', key, 'owner', owner, 'data', data, 'size', size, 'version', number, 'created', now)
call('ZADD', records_key(kind), number, id)
call('ZADD', records_key(kind) .. ':' .. owner, number, id)
add_size(kind, owner, size)
set_expiry(kind, id, ttl_ms)
return fields(kind, id)
