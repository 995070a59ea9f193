"""The containers agree with the application: its addresses, its health, its patience. No engine runs these tests."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
import yaml
from sqlalchemy import URL, make_url

from coord.cli.dev import command
from coord.dev.command import WORKER_GRACE
from coord.http.limits import MAX_WAIT_SECONDS
from coord.worker.lifecycle import CANCELLED_SECONDS as LAST
from coord.worker.maintenance.beat import HEALTH_SECONDS as HEALTHY
from coord.worker.settings import worker_settings
from tests import warm
from tests.serving import eventually
from tests.shop import API, SERVING, WORKER, WORKING, emptied, empty_database, running
from worker.environment import DATABASE, DEFAULT_DATABASE_URL, DEFAULT_REDIS_URL, REDIS

ROOT = Path(__file__).parent.parent
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
PROGRAMS = ("api", "worker")
SERVERS = {"postgresql": make_url(DEFAULT_DATABASE_URL), "valkey": make_url(DEFAULT_REDIS_URL)}


def seconds(duration: str) -> float:
    match = re.fullmatch(r"(\d+)s", duration)
    assert match is not None
    return float(match[1])


def instructions(name: str) -> list[str]:
    """The arguments of each `name` in the Dockerfile."""
    return re.findall(rf"^{name} (.*)$", DOCKERFILE.replace("\\\n", " "), re.MULTILINE)


def test_the_services_are_two_servers_and_two_programs() -> None:
    assert set(SERVICES) == {*SERVERS, *PROGRAMS}
    assert SERVICES["postgresql"]["image"] == "postgres:18"
    assert SERVICES["valkey"]["image"].startswith("valkey/valkey:9")


@pytest.mark.parametrize("service", SERVICES)
def test_every_service_has_a_health_check_and_comes_back_when_it_ends(service: str) -> None:
    check = SERVICES[service]["healthcheck"]
    assert check["test"][0] == "CMD"
    assert seconds(check["timeout"]) <= seconds(check["interval"])
    assert 1 <= check["retries"] <= 10
    assert seconds(check["start_period"]) > 0
    assert SERVICES[service]["restart"] == "unless-stopped"


@pytest.mark.parametrize(("service", "url"), SERVERS.items())
def test_a_servers_port_is_published_where_the_application_looks_for_it(service: str, url: URL) -> None:
    assert SERVICES[service]["ports"] == [f"{url.host}:{url.port}:{url.port}"]


def test_the_apis_port_is_the_one_of_coord_dev() -> None:
    (port,) = (option.default for option in command.params if option.name == "port")
    assert SERVICES["api"]["ports"] == [f"127.0.0.1:{port}:8000"]


@pytest.mark.parametrize("service", PROGRAMS)
def test_a_programs_urls_are_its_defaults_but_for_the_host(service: str) -> None:
    environment = SERVICES[service]["environment"]
    hosts = {DATABASE: SERVERS["postgresql"].set(host="postgresql"), REDIS: SERVERS["valkey"].set(host="valkey")}
    assert environment == {name: url.render_as_string(hide_password=False) for name, url in hosts.items()}


def test_postgresql_is_made_with_the_user_and_database_of_the_default() -> None:
    url = SERVERS["postgresql"]
    assert SERVICES["postgresql"]["environment"] == {
        "POSTGRES_USER": url.username,
        "POSTGRES_PASSWORD": url.password,
        "POSTGRES_DB": url.database,
    }
    check = SERVICES["postgresql"]["healthcheck"]["test"]
    assert {f"--username={url.username}", f"--dbname={url.database}", "--host=127.0.0.1"} <= set(check)


def test_what_the_servers_store_is_in_named_volumes() -> None:
    mounted = {name: SERVICES[name]["volumes"] for name in SERVERS}
    assert mounted == {"postgresql": ["postgresql:/var/lib/postgresql"], "valkey": ["valkey:/data"]}
    assert set(COMPOSE["volumes"]) == set(SERVERS)
    assert all("volumes" not in SERVICES[name] for name in PROGRAMS)


def test_valkey_keeps_its_jobs() -> None:
    command = SERVICES["valkey"]["command"]
    assert command[command.index("--appendonly") + 1] == "yes"
    assert command[command.index("--maxmemory-policy") + 1] == "noeviction"


def test_there_may_be_many_workers() -> None:
    assert not {"container_name", "ports", "hostname"} & set(SERVICES["worker"])


@pytest.mark.parametrize("service", PROGRAMS)
def test_a_program_waits_for_postgresql_without_which_it_would_end(service: str) -> None:
    conditions = {name: wanted["condition"] for name, wanted in SERVICES[service]["depends_on"].items()}
    assert conditions == {"postgresql": "service_healthy", "valkey": "service_started"}


def test_a_stop_leaves_requests_and_jobs_the_time_they_may_take() -> None:
    command = yaml.safe_load(instructions("CMD")[-1])
    uvicorns = float(command[command.index("--timeout-graceful-shutdown") + 1])
    assert MAX_WAIT_SECONDS < uvicorns < seconds(SERVICES["api"]["stop_grace_period"])
    grace = inspect.signature(worker_settings).parameters["grace"].default
    assert grace + LAST < seconds(SERVICES["worker"]["stop_grace_period"])
    assert grace + LAST < WORKER_GRACE


def test_the_programs_are_the_ones_that_are_documented() -> None:
    command = yaml.safe_load(instructions("CMD")[-1])
    assert "command" not in SERVICES["api"]
    assert command[:2] == ["uvicorn", "api:app"]
    assert command[command.index("--host") + 1] == "0.0.0.0"
    assert SERVICES["worker"]["command"] == ["arq", "worker.Settings"]
    assert SERVICES["worker"]["healthcheck"]["test"] == ["CMD", "arq", "--check", "worker.Settings"]


def test_a_worker_that_has_died_is_not_healthy_at_the_next_check() -> None:
    assert seconds(SERVICES["worker"]["healthcheck"]["interval"]) > HEALTHY


async def succeeds(command: list[str], **environment: str) -> bool:
    """Of `python` and of programs that are modules."""
    module = command[1:] if command[0] == "python" else command
    status, *_ = await warm.ended(*module, env=environment)
    return status == 0


async def test_the_health_checks_tell_a_program_that_runs_from_one_that_does_not(
    database_url: str, redis_url: str
) -> None:
    await emptied(redis_url)
    checks = {name: SERVICES[name]["healthcheck"]["test"][1:] for name in PROGRAMS}
    async with AsyncExitStack() as stack:
        url = await stack.enter_async_context(empty_database(database_url))
        urls = {DATABASE: url, REDIS: redis_url}
        assert not await succeeds(checks["worker"], **urls)
        async with running(API, url, redis_url) as api, running(WORKER, url, redis_url) as worker:
            port = (await api.says(SERVING))[1].rsplit(":", 1)[1]
            check = [part.replace(":8000/", f":{port}/") for part in checks["api"]]
            assert check != checks["api"]
            await worker.says(WORKING)
            assert await succeeds(check)
            await eventually(lambda: succeeds(checks["worker"], **urls), within=10)
        assert not await succeeds(check)

        async def is_unhealthy() -> bool:
            return not await succeeds(checks["worker"], **urls)

        await eventually(is_unhealthy, within=20)  # the key lasts six seconds


def test_the_dockerfile_passes_its_linter() -> None:
    linter = Path(sys.executable).parent / "hadolint"
    found = subprocess.run([linter, ROOT / "Dockerfile"], check=False, capture_output=True, text=True, timeout=30)
    assert (found.returncode, found.stdout) == (0, "")


def test_the_image_does_not_run_as_root() -> None:
    user = instructions("USER")[-1]
    assert user.isdecimal()
    assert user != "0"
    assert DOCKERFILE.index("\nUSER ") < DOCKERFILE.index("\nCMD ")


def test_the_image_installs_what_is_pinned_and_keeps_no_cache() -> None:
    fetching = [run for run in re.split(r" && ", " && ".join(instructions("RUN"))) if "pip " in run]
    assert fetching
    for run in fetching:
        assert "--no-cache-dir" in run
        assert "--constraint constraints.txt" in run or "--no-index" in run
    assert {stage.split()[0] for stage in instructions("FROM")} == {"python:3.13-slim-trixie"}


def test_the_builder_is_sent_what_the_dockerfile_copies_and_no_more() -> None:
    copied = {source for copy in instructions("COPY") for source in copy.split()[:-1]}
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert lines[1] == "*"
    assert {line[1:] for line in lines if line.startswith("!")} == copied
    assert all((ROOT / source).exists() for source in copied)
