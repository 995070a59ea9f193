"""The scripts that move messages between a queue's keys, by Redis' own clock and no other."""

from __future__ import annotations

_NOW = "local t = redis.call('TIME') local now = t[1] * 1000 + math.floor(t[2] / 1000)\n"
_SCORE = "string.format('%.0f', rank * 4398046511104 + due)"

NEAR_SECONDS = 60
"""How long before its time a job is handed to Redis."""

# KEYS: feed, soon. ARGV: of each job the milliseconds that remain, its rank and its message.
# What is ready goes into the feed, and what is near into the other.
PUSH = (
    _NOW
    + f"""
for i = 1, #ARGV, 3 do
  local remaining, rank = tonumber(ARGV[i]), tonumber(ARGV[i + 1])
  local due = now + remaining
  if remaining <= 0 then
    redis.call('ZADD', KEYS[1], 'NX', {_SCORE}, ARGV[i + 2])
  else
    redis.call('ZADD', KEYS[2], string.format('%.0f', due), string.format('%03d', rank) .. ARGV[i + 2])
  end
end
"""
)

# KEYS: feed, soon. ARGV: how many at most. Answers the milliseconds until the next is due, or -1 if there is none.
# What frees memory comes first: a full Redis refuses a script whose first write needs some.
MOVE = (
    _NOW
    + f"""
local found = redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', now, 'WITHSCORES', 'LIMIT', 0, ARGV[1])
for i = 1, #found, 2 do
  local rank, due = tonumber(string.sub(found[i], 1, 3)), tonumber(found[i + 1])
  redis.call('ZREM', KEYS[2], found[i])
  if rank then redis.call('ZADD', KEYS[1], 'NX', {_SCORE}, string.sub(found[i], 4)) end
end
local following = redis.call('ZRANGE', KEYS[2], 0, 0, 'WITHSCORES')
if following[2] then return math.max(0, tonumber(following[2]) - now) end
return -1
"""
)
