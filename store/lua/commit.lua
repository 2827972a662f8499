#!lua
local job, number, token, counts, entry = unpack(ARGV, 4)
local shard = held(job, number, token)
if not shard then fail('FENCED') end
local had = call('HMGET', shard, 'rows', 'done', 'bits')
local rows, bits = tonumber(had[1]), had[3] or ''

-- Bit p, a byte's highest first, is set once the row at position p has its result.
local bytes = {bits:byte(1, -1)}
for at = #bytes + 1, math.ceil(rows / 8) do bytes[at] = 0 end
local new, failed, prompt, completion = 0, 0, 0, 0
for at = 1, #counts, 16 do
  local position, bad, read, written = struct.unpack('<I4I4I4I4', counts, at)
  if position >= rows then fail('POSITION') end
  local byte, mask = math.floor(position / 8) + 1, bit.lshift(1, 7 - position % 8)
  if bit.band(bytes[byte], mask) == 0 then
    bytes[byte] = bytes[byte] + mask
    new, failed, prompt, completion = new + 1, failed + bad, prompt + read, completion + written
  end
end
if new == 0 then return {0, 0} end

local key = job_key(job)
call('HSET', shard, 'bits', string.char(unpack(bytes)), 'done', had[2] + new)
call('HINCRBY', key, 'completed', new - failed)
call('HINCRBY', key, 'failed', failed)
call('HINCRBY', key, 'prompt', prompt)
call('HINCRBY', key, 'completion', completion)
call('HINCRBY', STORE, 'pending', -new)
call('RPUSH', key .. ':chunks', entry)
if had[2] + new < rows then return {new, 0} end
unlease(job, number)
call('HSET', shard, 'state', 'done')
call('HINCRBY', key, 'shards_done', 1)
settle(job)
return {new, 1}
