#!lua
local job, counts, entry = unpack(ARGV, 4)
staged(job)
local key = job_key(job)
-- Sent again, since nobody knew whether it had arrived.
if call('LINDEX', key .. ':chunks', -1) == entry then return end
local rows, failed, prompt, completion = #counts / 16, 0, 0, 0
for at = 1, #counts, 16 do
  local _, bad, read, written = struct.unpack('<I4I4I4I4', counts, at)
  failed, prompt, completion = failed + bad, prompt + read, completion + written
end
call('HINCRBY', key, 'total', rows)
call('HINCRBY', key, 'completed', rows - failed)
call('HINCRBY', key, 'failed', failed)
call('HINCRBY', key, 'prompt', prompt)
call('HINCRBY', key, 'completion', completion)
call('RPUSH', key .. ':chunks', entry)
