#!lua flags=allow-oom
local key = PREFIX .. ':lock:' .. ARGV[4]
if call('HGET', key, 'holder') == ARGV[5] then call('DEL', key) end
