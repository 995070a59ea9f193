"""The HTTP side: requests that wait for a job and answer with its effect, and behave when that takes long, or fails.

    app = FastAPI(exception_handlers=problem_handlers(), responses=problems())
    app.add_middleware(HeadRequests)
    app.add_middleware(RequestLimits)
    app.include_router(job_status_routes(get_db))

    @app.post("/orders/{order_id}/fulfil", responses=replies() | problems(404, 409, 422, 500, 503))
    async def fulfil(order_id: int, session: Session, reply: Annotated[Reply, Depends(reply)]):
        job = await enqueue(session, fulfil_order, order_id)
        await session.commit()
        order = await reply.row(session, Order, order_id, columns=[Order.status], job=job)
        return order or await reply.accepted(session, job, location=f"/jobs/{job.id}")

What a client may ask for: `Prefer: wait=10` (RFC 7240), an `Idempotency-Key`, `If-None-Match`, `Last-Event-ID`.
"""

from __future__ import annotations

from coord.http.events import EventStreams, finishes
from coord.http.idempotency import Idempotency, idempotency
from coord.http.jobs import Accepted, AcceptedJob, JobStatus, job_routes, job_status_routes
from coord.http.limits import RequestLimits
from coord.http.methods import HeadRequests
from coord.http.polling import Poll, poll, polls
from coord.http.prefer import Preference
from coord.http.problem import problem, problem_handlers, problems, public_reason
from coord.http.reply import Reply, replies, reply

__all__ = [
    "Accepted",
    "AcceptedJob",
    "EventStreams",
    "HeadRequests",
    "Idempotency",
    "JobStatus",
    "Poll",
    "Preference",
    "Reply",
    "RequestLimits",
    "finishes",
    "idempotency",
    "job_routes",
    "job_status_routes",
    "poll",
    "polls",
    "problem",
    "problem_handlers",
    "problems",
    "public_reason",
    "replies",
    "reply",
]
