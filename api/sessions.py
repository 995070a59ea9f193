"""The request's session, committed before the answer leaves."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends
from sqlalchemy.ext.asyncio import AsyncSession

from coord import create_db_dependency
from worker.database import session_maker

get_db = create_db_dependency(session_maker=session_maker)
Session = Annotated[AsyncSession, Depends(get_db)]
