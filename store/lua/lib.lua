-- What every script begins with. ARGV: the prefix of the store's keys, the store's id, the time in ms where a test moves it,
-- and then the command's own.
--
-- PREFIX:store     hash: id, format, pending (rows), expired (leases), and what was given so far: counter (tokens),
--                  published, jobs (numbers), records (versions)
-- PREFIX:jobs      every job of the bulk lane by its number
-- PREFIX:staged, :windows, :ended, :answered (ended ones of the ask lane)   jobs by a time, in ms
-- PREFIX:leased    shards by their deadline, in ms  PREFIX:ready:BASE[:ADAPTER]       shards by rank, in ms;
--                                                  no ADAPTER after the colon: of the base alone
-- PREFIX:bases     every base that had a shard      PREFIX:job:ID    hash            PREFIX:job:ID:events    list
-- PREFIX:waiting:BASE   jobs that have a ready shard, by when they were accepted, in ms
-- PREFIX:rows      hash: BASE to the rows of its ready shards that have no result
-- PREFIX:job:ID:chunks   list                       PREFIX:job:ID:shard:N    hash    PREFIX:job:ID:input:N   string
-- PREFIX:manifests, PREFIX:manifest:ID, PREFIX:manifest:ID:adapters    PREFIX:workers, PREFIX:seen    PREFIX:blob:SHA
--
-- BASE is that of the job's queue: `/ask` follows in the ask lane. What the shelf keeps is in `shelf/lib.lua`.
-- A shard is named JOB/NUMBER, with zeros so that equals are in order. A staged job's shards say ready already: nobody
-- sees them before they are in the ready sets.
local call = redis.call
local PREFIX = ARGV[1]
local STORE = PREFIX .. ':store'

local function fail(code) error({err = code}) end

if call('HGET', STORE, 'id') ~= ARGV[2] then fail('LOST') end

local time = call('TIME')
local now = tonumber(ARGV[3]) or time[1] * 1000 + math.floor(time[2] / 1000)

local ENDING = {cancelling = 'cancelled', finalizing = 'expired'}
local EVENTS = 1000

local function job_key(job) return PREFIX .. ':job:' .. job end
local function shard_key(job, number) return job_key(job) .. ':shard:' .. tonumber(number) end
local function shard_name(job, number) return string.format('%s/%06d', job, number) end
local function parse_name(name)
  local job, number = name:match('^(.*)/(%d+)$')
  return job, tonumber(number)
end

local function status_of(job) return call('HGET', job_key(job), 'status') end

-- Adds to one of a hash's sums, of which those that come to nothing are not kept.
local function add(key, field, change)
  if call('HINCRBY', key, field, 0 + change) == 0 then call('HDEL', key, field) end -- HINCRBY knows no -0
end

local function event(job, what)
  local number = call('HINCRBY', job_key(job), 'events', 1)
  call('RPUSH', job_key(job) .. ':events', cjson.encode({number, now, what}))
  call('LTRIM', job_key(job) .. ':events', -EVENTS, -1)
end

-- A staged job, or an error.
local function staged(job)
  if status_of(job) ~= 'validating' then fail('NOTFOUND') end
  call('ZADD', PREFIX .. ':staged', now, job)
end

local function ready_sets(job, number)
  local base = call('HGET', job_key(job), 'base')
  local adapters = cjson.decode(call('HGET', shard_key(job, number), 'adapters'))
  local sets = {PREFIX .. ':ready:' .. base}
  for _, adapter in ipairs(#adapters > 0 and adapters or {''}) do sets[#sets + 1] = sets[1] .. ':' .. adapter end
  return sets
end

-- So many shards more (or less) that wait, with so many rows that have no result.
local function count_ready(job, shards, rows)
  local base, accepted = unpack(call('HMGET', job_key(job), 'base', 'accepted'))
  add(PREFIX .. ':rows', base, rows)
  local waiting = call('HINCRBY', job_key(job), 'ready', shards)
  if waiting == 0 then
    call('ZREM', PREFIX .. ':waiting:' .. base, job)
  elseif waiting == shards then
    call('ZADD', PREFIX .. ':waiting:' .. base, accepted, job)
  end
end

local function undone(job, number)
  local had = call('HMGET', shard_key(job, number), 'rows', 'done')
  return had[1] - had[2]
end

local function into_ready(job, number)
  call('HSET', shard_key(job, number), 'state', 'ready')
  local rank = call('HGET', job_key(job), 'rank')
  for _, set in ipairs(ready_sets(job, number)) do call('ZADD', set, rank, shard_name(job, number)) end
end

local function make_ready(job, number)
  into_ready(job, number)
  count_ready(job, 1, undone(job, number))
end

local function not_ready(job, number)
  for _, set in ipairs(ready_sets(job, number)) do call('ZREM', set, shard_name(job, number)) end
  count_ready(job, -1, -undone(job, number))
end

local function end_job(job, status)
  local key = job_key(job)
  local had = call('HMGET', key, 'accepted', 'total', 'completed', 'failed', 'lane')
  if had[1] then call('HINCRBY', STORE, 'pending', had[3] + had[4] - had[2]) end
  call('HSET', key, 'status', status, 'ended', now)
  call('ZREM', PREFIX .. ':staged', job)
  call('ZREM', PREFIX .. ':windows', job)
  call('ZADD', PREFIX .. (had[5] == 'bulk' and ':ended' or ':answered'), now, job)
  event(job, status)
end

-- Ends a job that has nothing left to run.
local function settle(job)
  local status, shards, done, leased = unpack(call('HMGET', job_key(job), 'status', 'shards', 'shards_done', 'leased'))
  if ENDING[status] then
    if leased == '0' then end_job(job, ENDING[status]) end
  elseif shards == done then
    end_job(job, 'completed')
  end
end

local function drop_ready(job)
  local key = job_key(job)
  local accepted, top = unpack(call('HMGET', key, 'accepted', 'top'))
  for number = 0, top - 1 do
    if call('HGET', shard_key(job, number), 'state') == 'ready' then
      if accepted then not_ready(job, number) end
      call('HSET', shard_key(job, number), 'state', 'dropped')
    end
  end
end

-- A job that is to end: what nobody runs is dropped, what is leased may still commit.
local function begin_ending(job, status)
  call('HSET', job_key(job), 'status', status)
  call('ZREM', PREFIX .. ':windows', job)
  event(job, status)
  drop_ready(job)
  settle(job)
end

-- The shard of a lease that is held, or nil.
local function held(job, number, token)
  local key = shard_key(job, number)
  local had = call('HMGET', key, 'state', 'token', 'deadline')
  if had[1] == 'leased' and had[2] == token and now <= tonumber(had[3]) then return key end
end

local function lease(job, number, worker, lease_ms)
  local key, name = shard_key(job, number), shard_name(job, number)
  -- A restart can roll the counter back, so the server's own run is part of the token. It is not counted but taken from
  -- its run id: a count could be rolled back as well.
  local epoch = string.format('%.0f', tonumber(call('INFO', 'server'):match('run_id:(%x%x%x%x%x%x%x%x%x%x%x%x)'), 16))
  local counter = call('HINCRBY', STORE, 'counter', 1)
  call('HSET', key, 'state', 'leased', 'token', epoch .. '.' .. counter, 'deadline', now + lease_ms, 'worker', worker)
  call('ZADD', PREFIX .. ':leased', now + lease_ms, name)
  call('HINCRBY', job_key(job), 'leased', 1)
  local had = call('HMGET', key, 'rows', 'adapters', 'bits', 'suspects', 'attempts')
  return {job, number, epoch, counter, had[1], had[2], had[3] or '', had[4] or '{}', had[5] or 0}
end

-- A lease that is over; whether its shard is done, dropped or ready again is for the caller.
local function unlease(job, number)
  call('ZREM', PREFIX .. ':leased', shard_name(job, number))
  call('HDEL', shard_key(job, number), 'token', 'deadline', 'worker')
  call('HINCRBY', job_key(job), 'leased', -1)
end

-- A shard that comes back unfinished.
local function give_back(job, number)
  unlease(job, number)
  if ENDING[status_of(job)] then
    call('HSET', shard_key(job, number), 'state', 'dropped')
    settle(job)
  else
    make_ready(job, number)
  end
end

local function suspects_of(key) return cjson.decode(call('HGET', key, 'suspects') or '{}') end

local function remove_job(job)
  local key = job_key(job)
  local top = call('HGET', key, 'top')
  for number = 0, top - 1 do call('UNLINK', shard_key(job, number), key .. ':input:' .. number) end
  call('UNLINK', key, key .. ':chunks', key .. ':events')
  for _, set in ipairs({'jobs', 'staged', 'windows', 'ended', 'answered'}) do call('ZREM', PREFIX .. ':' .. set, job) end
end
