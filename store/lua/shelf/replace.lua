#!lua flags=allow-oom
-- In place of what is there: also when the server is full, so that what has begun can end.
local kind, id, version, data, size, ttl_ms = unpack(ARGV, 4)
local key, had = record_key(kind, id), record(kind, id)
if not had then fail('NORECORD') end
if had[5] ~= version then fail('CHANGED') end
local number = call('HINCRBY', STORE, 'records', 1)
call('HSET', key, 'data', data, 'version', number)
if size ~= '' then
  call('HSET', key, 'size', size)
  add_size(kind, had[2], size - had[4])
end
set_expiry(kind, id, ttl_ms)
return fields(kind, id)
