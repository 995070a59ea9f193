"""The counter as uvicorn serves it, alone and as an application that is mounted in another."""

from __future__ import annotations

import os

from fastapi import FastAPI
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine

from coord.http import EventStreams
from tests.counter import counter

maker = async_sessionmaker(create_async_engine(os.environ["COORD_DATABASE_URL"]), expire_on_commit=False)
streams = EventStreams(maker, duration=float(os.environ["COORD_TEST_DURATION"]))
app = counter(maker, streams=streams)
outer = FastAPI()
outer.mount("/mounted", app)
