"""What workers ask of Redis in one round trip each: arq's keys, moved by scripts that nobody can come between.

The claim on a job is arq's in-progress key, holding who claims. A claimed job stays in its queue, as arq has it, with
the end of its claim as its time, which ends in half a millisecond: what has another time was handed over anew since.
So the head of the queue is what waits, what nobody finishes comes up again, and an attempt that ends never takes the
next one with it.
"""

from __future__ import annotations

from hashlib import sha1
from typing import Any

from arq.constants import in_progress_key_prefix, job_key_prefix, retry_key_prefix
from redis.exceptions import NoScriptError

# What cannot be read, since somebody has put another type of value there, is an error object and equals nothing.
_COMMON = f"""
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local queue, worker, lease = KEYS[1], ARGV[1], tonumber(ARGV[2])
local function claim_of(id) return '{in_progress_key_prefix}' .. id end
local function is_claimed(id) return (redis.call('ZSCORE', queue, id) or 0) % 1 == 0.5 end
local function is_mine(id) return redis.pcall('GET', claim_of(id)) == worker end
"""

TAKE = f"""{_COMMON}
local free, answer = tonumber(ARGV[3]), {{'-1'}}
local function is_of(id, attempt)
  local is_read, job = pcall(cjson.decode, redis.pcall('GET', '{job_key_prefix}' .. id))
  return is_read and type(job) == 'table' and job.t == tonumber(attempt)
end
for i = 4, #ARGV, 3 do
  local id, ending, attempt = ARGV[i], ARGV[i + 1], ARGV[i + 2]
  if is_mine(id) then
    redis.call('DEL', claim_of(id))
    if ending == 'gone' then
      if is_claimed(id) or is_of(id, attempt) then
        redis.call('DEL', '{job_key_prefix}' .. id, '{retry_key_prefix}' .. id)
        redis.call('ZREM', queue, id)
      end
    elseif is_claimed(id) then
      redis.call('ZADD', queue, now + tonumber(ending), id)
      if tonumber(ending) == 0 then redis.call('PUBLISH', queue .. ':bell', '') end
    end
  end
end
local others, is_all = 0, false
while free > 0 and not is_all do
  local found = redis.call('ZRANGEBYSCORE', queue, '-inf', now, 'WITHSCORES', 'LIMIT', others, free)
  is_all = #found < 2 * free
  for i = 1, #found, 2 do
    local id = found[i]
    if redis.call('SET', claim_of(id), worker, 'NX', 'PX', lease) then
      local job = redis.pcall('GET', '{job_key_prefix}' .. id)
      if type(job) == 'string' then
        redis.call('ZADD', queue, now + lease + 0.5, id)
        local last = #answer
        answer[last + 1], answer[last + 2], answer[last + 3] = id, found[i + 1], job
        free = free - 1
      else
        redis.call('DEL', claim_of(id))
        redis.call('ZREM', queue, id)
      end
    else
      others = others + 1
    end
  end
end
if free > 0 then
  local following = redis.call('ZRANGEBYSCORE', queue, '(' .. now, '+inf', 'WITHSCORES', 'LIMIT', 0, 1)
  if following[2] then answer[1] = string.format('%.0f', following[2] - now) end
end
return answer
"""
"""End claims (gone, or back in so many milliseconds) of attempts, then claim as many as are free.

Answers the milliseconds until the next job (-1: unknown), then id, score and job of each that is claimed."""

RENEW = f"""{_COMMON}
for i = 3, #ARGV do
  if is_mine(ARGV[i]) and is_claimed(ARGV[i]) then
    redis.call('PEXPIRE', claim_of(ARGV[i]), lease)
    redis.call('ZADD', queue, now + lease + 0.5, ARGV[i])
  end
end
"""
"""Make claims last for another lease."""

RELEASE = f"""{_COMMON}
local released = 0
for _, id in ipairs(redis.call('ZRANGEBYSCORE', queue, now, now + lease + 1)) do
  if is_claimed(id) and is_mine(id) then
    redis.call('DEL', claim_of(id))
    redis.call('ZADD', queue, now, id)
    released = released + 1
  end
end
if released > 0 then redis.call('PUBLISH', queue .. ':bell', '') end
return released
"""
"""Give back whatever the worker claims, also what it does not know of because the answer was lost."""

LOOK = f"""
local claims, jobs, answer = {{}}, {{}}, {{}}
for i, id in ipairs(ARGV) do
  claims[i], jobs[i] = '{in_progress_key_prefix}' .. id, '{job_key_prefix}' .. id
end
local scores = redis.call('ZMSCORE', KEYS[1], unpack(ARGV))
local held = redis.call('MGET', unpack(claims))
local all = redis.call('EXISTS', unpack(jobs)) == #ARGV
for i = 1, #ARGV do
  local there = scores[i] and (all or redis.call('EXISTS', jobs[i]) == 1)
  answer[i] = {{there and 1 or 0, held[i] or ''}}
end
return answer
"""
"""Whether each job, of a thousand at most, is in the queue, and who claims it."""

RETURN = f"""
local returned = 0
for i = 1, #ARGV, 4 do
  local id, claim, job, due = ARGV[i], ARGV[i + 1], ARGV[i + 2], tonumber(ARGV[i + 3])
  local found = redis.pcall('GET', '{in_progress_key_prefix}' .. id)
  if (type(found) == 'string' and found or '') == claim then
    redis.call('DEL', '{in_progress_key_prefix}' .. id)
    redis.call('SET', '{job_key_prefix}' .. id, job)
    redis.call('ZADD', KEYS[1], math.max(due, 0), id)
    returned = returned + 1
  end
end
return returned
"""
"""Hand jobs over again, each only if whoever was seen to claim it still does."""

DROP = f"""
for i = 1, #ARGV, 2 do
  local id, claim = ARGV[i], ARGV[i + 1]
  redis.call('DEL', '{job_key_prefix}' .. id)
  redis.call('ZREM', KEYS[1], id)
  if claim ~= '' and redis.pcall('GET', '{in_progress_key_prefix}' .. id) == claim then
    redis.call('DEL', '{in_progress_key_prefix}' .. id)
  end
end
"""
"""Forget jobs that have ended otherwise than by their claim; with a dead worker's claim, that too."""


class Script:
    """A script by its digest, sent whole only to a server that does not know it yet."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._digest = sha1(text.encode(), usedforsecurity=False).hexdigest()

    async def run(self, redis: Any, key: str, *arguments: Any) -> Any:
        """By anything with redis-py's `execute_command`."""
        try:
            return await redis.execute_command("EVALSHA", self._digest, 1, key, *arguments)
        except NoScriptError:
            return await redis.execute_command("EVAL", self._text, 1, key, *arguments)


take, renew, release, look, give_back, drop = map(Script, (TAKE, RENEW, RELEASE, LOOK, RETURN, DROP))
