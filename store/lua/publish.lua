#!lua
local id, manifest, base, max_loras = unpack(ARGV, 4, 7)
local key = PREFIX .. ':manifest:' .. id
call('HSET', key, 'manifest', manifest, 'base', base, 'max_loras', max_loras)
for at = 8, #ARGV do call('SADD', key .. ':adapters', ARGV[at]) end
call('ZADD', PREFIX .. ':manifests', call('HINCRBY', STORE, 'published', 1), id)
