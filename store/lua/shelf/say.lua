#!lua
local key, data, kept_ms = PREFIX .. ':said:' .. ARGV[4], ARGV[5], ARGV[6]
call('RPUSH', key, data)
call('PEXPIRE', key, kept_ms)
