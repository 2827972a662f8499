#!lua flags=no-writes
local kind, id = ARGV[4], ARGV[5]
return record(kind, id) or fail('NORECORD')
