"""What workers ask of Redis in one round trip each: arq's keys, moved by scripts that nobody can come between.

A job that runs stays in its queue, as arq has it, with the end of its claim as its time: so the head of the queue is
what waits, and what nobody finishes comes up again. The claim is arq's in-progress key, holding who claims.
"""

from __future__ import annotations

from hashlib import sha1
from typing import Any

from arq.constants import in_progress_key_prefix, job_key_prefix, retry_key_prefix
from redis.exceptions import NoScriptError

_NOW = """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
"""

TAKE = f"""{_NOW}
local queue, worker, lease, free = KEYS[1], ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
for i = 4, #ARGV, 2 do
  local id, ending = ARGV[i], ARGV[i + 1]
  if redis.call('GET', '{in_progress_key_prefix}' .. id) == worker then
    redis.call('DEL', '{in_progress_key_prefix}' .. id)
    if ending == 'gone' then
      redis.call('DEL', '{job_key_prefix}' .. id, '{retry_key_prefix}' .. id)
      redis.call('ZREM', queue, id)
    elseif ending ~= 'again' then
      redis.call('ZADD', queue, 'XX', now + tonumber(ending), id)
    end
  end
end
local answer = {{}}
if free > 0 then
  local found = redis.call('ZRANGEBYSCORE', queue, '-inf', now, 'WITHSCORES', 'LIMIT', 0, free)
  for i = 1, #found, 2 do
    local id = found[i]
    if redis.call('SET', '{in_progress_key_prefix}' .. id, worker, 'NX', 'PX', lease) then
      local job = redis.call('GET', '{job_key_prefix}' .. id)
      if job then
        redis.call('ZADD', queue, now + lease, id)
        answer[#answer + 1] = id
        answer[#answer + 1] = found[i + 1]
        answer[#answer + 1] = job
      else
        redis.call('DEL', '{in_progress_key_prefix}' .. id)
        redis.call('ZREM', queue, id)
      end
    else
      redis.call('ZADD', queue, now + math.max(redis.call('PTTL', '{in_progress_key_prefix}' .. id), 1000), id)
    end
  end
end
local following = redis.call('ZRANGEBYSCORE', queue, '-inf', '+inf', 'WITHSCORES', 'LIMIT', 0, 1)
table.insert(answer, 1, following[2] and tostring(following[2] - now) or '-1')
return answer
"""
"""End claims (gone; again: handed over anew; or back in so many milliseconds), then claim as many as are free.

Answers the milliseconds until the next job (-1: none), then id, score and job of each that is claimed."""

LOOK = f"""
local answer = {{}}
for i = 1, #ARGV do
  local id = ARGV[i]
  local there = redis.call('ZSCORE', KEYS[1], id) and redis.call('EXISTS', '{job_key_prefix}' .. id) == 1
  answer[i] = {{there and 1 or 0, redis.call('GET', '{in_progress_key_prefix}' .. id) or ''}}
end
return answer
"""
"""Whether each job is in the queue, and who claims it."""

RETURN = f"""{_NOW}
local returned = 0
for i = 1, #ARGV, 4 do
  local id, claim, job, due = ARGV[i], ARGV[i + 1], ARGV[i + 2], tonumber(ARGV[i + 3])
  if (redis.call('GET', '{in_progress_key_prefix}' .. id) or '') == claim then
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
for i = 1, #ARGV do
  redis.call('DEL', '{job_key_prefix}' .. ARGV[i])
  redis.call('ZREM', KEYS[1], ARGV[i])
end
"""
"""Forget jobs that ended without having been claimed."""


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


take, look, give_back, drop = map(Script, (TAKE, LOOK, RETURN, DROP))
