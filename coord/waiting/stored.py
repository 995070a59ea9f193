"""Values that differ in Python and are one in PostgreSQL: what was flushed there is not always what comes back."""

from __future__ import annotations

import json
import math
import struct
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from sqlalchemy import CHAR, JSON, REAL

if TYPE_CHECKING:
    from sqlalchemy.types import TypeEngine


def is_stored_as(kind: TypeEngine[Any], seen: Any, value: Any) -> bool:
    """Whether `seen`, stored in a column of this kind, is read as `value`."""
    match seen, value:
        case (float() | Decimal(), float() | Decimal()) if math.isnan(seen) and math.isnan(value):
            return True
        case (int() | float() | Decimal(), Decimal()) if not isinstance(seen, bool):
            return math.isfinite(seen) and value.is_finite() and _rounded(seen, value) == value
        case (float(), float()) if isinstance(kind, REAL):
            return struct.pack("f", seen) == struct.pack("f", value)
        case (tuple(), list()):
            return [*seen] == value or (isinstance(kind, JSON) and _as_json(seen) == value)
        case (dict() | list(), dict() | list()) if isinstance(kind, JSON):
            return bool(_as_json(seen) == value)
        case (str(), str()) if isinstance(kind, CHAR):
            return seen.rstrip(" ") == value.rstrip(" ")
    return False


def _rounded(seen: float | Decimal, value: Decimal) -> Decimal:
    """To as many digits as NUMERIC has kept: 9.9 comes back as Decimal("9.90")."""
    exponent = value.as_tuple().exponent
    assert isinstance(exponent, int)
    return round(Decimal(str(seen)), -exponent)


def _as_json(value: Any) -> Any:
    """With lists for tuples and text for the keys of a dictionary."""
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError):
        return value
