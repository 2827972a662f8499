#!lua flags=allow-oom
local job = ARGV[4]
local status = status_of(job)
if not status then fail('NOTFOUND') end
if status == 'in_progress' or status == 'validating' then
  call('HSET', job_key(job), 'cancelled', now)
  begin_ending(job, 'cancelling')
end
