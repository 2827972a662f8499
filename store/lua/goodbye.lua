#!lua flags=allow-oom
call('HDEL', PREFIX .. ':workers', ARGV[4])
call('ZREM', PREFIX .. ':seen', ARGV[4])
