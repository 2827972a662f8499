#!lua flags=no-writes
-- `whose`: a colon and the owner, or nothing for all of a kind.
local kind, whose, after, limit, reverse = ARGV[4], ARGV[5], ARGV[6], tonumber(ARGV[7]), ARGV[8] == '1'
local set, start = records_key(kind) .. whose, 0
if after ~= '' then
  local place = record(kind, after) and call(reverse and 'ZREVRANK' or 'ZRANK', set, after)
  if not place then fail('NORECORD') end
  start = place + 1
end
local found = {}
while #found < limit do
  local want = limit - #found
  local page = call(reverse and 'ZREVRANGE' or 'ZRANGE', set, start, start + want - 1)
  for _, id in ipairs(page) do found[#found + 1] = record(kind, id) end
  if #page < want then break end
  start = start + want
end
return found
