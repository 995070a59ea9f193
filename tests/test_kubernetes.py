"""The manifests are what Kubernetes takes, and agree with the code. No cluster runs them."""

from __future__ import annotations

import inspect
from importlib import import_module
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from coord.worker.lifecycle import CANCELLED_SECONDS
from coord.worker.settings import worker_settings
from tests.shop import ROOT
from worker.environment import METRICS_HOST, METRICS_PORT

if TYPE_CHECKING:
    from pathlib import Path
    from types import ModuleType

FILES = sorted((ROOT / "kubernetes").glob("*.yaml"))
OBJECTS: list[dict[str, Any]] = [each for path in FILES for each in yaml.safe_load_all(path.read_text())]
PODS = {each["metadata"]["name"]: each["spec"]["template"]["spec"] for each in OBJECTS if each["kind"] == "Deployment"}
DOCKERFILE = (ROOT / "Dockerfile").read_text()


@pytest.fixture
def kubernetes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))  # without it the import of what it stands on warns
    return import_module("kubernetes_validate")


@pytest.mark.parametrize("manifest", OBJECTS, ids=lambda each: f"{each['kind']}-{each['metadata']['name']}")
def test_every_object_fits_the_schema_of_kubernetes(manifest: dict[str, Any], kubernetes: ModuleType) -> None:
    kubernetes.validate(manifest, "1.31", strict=True)


def test_a_misspelled_field_does_not_fit(kubernetes: ModuleType) -> None:
    wrong = {**OBJECTS[0], "spec": {**OBJECTS[0]["spec"], "replica": 2}}
    with pytest.raises(kubernetes.ValidationError, match="replica"):
        kubernetes.validate(wrong, "1.31", strict=True)


def test_a_pod_is_given_longer_to_stop_than_what_runs_in_it_takes() -> None:
    grace = inspect.signature(worker_settings).parameters["grace"].default
    assert PODS["shop-worker"]["terminationGracePeriodSeconds"] >= grace + CANCELLED_SECONDS
    (api,) = PODS["shop-api"]["containers"]
    before = int(api["lifecycle"]["preStop"]["exec"]["command"][1])
    assert '"--timeout-graceful-shutdown", "30"' in DOCKERFILE
    assert PODS["shop-api"]["terminationGracePeriodSeconds"] > before + 30


def test_what_runs_in_the_pods_is_the_images() -> None:
    for pod in PODS.values():
        (container,) = pod["containers"]
        assert f"USER {pod['securityContext']['runAsUser']}\n" in DOCKERFILE
        assert container["securityContext"]["readOnlyRootFilesystem"]
    (worker,) = PODS["shop-worker"]["containers"]
    assert worker["command"] == ["arq", "worker.Settings"]
    port = str(worker["ports"][0]["containerPort"])
    assert worker["env"] == [{"name": METRICS_PORT, "value": port}, {"name": METRICS_HOST, "value": "0.0.0.0"}]


def test_the_services_and_budgets_select_the_pods() -> None:
    labels = {each["metadata"]["name"]: each["spec"]["template"]["metadata"]["labels"] for each in OBJECTS[:1]}
    for each in OBJECTS:
        selector = each["spec"].get("selector", {})
        if each["kind"] in ("Service", "PodDisruptionBudget"):
            assert selector.get("matchLabels", selector) == labels["shop-api"]
