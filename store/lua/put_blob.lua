#!lua
call('SET', PREFIX .. ':blob:' .. ARGV[4], ARGV[5])
