"""The cells. Times are of the shop's settings: a wait of up to 25 s, ten seconds until a job runs elsewhere."""

from __future__ import annotations

from tests.faults.matrix import (
    API,
    API_POSTGRESQL,
    API_REDIS,
    LEADER,
    LINKS,
    PARTS,
    POSTGRESQL,
    PROCESSES,
    REDIS,
    SERVERS,
    WORKER,
    WORKER_POSTGRESQL,
    WORKER_REDIS,
    Cell,
    Key,
)

P, L = "faults/test_processes.py::test_", "faults/test_links.py::test_"
S, R, F = "faults/test_postgresql.py::test_", "faults/test_redis.py::test_", "faults/test_failover.py::test_"
ARRIVES = ("which arrives", "which is lost")
C = "faults/test_commits.py::test_"
NO_ROW = "PostgreSQL's alone: what reaches it by any link meets the same, and is tried there."
NO_KEY = "Redis' alone: what reaches it by any link meets the same, and is tried there."
NO_COMMIT = "Redis has no COMMIT; the nearest is an answer that is lost: see reset mid-statement."
LEADING = "leader-postgresql", "leader-redis"


def no(reason: str, *parts: str) -> dict[str, Cell]:
    return dict.fromkeys(parts, Cell(reason=reason))


def yes(observed: str, *tests: str) -> Cell:
    return Cell(observed, tests)


def each(test: str, *ids: str) -> tuple[str, ...]:
    return tuple(f"{test}[{id_}]" for id_ in ids)


def of_links(fault: str, observed: dict[str, str]) -> dict[str, Cell]:
    """The four links and the leader's two."""
    names = {API_POSTGRESQL: "api-postgresql", API_REDIS: "api-redis"}
    names |= {WORKER_POSTGRESQL: "worker-postgresql", WORKER_REDIS: "worker-redis"}
    test = f"{L}a_fault_of_one_link_is_got_over"
    found = {part: yes(observed[part], f"{test}[{fault}-{name}]") for part, name in names.items()}
    return found | {LEADER: yes(observed[LEADER], *each(test, *(f"{fault}-{name}" for name in LEADING)))}


KILLED = f"{P}the_jobs_of_a_worker_that_was_killed_run_elsewhere"
ELSEWHERE = (
    "The wait goes on: 200, at most 10 s later; the job runs elsewhere, its attempt counted. Nothing is doubled."
)
FOUND_OUT = (
    "An answer that was lost is found out within 10 s, of the time from which new connections work, and the job runs"
    " again, which counts as an attempt."
)
OUT = f"{R}what_redis_does_not_do_is_waited_out"
POLLED = (
    "200: under way at once, new ones within 5 s or when Redis serves again, by polling. No job and no attempt lost."
)
ASKED_AGAIN = (
    "503, or no answer if it died: what was committed is done, once; the same Idempotency-Key gets the same job."
)

TABLE: dict[str, dict[str, Cell]] = {
    "kill": {
        API: yes(
            "The connection ends. What was committed is done; asked again with its key, the client gets that job.",
            f"{P}what_an_api_was_asked_before_it_was_killed_is_done_once",
            "test_api_death.py::test_what_was_asked_for_is_done_once_wherever_the_api_died[running-True]",
        ),
        WORKER: yes(ELSEWHERE, *each(KILLED, "alone-worker", "with its machine-worker")),
        LEADER: yes(
            "The same, and another leads within 4 s.", *each(KILLED, "alone-leader", "with its machine-leader")
        ),
        POSTGRESQL: yes(
            "503 at once for what needs it; waits go on, jobs under way begin again when it is back. /healthz is 503.",
            f"{S}a_server_that_ends_and_starts_is_got_over[killed]",
        ),
        REDIS: yes(POLLED, f"{OUT}[killed]"),
        **no("A link has no process; its end is the row cut.", *LINKS),
    },
    "freeze": {
        API: yes(
            "Its clients wait until it goes on, or leave; the job is done meanwhile.",
            f"{P}an_api_that_is_frozen_answers_when_it_goes_on",
        ),
        WORKER: yes(
            f"{ELSEWHERE} Thawed, it applies nothing.",
            f"{P}the_jobs_of_a_worker_that_is_frozen_run_elsewhere[worker]",
        ),
        LEADER: yes(
            "The same, and another leads within 4 s.", f"{P}the_jobs_of_a_worker_that_is_frozen_run_elsewhere[leader]"
        ),
        POSTGRESQL: yes(
            "What needs it waits, and is 503 2 s after its time is up. Nobody is taken for dead; jobs go on later.",
            f"{S}a_server_that_stands_still_delays_and_robs_nobody[longer]",
        ),
        REDIS: yes(POLLED, f"{OUT}[frozen]"),
        **no("A link that stands still is the row half-open.", *LINKS),
    },
    "restart": {
        API: yes(
            "Open waits are answered 202 at once; the job goes on.",
            f"{P}an_api_that_is_told_to_stop_answers_202_at_once",
        ),
        WORKER: yes(
            "200: what runs has 20 s to end and is handed back then. No attempt is used up.",
            f"{P}a_worker_that_is_told_to_stop_ends_what_it_runs[worker]",
        ),
        LEADER: yes("The same; another leads at once.", f"{P}a_worker_that_is_told_to_stop_ends_what_it_runs[leader]"),
        POSTGRESQL: yes(
            "As killed: 503 while it is away, then all goes on.",
            f"{S}a_server_that_ends_and_starts_is_got_over[restarted]",
        ),
        REDIS: yes(POLLED, f"{OUT}[restarted]"),
        **no("A link has no process; its end is the row cut.", *LINKS),
    },
    "slow (3 s)": {
        API: yes(
            "An API that stands still for 3 s answers so much later.",
            f"{P}an_api_that_stands_still_for_three_seconds_answers_so_much_later",
        ),
        POSTGRESQL: yes(
            "One that stands still for 3 s delays so long; nobody is robbed.",
            f"{S}a_server_that_stands_still_delays_and_robs_nobody[three seconds]",
        ),
        REDIS: yes(POLLED, f"{OUT}[slow]"),
        **of_links(
            "late",
            {
                API_POSTGRESQL: "A request costs several round trips: 200, 202, or 503 2 s after its time is up.",
                API_REDIS: "200: its jobs are handed over late, or found by the workers within 5 s.",
                WORKER_POSTGRESQL: "It cannot say that it lives and is given up after 6 s; others do the work.",
                WORKER_REDIS: "200: others take what comes.",
                LEADER: "It loses the lease, another leads within 4 s.",
            },
        ),
        WORKER: yes(
            "A worker that stands still for 3 s is not robbed: 200 so much later, no attempt used.",
            *each(f"{P}a_worker_that_stands_still_for_three_seconds_is_not_robbed", "worker", "leader"),
        ),
    },
    "cut": of_links(
        "cut",
        {
            API_POSTGRESQL: "503 at once for what needs it, /healthz 503; waits go on and end 200 when it is back.",
            API_REDIS: "200, by polling: its jobs are found by the workers within 5 s.",
            WORKER_POSTGRESQL: f"{ELSEWHERE} It takes nothing until it is back.",
            WORKER_REDIS: "200: what it runs ends; others take what comes.",
            LEADER: "Another leads within 4 s; who is cut off from either server leads nothing.",
        },
    )
    | no("What is cut off from both servers is the two links at once; each is tried by itself.", API, WORKER)
    | no("Cut off from everybody it is away, which is the row kill.", *SERVERS),
    "cut right after COMMIT": {
        API: yes(
            ASKED_AGAIN, *each(f"{P}an_api_that_dies_as_it_sends_commit_is_asked_again_and_it_is_done_once", *ARRIVES)
        ),
        WORKER: yes(
            "200: the commit has counted, or the job runs elsewhere within 10 s. Once in either case.",
            *each(f"{P}a_worker_that_dies_as_it_sends_commit_has_done_it_or_another_does", *ARRIVES),
        ),
        LEADER: yes(
            "Killed as it commits a rescue: the rescue has counted, or the next leader makes it.",
            *each(f"{P}a_leader_that_dies_as_it_commits_a_rescue_leaves_it_to_the_next", *ARRIVES),
            *each(
                f"{C}a_worker_cut_off_as_it_sends_commit_tries_again_and_it_is_done_once",
                *(f"leader-{how}" for how in ARRIVES),
            ),
        ),
        POSTGRESQL: yes(
            "Killed as it is sent COMMIT: the effect is there once, by that attempt or by the next.",
            f"{S}a_server_that_is_killed_as_it_is_sent_commit_has_committed_or_not",
        ),
        API_POSTGRESQL: yes(
            ASKED_AGAIN,
            *each(f"{C}an_api_cut_off_as_it_sends_commit_says_503_and_asked_again_it_is_done_once", *ARRIVES),
        ),
        WORKER_POSTGRESQL: yes(
            "200: the attempt is made again; if the commit had counted, it finds that and applies nothing.",
            *each(
                f"{C}a_worker_cut_off_as_it_sends_commit_tries_again_and_it_is_done_once",
                *(f"worker-{how}" for how in ARRIVES),
            ),
        ),
        **no(NO_COMMIT, REDIS, API_REDIS, WORKER_REDIS),
    },
    "half-open": of_links(
        "half_open",
        {
            API_POSTGRESQL: "What needs it hangs, and is 503 2 s after its time is up; a wait is 202 in time."
            " Once new connections work: 503 within 10 s for what hangs on a dead one, and all the pool is given up.",
            API_REDIS: "200, by polling; found out within 2 s by who publishes, within 10 s by who subscribes.",
            WORKER_POSTGRESQL: f"{ELSEWHERE} {FOUND_OUT}",
            WORKER_REDIS: "200: what it runs ends; others take what comes.",
            LEADER: f"Another leads within 4 s. {FOUND_OUT}",
        },
    )
    | no("A process or a server whose packets vanish is its links, each of which is tried.", API, WORKER, *SERVERS),
    "reset mid-statement": of_links(
        "reset",
        {
            API_POSTGRESQL: "Waits notice nothing. One handler's statement is 503 at once, and rolled back: by it the"
            " pool finds out.",
            API_REDIS: "200: what was under way is sent once more.",
            WORKER_POSTGRESQL: "200: the transaction is made again at once, which counts as an attempt.",
            WORKER_REDIS: "200. A job that was popped and never arrived is handed over again within 5 s.",
            LEADER: "As any worker; it goes on leading.",
        },
    )
    | no("What is reset is a connection: see the links.", API, WORKER, *SERVERS),
    "backend terminated": {
        API_POSTGRESQL: yes(
            "Waits notice nothing. A handler's statement is 503 at once.",
            f"{L}backends_that_are_terminated_are_got_over[api-postgresql]",
            "test_lost_connections.py::test_under_load_every_error_of_terminated_backends_is_retryable",
        ),
        WORKER_POSTGRESQL: yes(
            "200: the transaction is made again at once. A connection that died idle uses up no attempt.",
            f"{L}backends_that_are_terminated_are_got_over[worker-postgresql]",
            *each(
                "test_lost_connections.py::test_a_job_whose_pooled_connections_have_died_applies_its_effect_at_its_first_attempt",
                *("and the end", "alone"),
            ),
        ),
        LEADER: yes(
            "As any worker; it goes on leading.",
            *each(f"{L}backends_that_are_terminated_are_got_over", "leader-postgresql"),
            *each(f"{L}clients_that_redis_closes_connect_again", "leader-redis"),
        ),
        POSTGRESQL: yes(
            "All of them at once: 200, after another attempt.", f"{S}all_backends_terminated_at_once_are_got_over"
        ),
        API_REDIS: yes(
            "CLIENT KILL: 200; it connects again.", f"{L}clients_that_redis_closes_connect_again[api-redis]"
        ),
        WORKER_REDIS: yes(
            "CLIENT KILL: 200; it connects again.", f"{L}clients_that_redis_closes_connect_again[worker-redis]"
        ),
        **no("What is terminated is a connection: see the links.", API, WORKER, REDIS),
    },
    "pool exhausted": {
        API: yes(
            "Waits hold no connection and go on. What needs one waits for it, and is 503 2 s after its time is up.",
            f"{S}a_pool_that_is_exhausted_is_waited_for",
        ),
        WORKER: yes(
            "The job waits for a connection, which uses up no attempt.",
            "test_running.py::test_a_wait_for_a_connection_uses_up_no_attempt",
        ),
        LEADER: yes(
            "Maintenance has connections of its own: a pool of one rescues and runs what it has rescued.",
            "test_rescuer.py::test_a_worker_whose_pool_has_one_connection_rescues_too",
        ),
        **no("A pool is a process's: see API and worker. The server's own limit is the row max_connections.", *SERVERS),
        **no("A pool is a process's: see API and worker.", *LINKS),
    },
    "max_connections": {
        POSTGRESQL: yes(
            "503 at once for what needs a connection; waits go on, jobs are tried again.",
            f"{S}a_server_that_admits_nobody_more_is_waited_for[everybody]",
        ),
        API: yes("503 at once for what needs one.", f"{S}a_server_that_admits_nobody_more_is_waited_for[api]"),
        WORKER: yes("Its jobs are tried again.", f"{S}a_server_that_admits_nobody_more_is_waited_for[worker]"),
        LEADER: yes("The same.", f"{S}a_server_that_admits_nobody_more_is_waited_for[leader]"),
        REDIS: yes(f"`maxclients`. {POLLED}", f"{OUT}[nobody_more]"),
        **no("The limit is a server's, and met by who connects: see API and worker.", *LINKS),
    },
    "read-only": {
        POSTGRESQL: yes(
            "503 for what writes; jobs are tried again until it writes, and connections to it are given up.",
            f"{S}a_server_that_only_reads_is_waited_for",
            "test_http_errors.py::test_a_server_that_only_reads_is_away_and_its_connections_are_given_up[a standby]",
        ),
        **no("A Redis that only reads is the row read-only replica.", REDIS),
        **no(NO_ROW, *PROCESSES, *LINKS),
    },
    "failover": {
        POSTGRESQL: yes(
            "503 until the address leads to the new primary; waits go on, jobs under way begin again. Nothing is lost.",
            f"{F}a_failover_to_a_replica_that_has_everything_is_got_over",
        ),
        **no("Redis' failovers are the rows Sentinel failover and read-only replica.", REDIS),
        **no(NO_ROW, *PROCESSES, *LINKS),
    },
    "failover, commits lost": {
        POSTGRESQL: yes(
            "What the replica never had is gone, also if it was answered 200: 404. What it had is done once, and the"
            " invoices run on without a gap. `synchronous_commit` with a synchronous standby is what prevents this.",
            f"{F}a_failover_that_loses_the_last_commits_doubles_nothing",
        ),
        **no("Redis may lose everything: see kill and old file restored.", REDIS),
        **no(NO_ROW, *PROCESSES, *LINKS),
    },
    "maxmemory": {
        REDIS: yes(
            f"{POLLED} What waits in it drains.", f"{OUT}[full]", "test_redis_limits.py::test_a_full_redis_drains"
        ),
    },
    "too few replicas": {REDIS: yes(f"NOREPLICAS. {POLLED}", f"{OUT}[without_replicas]")},
    "old file restored": {
        REDIS: yes(
            "200. Messages of jobs that have ended apply nothing; what is missing is handed over within 5 s.",
            *each(f"{R}an_old_file_of_redis_that_is_restored_does_nothing_twice", "dump", "append-only file"),
        ),
    },
    "read-only replica": {
        REDIS: yes(
            f"READONLY. {POLLED}", f"{OUT}[only_reading]", "test_fetcher.py::test_a_worker_gets_over_a_failover"
        ),
    },
    "MISCONF": {REDIS: yes(POLLED, f"{OUT}[cannot_save]")},
    "ACL": {
        REDIS: yes(f"NOPERM, for everybody. {POLLED}", f"{OUT}[without_rights]"),
        WORKER_REDIS: yes(
            "Said as what it is; what waited runs once the right is granted.",
            *each(
                "test_redis_limits.py::test_a_right_that_is_missing_is_said_as_what_it_is_and_waited_for",
                *("-@sortedset", "-@pubsub", "-@scripting", "-time"),
            ),
        ),
        API_REDIS: yes(
            "200, by polling; said once.",
            "test_coordinator.py::test_what_redis_refuses_is_said_once_while_all_else_goes_on",
        ),
    },
    "Sentinel failover": {
        REDIS: yes(
            f"{POLLED} A worker is told of Sentinel by `RedisSettings`, an API by a client of redis-py's `Sentinel`.",
            "faults/test_sentinel.py::test_a_failover_by_sentinel_is_got_over",
        ),
    },
    "clock ±1 h": {
        part: yes(
            "Nothing: what is due is PostgreSQL's to say, and who lives that of what others have seen.",
            *each(
                f"{P}a_wrong_clock_hurries_nothing_and_delays_nothing", f"{name}-an hour fast", f"{name}-an hour slow"
            ),
        )
        for part, name in {API: "api", WORKER: "worker", LEADER: "leader"}.items()
    }
    | no(
        "A C program's clock can be put off only by a preloaded library, which is not among what the suite installs.",
        *SERVERS,
    )
    | no("A link has no clock.", *LINKS),
}
OF_REDIS = (
    "maxmemory",
    "too few replicas",
    "old file restored",
    "read-only replica",
    "MISCONF",
    "ACL",
    "Sentinel failover",
)

LOST = f"{L}an_answer_of_redis_that_is_lost_loses_no_job"
for part, role in {API_REDIS: "api", WORKER_REDIS: "worker", LEADER: "leader"}.items():
    cell = TABLE["reset mid-statement"][part]
    TABLE["reset mid-statement"][part] = yes(cell.observed, *cell.tests, f"{LOST}[{role}]")
for fault in OF_REDIS:
    TABLE[fault] = no(NO_KEY, *PARTS) | TABLE[fault]
CELLS: dict[Key, Cell] = {(part, fault): cell for fault, row in TABLE.items() for part, cell in row.items()}
