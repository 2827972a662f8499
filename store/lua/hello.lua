#!lua flags=allow-oom
local worker, record = ARGV[4], ARGV[5]
call('HSET', PREFIX .. ':workers', worker, record)
call('ZADD', PREFIX .. ':seen', now, worker)
