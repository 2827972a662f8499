#!lua flags=no-writes
-- Commands that read, each as its length, name, key without the prefix, and arguments. Not by MULTI: a server that is full
-- refuses to queue even these.
local answers, at = {}, 4
while at <= #ARGV do
  local size = tonumber(ARGV[at])
  answers[#answers + 1] = call(ARGV[at + 1], PREFIX .. ':' .. ARGV[at + 2], unpack(ARGV, at + 3, at + size))
  at = at + size + 1
end
return answers
