"""The public names with their types, as text: `python -m tests.api` prints it, `--write` keeps it in tests/api.txt.

Public is what `__all__` of `coord`, `coord.console`, `coord.http` and `coord.testing` names, and of its classes what
begins with no underscore. Types are written as the source has them.
"""

from __future__ import annotations

import ast
import enum
import inspect
import sys
import textwrap
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_overloads

if TYPE_CHECKING:
    from collections.abc import Iterator

MODULES = ("coord", "coord.console", "coord.http", "coord.testing")
SNAPSHOT = Path(__file__).with_suffix(".txt")
COMMAND = "python -m tests.api --write"
WIDTH = 110
PLAIN = bool | int | float | str | None
"""The types of class attributes that are shown although nothing annotates them."""


class Verbatim(str):
    """Shown by `inspect.Signature` without quotes."""

    __slots__ = ()
    __repr__ = str.__str__


def described() -> str:
    return "\n".join(line for module in MODULES for line in _module(module)) + "\n"


def _module(name: str) -> Iterator[str]:
    module = import_module(name)
    yield f"# {name}"
    for each in sorted(module.__all__):
        yield ""
        yield from _member(each, getattr(module, each))
    yield ""


def _member(name: str, value: Any) -> Iterator[str]:
    if inspect.isclass(value):
        yield from _class(name, value)
    elif callable(value):
        yield from _function(name, value)
    else:
        yield f"{name}: {type(value).__name__}"


def _class(name: str, cls: type[Any]) -> Iterator[str]:
    bases = ", ".join(_note(base) for base in vars(cls).get("__orig_bases__", cls.__bases__) if base is not object)
    yield f"class {name}({bases})" if bases else f"class {name}"
    if issubclass(cls, enum.Enum):
        yield from (f"    {member.name} = {member.value!r}" for member in cls)
    own = [base for base in cls.__mro__ if _is_ours(base)]
    lines: dict[str, list[str]] = {}
    for base in reversed(own):  # what a class says of itself comes after, and in place of, what its bases say
        lines |= _said_by(base)
    for attribute in sorted(lines):
        yield from (f"    {line}" for line in lines[attribute])


def _said_by(cls: type[Any]) -> dict[str, list[str]]:
    annotated = {
        name: [f"{name}: {note}" + (f" = {value!r}" if isinstance(value := vars(cls).get(name, ...), PLAIN) else "")]
        for name, note in inspect.get_annotations(cls).items()
        if _is_public(name)
    }
    assigned = {name: [f"{name}: {note}"] for name, note in _assigned(cls) if name not in annotated}
    rest = {
        name: [*_attribute(name, value)]
        for name, value in vars(cls).items()
        if name not in annotated and (_is_public(name) or (name == "__init__" and _is_ours(value)))
    }
    if issubclass(cls, enum.Enum):
        rest = {name: lines for name, lines in rest.items() if name not in cls.__members__}
    return annotated | assigned | {name: lines for name, lines in rest.items() if lines}


def _attribute(name: str, value: Any) -> Iterator[str]:
    if isinstance(value, property):
        yield f"{name}: {_note(inspect.signature(value.fget).return_annotation)}  # property" if value.fget else name
    elif isinstance(value, classmethod | staticmethod):
        yield from _function(name, value.__func__, before=f"@{type(value).__name__} ")
    elif inspect.isfunction(value):
        yield from _function(name, value)
    elif isinstance(value, PLAIN):
        yield f"{name} = {value!r}"


def _assigned(cls: type[Any]) -> Iterator[tuple[str, str]]:
    """Public attributes that `__init__` sets, by their annotation or by that of the parameter they are set from."""
    function = vars(cls).get("__init__")
    if not _is_ours(function):
        return
    try:
        body = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, SyntaxError):  # made by a dataclass
        return
    parameters = inspect.signature(function).parameters
    for node in ast.walk(body):
        match node:
            case ast.Assign(targets=[ast.Attribute(value=ast.Name(id="self"), attr=name)], value=value):
                note = _note(parameters[name].annotation) if name in parameters else _made_by(value)
            case ast.AnnAssign(target=ast.Attribute(value=ast.Name(id="self"), attr=name), annotation=annotation):
                note = ast.unparse(annotation)
            case _:
                continue
        if _is_public(name):
            yield name, note


def _made_by(value: ast.expr) -> str:
    match value:
        case ast.Call(func=ast.Name(id=cls)) if cls[0].isupper():
            return cls
        case _:
            return f"set to {ast.unparse(value)}"


def _function(name: str, function: Any, *, before: str = "") -> Iterator[str]:
    wrapped = inspect.unwrap(function)
    kind = "async def" if inspect.iscoroutinefunction(wrapped) else "def"
    if inspect.isasyncgenfunction(wrapped):
        kind = "async with" if wrapped is not function else "async for"
    for one in get_overloads(wrapped) or [wrapped]:
        yield from _signature(f"{before}{kind} {name}", inspect.signature(one))


def _signature(head: str, signature: inspect.Signature) -> Iterator[str]:
    parameters = [
        parameter.replace(annotation=_bare(parameter.annotation), default=_default(parameter.default))
        for parameter in signature.parameters.values()
    ]
    shown = signature.replace(parameters=parameters, return_annotation=_bare(signature.return_annotation))
    if len(line := f"{head}{shown}") <= WIDTH:
        yield line
        return
    yield f"{head}("
    yield from (f"    {part}," for part in _parts(parameters))
    returned = shown.return_annotation
    yield ")" if returned is inspect.Signature.empty else f") -> {_note(returned)}"


def _parts(parameters: list[inspect.Parameter]) -> Iterator[str]:
    kinds = [parameter.kind for parameter in parameters]
    for number, parameter in enumerate(parameters):
        last = kinds[number - 1] if number else None
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY and last not in (
            inspect.Parameter.KEYWORD_ONLY,
            inspect.Parameter.VAR_POSITIONAL,
        ):
            yield "*"
        yield str(parameter)
        if parameter.kind is inspect.Parameter.POSITIONAL_ONLY and kinds[number + 1 : number + 2] != [parameter.kind]:
            yield "/"


def _bare(annotation: Any) -> Any:
    return annotation if annotation is inspect.Parameter.empty else Verbatim(_note(annotation))


def _default(value: Any) -> Any:
    if isinstance(value, enum.Enum):
        return Verbatim(f"{type(value).__name__}.{value.name}")
    if value is not inspect.Parameter.empty and (inspect.isroutine(value) or inspect.isclass(value)):
        return Verbatim(value.__qualname__)
    return value


def _note(annotation: Any) -> str:
    if annotation is inspect.Signature.empty:
        return "?"
    if isinstance(annotation, type):
        return annotation.__name__
    return annotation if isinstance(annotation, str) else inspect.formatannotation(annotation).replace("~", "")


def _is_ours(value: Any) -> bool:
    return str(getattr(value, "__module__", "")).partition(".")[0] == "coord"


def _is_public(name: str) -> bool:
    return not name.startswith("_")


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        SNAPSHOT.write_text(described())
    elif not sys.argv[1:]:
        sys.stdout.write(described())
    else:
        raise SystemExit(f"usage: {COMMAND}")
