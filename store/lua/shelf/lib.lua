-- What the shelf's scripts have beside the others'. A KIND has no colon in it; an OWNER and an ID may.
--
-- PREFIX:record:KIND:ID    hash                    PREFIX:records:KIND[:OWNER]   records in the order they were made
-- PREFIX:sizes:KIND        hash: OWNER to bytes    PREFIX:due:KIND               records by when their time is up, in ms
-- PREFIX:content:NAME      hash: a piece's number to what is kept of it
-- PREFIX:lock:NAME         hash: holder, until     PREFIX:said:CHANNEL           list
local function record_key(kind, id) return PREFIX .. ':record:' .. kind .. ':' .. id end
local function records_key(kind) return PREFIX .. ':records:' .. kind end
local function due_key(kind) return PREFIX .. ':due:' .. kind end

-- A record as it is answered: id, owner, data, size, version, created, expires.
local function fields(kind, id)
  return {id, unpack(call('HMGET', record_key(kind, id), 'owner', 'data', 'size', 'version', 'created', 'expires'))}
end

-- The same, or nil if there is none or its time is up.
local function record(kind, id)
  local had = fields(kind, id)
  if had[2] and (not had[7] or tonumber(had[7]) > now) then return had end
end

-- So many bytes more for an owner.
local function add_size(kind, owner, change) add(PREFIX .. ':sizes:' .. kind, owner, change) end

-- Until when it is there; for ever without a time to live.
local function set_expiry(kind, id, ttl_ms)
  if ttl_ms == '' then
    call('HDEL', record_key(kind, id), 'expires')
    call('ZREM', due_key(kind), id)
  else
    call('HSET', record_key(kind, id), 'expires', now + ttl_ms)
    call('ZADD', due_key(kind), now + ttl_ms, id)
  end
end
