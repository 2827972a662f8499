#!lua
local worker, manifest, lease_ms = ARGV[4], PREFIX .. ':manifest:' .. ARGV[5], ARGV[6]
local head, per_adapter, look_on, affinity_ms = tonumber(ARGV[7]), tonumber(ARGV[8]), tonumber(ARGV[9]), tonumber(ARGV[10])
local suffix = ARGV[11]
local base, max_loras = unpack(call('HMGET', manifest, 'base', 'max_loras'))
if not base then fail('NOMANIFEST') end
local ready = PREFIX .. ':ready:' .. base .. suffix
-- Asked again and again, and mostly there is nothing.
if call('EXISTS', ready) == 0 then return false end
local resident = {}
for at = 12, #ARGV do resident[ARGV[at]] = true end

-- What it is worth here that a shard needs these adapters; nil if they cannot be served. Many shards need the same.
local worths = {}
local function worth_of(adapters)
  local known = worths[adapters]
  if known ~= nil then return known end
  local keys, share = cjson.decode(adapters), 1
  worths[adapters] = false
  if #keys > tonumber(max_loras) then return false end
  if #keys > 0 then
    local hits = 0
    for _, key in ipairs(keys) do
      if call('SISMEMBER', manifest .. ':adapters', key) == 0 then return false end
      if resident[key] then hits = hits + 1 end
    end
    share = hits / #keys
  end
  worths[adapters] = affinity_ms * share
  return worths[adapters]
end

local best
-- The first of a set that can be served, `want` of them, page by page: those that cannot must not hide them.
local function look(set, want)
  local size = math.max(want, 16)
  for start = 0, look_on - 1, size do
    local page = call('ZRANGE', set, start, start + size - 1, 'WITHSCORES')
    for at = 1, #page, 2 do
      local name, rank = page[at], tonumber(page[at + 1])
      -- From here on none can be better.
      if best and best.score < rank - affinity_ms then return end
      local worth = worth_of(call('HGET', shard_key(parse_name(name)), 'adapters'))
      if worth then
        local score = rank - worth
        if not best or score < best.score
            or score == best.score and (rank < best.rank or rank == best.rank and name < best.name) then
          best = {name = name, rank = rank, score = score}
        end
        want = want - 1
        if want == 0 then return end
      end
    end
    if #page < 2 * size then return end
  end
end

look(ready, head)
for key in pairs(resident) do look(ready .. ':' .. key, per_adapter) end
if not best then
  -- All of those may be for others: what is behind them is found by what it needs.
  look(ready .. ':', 1)
  for _, key in ipairs(call('SMEMBERS', manifest .. ':adapters')) do look(ready .. ':' .. key, 1) end
end
if not best then return false end

local job, number = parse_name(best.name)
not_ready(job, number)
return lease(job, number, worker, lease_ms)
