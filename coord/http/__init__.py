"""The HTTP side: requests that wait for a job and answer with its effect, and behave when that takes long, or fails.

    app = FastAPI(exception_handlers=problem_handlers())
    app.add_middleware(RequestLimits)

    @app.post("/orders/{order_id}/fulfil", responses=problems(404, 500, 503))
    async def fulfil(order_id: int, session: Session, reply: Annotated[Reply, Depends(reply)]):
        job = await enqueue(session, fulfil_order, order_id)
        await session.commit()
        order = await reply.row(session, Order, order_id, columns=[Order.status], job=job)
        return order or await reply.accepted(session, job, location=f"/jobs/{job.id}")

What a client may ask for: `Prefer: wait=10` (RFC 7240), an `Idempotency-Key`, `If-None-Match`, `Last-Event-ID`.
"""

from __future__ import annotations

from coord.http.admin import job_routes
from coord.http.events import EventStreams, Stream
from coord.http.idempotency import Idempotency, idempotency
from coord.http.limits import RequestLimits
from coord.http.polling import Poll, poll
from coord.http.prefer import Preference
from coord.http.problem import Problem, problem, problem_handlers, problems
from coord.http.reply import Reply, reply

__all__ = [
    "EventStreams",
    "Idempotency",
    "Poll",
    "Preference",
    "Problem",
    "Reply",
    "RequestLimits",
    "Stream",
    "idempotency",
    "job_routes",
    "poll",
    "problem",
    "problem_handlers",
    "problems",
    "reply",
]
