"""Load and faults against an application that runs as its own processes, and a verdict on what came of it.

    shop = Application(api=["uvicorn", "api:app", "--port", "{port}"], workers=[["arq", "worker.Settings"]] * 2)
    proof = await prove(shop, client, effect_of=effect_of, read=read, seconds=30)
    assert proof.holds, proof

application.py  how an application is started, and each of its processes
links.py        a network link that can be cut
stack.py        the application, its servers and its links
faults.py       what goes wrong, and when: the same seed gives the same storm
client.py       a client's requests, as the history has them
prove.py        all of it together, and what is printed
"""

from __future__ import annotations

from coord.testing.history import Bounds, Complaint, Effect, Number, Row
from coord.testing.proof.application import Application
from coord.testing.proof.faults import Fault

try:
    from coord.testing.proof.client import Shown, Visit
    from coord.testing.proof.prove import Proof, prove
except ModuleNotFoundError as error:
    if error.name != "httpx":
        raise
    raise ImportError('a proof needs httpx: pip install "coord[testing]"') from error

__all__ = [
    "Application",
    "Bounds",
    "Complaint",
    "Effect",
    "Fault",
    "Number",
    "Proof",
    "Row",
    "Shown",
    "Visit",
    "prove",
]
