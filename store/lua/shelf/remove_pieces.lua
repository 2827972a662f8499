#!lua flags=allow-oom
call('UNLINK', PREFIX .. ':content:' .. ARGV[4])
