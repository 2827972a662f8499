#!lua flags=allow-oom
local key, holder, ms = PREFIX .. ':lock:' .. ARGV[4], ARGV[5], ARGV[6]
local had = call('HMGET', key, 'holder', 'until')
if had[1] and had[1] ~= holder and tonumber(had[2]) > now then return 0 end
call('HSET', key, 'holder', holder, 'until', now + ms)
-- Some time after that nobody has to remember it.
call('PEXPIRE', key, ms + 60000)
return 1
