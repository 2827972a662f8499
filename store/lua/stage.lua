#!lua
local job, spec, base, lane, handicap_ms, window_ms = unpack(ARGV, 4)
local key = job_key(job)
if call('EXISTS', key) == 1 then fail('TAKEN') end
call('HSET', key, 'spec', spec, 'base', base, 'lane', lane, 'handicap', handicap_ms, 'status', 'validating', 'created', now)
call('HSET', key, 'total', 0, 'completed', 0, 'failed', 0, 'prompt', 0, 'completion', 0)
call('HSET', key, 'shards', 0, 'shards_done', 0, 'leased', 0, 'ready', 0, 'top', 0)
if window_ms ~= '' then call('HSET', key, 'window', window_ms) end
if lane == 'bulk' then call('ZADD', PREFIX .. ':jobs', call('HINCRBY', STORE, 'jobs', 1), job) end
call('ZADD', PREFIX .. ':staged', now, job)
