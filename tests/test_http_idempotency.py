"""`Idempotency-Key`: a request that is sent again joins the job of the first, and gets its answer."""

from __future__ import annotations

import asyncio
import contextlib
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from fastapi import APIRouter, Depends, FastAPI, Request, Response
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import delete, insert, inspect, update
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine

from coord import Job, JobState, UniqueKeyConflictError, create_db_dependency, task_options
from coord.http import Idempotency, idempotency, problem_handlers
from coord.http.idempotency import IdempotencyError
from coord.jobs.model import keys
from tests.counter import PROBLEM, URN, counter, do, end, jobs_of, placed, the_job, user
from tests.ledger import a_task, committed
from tests.serving import eventually, served
from tests.shop import waiting_for_locks
from worker.models import Stock

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    import asyncpg

    SessionMaker = async_sessionmaker[AsyncSession]

pytestmark = pytest.mark.usefixtures("orders", "nobody_left_waiting")

KEY = '"8e03978e-40d5-43dd-bc93-6894a57f9324"'
REUSED = (422, f"{URN}idempotency-key-reused")
MALFORMED = (400, f"{URN}idempotency-key-malformed")


async def fulfil(
    http: httpx.AsyncClient, order_id: int, key: str | list[str] | None = KEY, *, note: str = "", **headers: str
) -> httpx.Response:
    given = [] if key is None else [key] if isinstance(key, str) else key
    fields = [*((b"Idempotency-Key", one.encode("latin-1")) for one in given), *httpx.Headers(headers).raw]
    return await http.post(f"/orders/{order_id}/fulfil", headers=fields, json={"note": note})


def problem_of(answer: httpx.Response) -> tuple[int, str]:
    assert answer.headers["content-type"] == PROBLEM
    return answer.status_code, answer.json()["type"]


async def test_a_repeated_request_joins_the_job_that_is_queued(
    http: httpx.AsyncClient, session_maker: SessionMaker, order_id: int
) -> None:
    first = asyncio.create_task(fulfil(http, order_id))
    job = await the_job(session_maker)
    second = asyncio.create_task(fulfil(http, order_id))
    third = await fulfil(http, order_id, Prefer="wait=0")
    assert (third.status_code, third.json()["job"]["id"]) == (202, str(job.id))
    await do(session_maker, job)
    answers = [await first, await second]
    assert [answer.status_code for answer in answers] == [200, 200]
    assert answers[0].json() == answers[1].json() == {"id": order_id, "status": "fulfilled"}
    assert len(await jobs_of(session_maker)) == 1


async def test_a_repeated_request_gets_the_answer_of_the_job_that_is_done(
    http: httpx.AsyncClient, session_maker: SessionMaker, order_id: int
) -> None:
    await fulfil(http, order_id, Prefer="wait=0")
    await do(session_maker, await the_job(session_maker))
    answer = await fulfil(http, order_id)
    assert (answer.status_code, answer.json()) == (200, {"id": order_id, "status": "fulfilled"})
    assert len(await jobs_of(session_maker)) == 1


@pytest.mark.parametrize(
    ("state", "expected"),
    [(JobState.FAILED, (500, f"{URN}job-failed")), (JobState.CANCELLED, (409, f"{URN}job-cancelled"))],
)
async def test_a_repeated_request_gets_the_error_of_the_job_that_failed_and_no_second_job(
    http: httpx.AsyncClient, session_maker: SessionMaker, state: JobState, expected: tuple[int, str], order_id: int
) -> None:
    await fulfil(http, order_id, Prefer="wait=0")
    await end(session_maker, await the_job(session_maker), state, "OutOfTea")
    assert problem_of(await fulfil(http, order_id)) == expected
    assert len(await jobs_of(session_maker)) == 1


async def test_fifty_at_the_same_instant_have_one_job_and_equal_answers(
    http: httpx.AsyncClient, session_maker: SessionMaker, observer: asyncpg.Connection, order_id: int
) -> None:
    """All are let go at once, when the first waits for the table of keys."""
    transaction = observer.transaction()
    await transaction.start()
    await observer.execute("LOCK TABLE coord_idempotency_keys IN ACCESS EXCLUSIVE MODE")
    asking = [asyncio.create_task(fulfil(http, order_id)) for _ in range(50)]

    await eventually(lambda: waiting_for_locks(observer), within=20)
    await transaction.rollback()
    await do(session_maker, await the_job(session_maker))
    answers = await asyncio.gather(*asking)
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.content for answer in answers}) == 1
    assert len(await jobs_of(session_maker)) == 1


@contextlib.asynccontextmanager
async def first_held(observer: asyncpg.Connection, *, fails: bool) -> AsyncIterator[None]:
    """The first to insert a job waits, in its transaction, until the block ends; and then fails, or does not."""
    await observer.execute(
        "CREATE SEQUENCE held; CREATE FUNCTION hold() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
        " IF nextval('held') = 1 THEN PERFORM pg_advisory_xact_lock(4711);"
        f" IF {fails} THEN RAISE 'no'; END IF; END IF; RETURN new; END $$;"
        "CREATE TRIGGER hold BEFORE INSERT ON coord_jobs FOR EACH ROW EXECUTE FUNCTION hold()"
    )
    await observer.execute("SELECT pg_advisory_lock(4711)")
    try:
        yield
    finally:
        await observer.execute("SELECT pg_advisory_unlock_all()")
        await eventually(lambda: nobody_waits_for_locks(observer))
        await observer.execute("DROP TRIGGER hold ON coord_jobs; DROP FUNCTION hold; DROP SEQUENCE held")


async def nobody_waits_for_locks(observer: asyncpg.Connection) -> bool:
    return await waiting_for_locks(observer) == 0


async def test_a_repeated_request_waits_for_the_commit_of_the_first(
    http: httpx.AsyncClient, session_maker: SessionMaker, observer: asyncpg.Connection, order_id: int
) -> None:
    """When the first fails, the second is the first."""
    async with first_held(observer, fails=True):
        first = asyncio.create_task(fulfil(http, order_id))
        await eventually(lambda: waiting_for_locks(observer, "INSERT"))
        second = asyncio.create_task(fulfil(http, order_id))
        for _ in range(5):  # others are served meanwhile
            assert (await http.get(f"/orders/{order_id}")).status_code == 200
        assert not first.done()
        assert not second.done()
    assert (await first).status_code == 500
    await do(session_maker, await the_job(session_maker))
    assert (await second).status_code == 200


@pytest.mark.parametrize("others", [3, 24, 60])
async def test_requests_that_wait_for_the_first_of_their_key_hold_no_connection(
    database_url: str, session_maker: SessionMaker, observer: asyncpg.Connection, others: int
) -> None:
    engine = create_async_engine(database_url, pool_size=4, max_overflow=0)
    maker = async_sessionmaker(engine, expire_on_commit=False)
    order_id = await placed(session_maker)
    limits = httpx.Limits(max_connections=None)
    async with served(counter(maker), limits=limits) as http:
        async with first_held(observer, fails=False):
            asking = [asyncio.create_task(fulfil(http, order_id))]
            await eventually(lambda: waiting_for_locks(observer, "INSERT"))
            asking += [asyncio.create_task(fulfil(http, order_id)) for _ in range(others)]
            for _ in range(10):
                answer = await http.get(f"/orders/{order_id}")
                assert (answer.status_code, answer.elapsed.total_seconds() < 2) == (200, True)
            assert await waiting_for_locks(observer) == 1
            assert not any(task.done() for task in asking)
        await do(session_maker, await the_job(session_maker))
        assert {answer.status_code for answer in await asyncio.gather(*asking)} == {200}
    assert len(await jobs_of(session_maker)) == 1
    await engine.dispose()


async def test_each_request_without_a_key_has_its_own_job(http: httpx.AsyncClient, session_maker: SessionMaker) -> None:
    order_id = await placed(session_maker)
    for _ in range(2):
        await fulfil(http, order_id, None, Prefer="wait=0")
    assert len(await jobs_of(session_maker)) == 2


async def test_another_payload_is_refused_and_enqueues_nothing(
    http: httpx.AsyncClient, session_maker: SessionMaker
) -> None:
    order_id, other = await placed(session_maker), await placed(session_maker)
    await fulfil(http, order_id, note="a", Prefer="wait=0")
    assert problem_of(await fulfil(http, order_id, note="b")) == REUSED
    assert problem_of(await fulfil(http, other, note="a")) == REUSED
    answer = await http.post(f"/orders/{order_id}/fulfil?x=1", headers={"Idempotency-Key": KEY}, json={"note": "a"})
    assert problem_of(answer) == REUSED
    assert len(await jobs_of(session_maker)) == 1


async def test_the_same_payload_may_be_written_in_another_way(
    http: httpx.AsyncClient, session_maker: SessionMaker, order_id: int
) -> None:
    for body in (b'{"note": "a", "b": [1, 2]}', b'{"b":[1,2],\n"note":"\\u0061"}'):
        headers = {"Idempotency-Key": KEY, "Content-Type": "application/json", "Prefer": "wait=0"}
        answer = await http.post(f"/orders/{order_id}/fulfil", headers=headers, content=body)
        assert answer.status_code == 202
    assert len(await jobs_of(session_maker)) == 1


async def test_a_quoted_key_and_a_bare_one_are_the_same(http: httpx.AsyncClient, session_maker: SessionMaker) -> None:
    order_id = await placed(session_maker)
    for key in ('"abc-1"', "abc-1", '"a\\"b"', '"a\\\\b"'):
        assert (await fulfil(http, order_id, key, Prefer="wait=0")).status_code == 202
    assert len(await jobs_of(session_maker)) == 3


@pytest.mark.parametrize(
    "key",
    [
        *("", '""', '"', '"abc', 'abc"', '"a"b"', '"a\\b"', '"a" "b"', '"a", "b"', "a b", "a;b", '"a";p=1', "?1"),
        *("(a)", '"\xe9"', "\xe9", '"a\tb"', "x" * 256, '"' + "x" * 254 + '"', ["a", "b"], ["a", "a"]),
    ],
    ids=repr,
)
async def test_a_malformed_key_is_a_400_and_enqueues_nothing(
    http: httpx.AsyncClient, session_maker: SessionMaker, key: str | list[str]
) -> None:
    assert problem_of(await fulfil(http, await placed(session_maker), key)) == MALFORMED
    assert await jobs_of(session_maker) == []


@pytest.mark.parametrize("key", ["x" * 255, '"' + "x" * 253 + '"', '"a b, c; ~"', "0", "a/b=:"])
async def test_a_key_may_be_any_short_text(http: httpx.AsyncClient, session_maker: SessionMaker, key: str) -> None:
    assert (await fulfil(http, await placed(session_maker), key, Prefer="wait=0")).status_code == 202


async def test_a_key_may_be_used_again_when_it_has_expired(
    http: httpx.AsyncClient, session_maker: SessionMaker
) -> None:
    order_id, other = await placed(session_maker), await placed(session_maker)
    await fulfil(http, order_id, Prefer="wait=0")
    async with session_maker() as session, session.begin():
        row = (await session.execute(keys.select())).one()
        assert timedelta(hours=23) < row.expires_at - datetime.now(UTC) <= timedelta(days=1)
        await session.execute(update(keys).values(expires_at=datetime.now(UTC) - timedelta(seconds=1)))
    assert (await fulfil(http, other, note="b", Prefer="wait=0")).status_code == 202
    assert len(await jobs_of(session_maker)) == 2
    assert problem_of(await fulfil(http, order_id)) == REUSED


async def test_a_key_outlives_its_job_and_says_so(http: httpx.AsyncClient, session_maker: SessionMaker) -> None:
    order_id = await placed(session_maker)
    await fulfil(http, order_id, Prefer="wait=0")
    async with session_maker() as session, session.begin():
        await session.execute(delete(Job))
    assert problem_of(await fulfil(http, order_id)) == (422, f"{URN}idempotency-key-expired")


@pytest.mark.parametrize("credential", ["Authorization", "Cookie", "X-Api-Key"])
async def test_keys_are_apart_for_each_caller_whatever_credentials_they_send(
    http: httpx.AsyncClient, session_maker: SessionMaker, credential: str, order_id: int
) -> None:
    """Two callers may show the same credential, and one caller another at the second attempt."""
    for name, shown in (("ann", "a"), ("ann", "b"), ("bob", "a"), ("", "a"), ("bob", "")):
        answer = await fulfil(http, order_id, Prefer="wait=0", **{"X-User": name, credential: shown})
        assert answer.status_code == 202
    assert len(await jobs_of(session_maker)) == 3
    async with session_maker() as session:
        stored = [tuple(row) for row in (await session.execute(keys.select())).all()]
    assert "ann" not in str(stored)


async def test_a_key_is_refused_of_whom_the_application_does_not_know(session_maker: SessionMaker) -> None:
    """Or all of them would have one principal, and could be given each other's jobs."""
    order_id = await placed(session_maker)
    async with served(counter(session_maker, caller=lambda request: request.headers.get("x-user"))) as client:
        refused = await fulfil(client, order_id, Prefer="wait=0")
        assert problem_of(refused) == (400, f"{URN}idempotency-key-unscoped")
        assert await jobs_of(session_maker) == []
        known = {"Prefer": "wait=0", "X-User": "ann"}
        assert (await fulfil(client, order_id, **known)).status_code == 202


@pytest.mark.parametrize("headers", [{}, {"Cookie": "sid=alice"}, {"Authorization": "Bearer t1"}], ids=str)
async def test_a_key_is_refused_where_no_caller_is_configured(
    session_maker: SessionMaker, headers: dict[str, str], order_id: int
) -> None:
    async with served(counter(session_maker, caller=None)) as client:
        refused = await fulfil(client, order_id, Prefer="wait=0", **headers)
        assert problem_of(refused) == (400, f"{URN}idempotency-key-unscoped")
        assert "idempotency(caller=" in refused.json()["detail"]
        assert await jobs_of(session_maker) == []
        assert (await fulfil(client, order_id, None, Prefer="wait=0", **headers)).status_code == 202


def test_an_asynchronous_caller_is_refused() -> None:
    async def caller(_request: Request) -> str:
        return "ann"

    with pytest.raises(ValueError, match="plain function"):
        idempotency(caller=caller)  # type: ignore[arg-type]


def test_keys_that_are_required_need_a_caller() -> None:
    with pytest.raises(ValueError, match="caller="):
        idempotency(required=True)


async def test_keys_of_different_routes_are_apart(session_maker: SessionMaker) -> None:
    """Also those of one router that was included twice, and of two methods."""
    app = FastAPI(exception_handlers=problem_handlers())
    get_db = create_db_dependency(session_maker)
    dependency = idempotency(caller=user, required=True)
    router = APIRouter()

    @router.api_route("/things/{number}", methods=["POST", "PUT"])
    async def act(
        number: int, once: Idempotency = Depends(dependency), session: AsyncSession = Depends(get_db)
    ) -> bool:
        return (await once.enqueue(session, a_task, number)).joined

    app.include_router(router, prefix="/v1")
    app.include_router(router, prefix="/v2")
    requests = [("POST", "/v1/things/1"), ("PUT", "/v1/things/1"), ("POST", "/v2/things/1")]
    async with served(app) as client:
        for expected in (False, True):
            for method, path in requests:
                answer = await client.request(method, path, headers={"Idempotency-Key": KEY})
                assert (answer.status_code, answer.json()) == (200, expected)
        answer = await client.post("/v1/things/2", headers={"Idempotency-Key": KEY})
        assert problem_of(answer) == REUSED
        assert problem_of(await client.post("/v1/things/2")) == (400, f"{URN}idempotency-key-missing")


@pytest.mark.parametrize("name", ["a%3Fb", "a%23b", "a%5Cb", "a%253Fb", "%C3%A4"])
async def test_another_path_is_refused_whatever_characters_either_has(session_maker: SessionMaker, name: str) -> None:
    app = FastAPI(exception_handlers=problem_handlers())
    get_db = create_db_dependency(session_maker)
    dependency = idempotency(caller=user)

    @app.post("/things/{name}")
    async def act(name: str, once: Idempotency = Depends(dependency), session: AsyncSession = Depends(get_db)) -> bool:
        return (await once.enqueue(session, a_task, len(name))).joined

    async with served(app) as client:
        answers = [await client.post(f"/things/{name}", headers={"Idempotency-Key": KEY}) for _ in range(2)]
        assert [answer.json() for answer in answers] == [False, True]
        assert problem_of(await client.post(f"/things/{name}c", headers={"Idempotency-Key": KEY})) == REUSED


async def test_a_request_that_needs_no_job_has_its_key_checked(session_maker: SessionMaker) -> None:
    app = FastAPI(exception_handlers=problem_handlers())
    get_db = create_db_dependency(session_maker)
    dependency = idempotency(caller=user)

    @app.post("/things/{number}")
    async def act(
        number: int, once: Idempotency = Depends(dependency), session: AsyncSession = Depends(get_db)
    ) -> None:
        await once.check(session)
        if number > 0:
            await once.enqueue(session, a_task, number)

    async with served(app) as client:
        answers = [await client.post(f"/things/{number}", headers={"Idempotency-Key": KEY}) for number in (0, 1, 0, 1)]
    assert [answer.status_code for answer in answers] == [200, 200, 422, 200]


@pytest.mark.parametrize("why", [UniqueKeyConflictError, TypeError])
async def test_a_key_whose_job_could_not_be_enqueued_was_not_used(
    session_maker: SessionMaker, observer: asyncpg.Connection, why: type[Exception]
) -> None:
    """Although the handler returns a 4xx, which commits, as does what else it has written."""
    app = FastAPI(exception_handlers=problem_handlers())
    get_db, dependency = create_db_dependency(session_maker), idempotency(caller=user)
    task, arguments = task_options(a_task, unique_key="u"), [object() if why is TypeError else 2, 2, 2]

    @app.post("/things")
    async def act(
        response: Response, once: Idempotency = Depends(dependency), session: AsyncSession = Depends(get_db)
    ) -> bool:
        session.add(Stock(sku=f"tea {len(arguments)}", quantity=1))
        try:
            return (await once.enqueue(session, task, arguments.pop(0))).joined
        except why:
            response.status_code = 409
            return False

    if why is UniqueKeyConflictError:
        await committed(session_maker, task, 1)
    async with served(app) as client:
        assert (await client.post("/things", headers={"Idempotency-Key": KEY})).status_code == 409
        assert await observer.fetchval("SELECT count(*) FROM coord_idempotency_keys") == 0
        assert await observer.fetchval("SELECT count(*) FROM stock") == 1
        await observer.execute("UPDATE coord_jobs SET state = 'done'")
        answers = [await client.post("/things", headers={"Idempotency-Key": KEY}) for _ in range(2)]
    assert [(answer.status_code, answer.json()) for answer in answers] == [(200, False), (200, True)]


def by_hand() -> Idempotency:
    return Idempotency("key", "scope", "fingerprint", timedelta(days=1))


async def test_a_key_whose_job_could_not_be_enqueued_is_free_for_the_next(session_maker: SessionMaker) -> None:
    """Also while the other's transaction goes on."""
    await committed(session_maker, task_options(a_task, unique_key="u"), 1)
    async with session_maker() as one, session_maker() as two, asyncio.timeout(5):
        with pytest.raises(UniqueKeyConflictError):
            await by_hand().enqueue(one, task_options(a_task, unique_key="u"), 2)
        job = await by_hand().enqueue(two, a_task, 2)
        await two.commit()
        assert (await by_hand().enqueue(one, a_task, 2)).id == job.id


@pytest.mark.parametrize("commits", [True, False])
@pytest.mark.parametrize("has_locks", [True, False])
async def test_a_request_for_a_taken_key_waits_for_the_commit_of_its_job(
    session_maker: SessionMaker, observer: asyncpg.Connection, commits: bool, has_locks: bool
) -> None:
    """Without a connection, or inside PostgreSQL if others may wait for what it has."""
    async with session_maker() as one, session_maker() as two:
        job = await by_hand().enqueue(one, a_task)
        if has_locks:
            two.add(Stock(sku="tea", quantity=1))
            await two.flush()
        second = asyncio.create_task(by_hand().enqueue(two, a_task))
        if has_locks:
            await eventually(lambda: waiting_for_locks(observer, "SELECT pg_advisory"))
        else:
            await eventually(lambda: not two.in_transaction())
            assert not second.done()
        await (one.commit() if commits else one.rollback())
        found = await second
        assert (found.id == job.id, found.joined) == (commits, commits)
        await two.commit()
    assert await observer.fetchval("SELECT count(*) FROM stock") == has_locks


async def test_postgresql_ends_a_deadlock_between_a_key_and_a_row(
    session_maker: SessionMaker, observer: asyncpg.Connection
) -> None:
    async with session_maker() as one, session_maker() as two:
        await by_hand().enqueue(one, a_task)
        two.add(Stock(sku="tea", quantity=1))
        await two.flush()
        second = asyncio.create_task(by_hand().enqueue(two, a_task))
        await eventually(lambda: waiting_for_locks(observer, "SELECT pg_advisory"))
        first = asyncio.create_task(one.execute(insert(Stock).values(sku="tea", quantity=2)))
        results = await asyncio.gather(first, second, return_exceptions=True)
        assert [isinstance(result, DBAPIError) for result in results].count(True) == 1
        await one.rollback()
        await two.rollback()


async def test_enqueue_with_a_key_flushes_nothing_pending(session_maker: SessionMaker) -> None:
    async with session_maker() as session:
        session.add(stock := Stock(sku="tea", quantity=1))
        await by_hand().enqueue(session, a_task)
        assert inspect(stock).pending
        await session.commit()
        assert inspect(stock).persistent


async def test_keys_are_the_ledgers_whatever_the_session_translates(session_maker: SessionMaker) -> None:
    options = {"schema_translate_map": {None: "a_tenant_without_tables"}}
    async with session_maker() as session:
        await session.connection(execution_options=options)
        job = await by_hand().enqueue(session, a_task)
        await session.commit()
        await session.connection(execution_options=options)
        assert (await by_hand().enqueue(session, a_task)).id == job.id
        await by_hand().check(session)


async def test_joining_writes_nothing(http: httpx.AsyncClient, observer: asyncpg.Connection, order_id: int) -> None:
    await fulfil(http, order_id, Prefer="wait=0")
    before = await observer.fetchval("SELECT pg_snapshot_xmax(pg_current_snapshot())::text")
    assert (await fulfil(http, order_id, Prefer="wait=0")).status_code == 202
    assert await observer.fetchval("SELECT pg_snapshot_xmax(pg_current_snapshot())::text") == before


async def key_of(values: list[str]) -> str | None:
    """As the dependency reads it from a request with these headers."""
    headers = [(b"idempotency-key", value.encode("latin-1")) for value in values]
    scope = {"type": "http", "method": "POST", "path": "/", "query_string": b"", "headers": headers, "path_params": {}}

    async def no_body() -> dict[str, Any]:
        return {"type": "http.request"}

    return (await idempotency(caller=user)(Request(scope, no_body))).key


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(st.text(st.characters(codec="latin-1")), max_size=2))
def test_any_header_is_a_key_or_malformed(values: list[str]) -> None:
    with contextlib.suppress(IdempotencyError):
        key = asyncio.run(key_of(values))
        assert (key is None) == (values == [])
        assert key is None or 0 < len(key) <= 255


@pytest.mark.parametrize("expires", [-1, 10**13, 1e299])
def test_keys_that_would_expire_at_no_time_are_refused(expires: float) -> None:
    with pytest.raises(ValueError, match="expires"):
        idempotency(caller=lambda _: "", expires=expires)
