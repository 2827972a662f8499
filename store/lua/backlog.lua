#!lua flags=no-writes
local found = {}
for _, base in ipairs(call('SMEMBERS', PREFIX .. ':bases')) do
  local oldest = call('ZRANGE', PREFIX .. ':waiting:' .. base, 0, 0, 'WITHSCORES')[2]
  if oldest then
    local rows = call('HGET', PREFIX .. ':rows', base)
    found[#found + 1] = {base, call('ZCARD', PREFIX .. ':ready:' .. base), tonumber(rows), tonumber(oldest)}
  end
end
return found
