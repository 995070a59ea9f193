"""What was found, as tables, and whether it is what was promised."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks.backlog.stage import SLOTS
from benchmarks.figures import percentile
from benchmarks.report import Section, Table, Target, milliseconds

if TYPE_CHECKING:
    from benchmarks.backlog.measure import Found
    from benchmarks.backlog.stage import Scale

PICK_UP_SECONDS, UNHEARD_SECONDS, IDLE_SHARE = 0.1, 5.0, 0.05
GROWTH_MIB = 16
"""That counts as flat: a page of jobs, and what an allocator keeps of it."""


def report(found: Found, scale: Scale) -> Section:
    waits = {
        "of the highest priority, while they drain": found.pick_ups,
        "the same, without a coordinator": found.unheard_meanwhile,
        "without a coordinator, nothing else due": found.unheard,
    }
    rows = [
        (
            what,
            str(len(times)),
            *(milliseconds(percentile(times, share)) for share in (0.5, 0.99)),
            milliseconds(max(times)),
        )
        for what, times in waits.items()
    ]
    idle = [
        (what, *(f"{share:.1%}" for share in (one.worker, one.postgresql)))
        for what, one in {"with an empty ledger": found.empty, f"with {scale.later:,} for later": found.idle}.items()
    ]
    memory = [
        (who, *(f"{size / 2**20:.1f}" for size in (sizes[0], max(sizes), sizes[-1])))
        for who, sizes in found.memory.items()
    ]
    rest = "" if found.drained else ", in which not all of them were done"
    remark = f"{scale.due:,} jobs drained in {found.seconds:.0f} s, {SLOTS} at a time in one worker process{rest}."
    return Section(
        "A long backlog",
        [
            Table(("pick-up of a new job", "jobs", "p50", "p99", "slowest"), rows),
            Table(("nothing due: CPU, share of a core", "worker and its heartbeat", "PostgreSQL"), idle),
            Table(("resident memory, MiB", "before", "highest", "after"), memory),
        ],
        _targets(found, scale),
        [remark],
    )


def _targets(found: Found, scale: Scale) -> list[Target]:
    p99, unheard = percentile(found.pick_ups, 0.99), max(found.unheard + found.unheard_meanwhile)
    cost = sum((found.idle.worker, found.idle.postgresql)) - sum((found.empty.worker, found.empty.postgresql))
    growth = {who: (max(sizes) - sizes[0]) / 2**20 for who, sizes in found.memory.items()}
    what = f"{scale.later:,} later, {scale.due:,} due at once: "
    grown = ", ".join(f"{who} {mib:+.1f} MiB" for who, mib in growth.items())
    return [
        Target(f"{what}pick-up of a higher priority, p99", "≤ 100 ms", milliseconds(p99), p99 <= PICK_UP_SECONDS),
        Target(f"{what}of a job without a coordinator", "≤ 5 s", f"{unheard:.1f} s", unheard <= UNHEARD_SECONDS),
        Target(
            f"{scale.later:,} later, nothing due: what a worker and PostgreSQL use for that",
            "≤ 5 % of a core",
            f"{max(cost, 0.0):.1%} more than with an empty ledger",
            cost <= IDLE_SHARE,
        ),
        Target(f"{what}memory while they drain", f"≤ {GROWTH_MIB} MiB more", grown, max(growth.values()) <= GROWTH_MIB),
    ]
