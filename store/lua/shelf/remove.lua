#!lua flags=allow-oom
local kind, id = ARGV[4], ARGV[5]
local owner, size = unpack(call('HMGET', record_key(kind, id), 'owner', 'size'))
if not owner then return 0 end
call('UNLINK', record_key(kind, id))
call('ZREM', records_key(kind), id)
call('ZREM', records_key(kind) .. ':' .. owner, id)
call('ZREM', due_key(kind), id)
add_size(kind, owner, -size)
return 1
