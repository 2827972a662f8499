#!lua flags=allow-oom
local job, errors = ARGV[4], ARGV[5]
staged(job)
call('HSET', job_key(job), 'errors', errors)
drop_ready(job)
end_job(job, 'failed')
