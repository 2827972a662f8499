#!lua
local content, number, kept = unpack(ARGV, 4)
call('HSET', PREFIX .. ':content:' .. content, number, kept)
