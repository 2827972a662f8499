#!lua flags=allow-oom
local job, only_staged = ARGV[4], ARGV[5] == '1'
local status, ended = unpack(call('HMGET', job_key(job), 'status', 'ended'))
if only_staged then
  if status == 'validating' then remove_job(job) end
elseif not status then
  fail('NOTFOUND')
elseif not ended then
  fail('RUNNING')
else
  remove_job(job)
end
