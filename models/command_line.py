"""The `key=value` arguments of the commands in `models` and `huggingface`.

A command describes its arguments as a dataclass; a field without a default is required. `--key=value` works
too, and a field whose name is a Python keyword ends in an underscore that users do not write.
"""

import difflib
import sys
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import MISSING, Field, fields
from typing import Any, TypeVar

from safetensors import SafetensorError

Arguments = TypeVar("Arguments")
_BOOLEANS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


def parse_arguments(kind: type[Arguments], argv: Sequence[str]) -> Arguments:
    """An instance of the dataclass `kind` from `key=value` words.

    Raises:
        ValueError: a word is no key=value; a key is unknown, given twice or missing; a value is misspelt.
    """
    known = {field.name.rstrip("_"): field for field in fields(kind)}
    types_by_name = typing.get_type_hints(kind)
    values: dict[str, Any] = {}
    for word in argv:
        key, equals, text = word.removeprefix("--").partition("=")
        if not equals:
            raise ValueError(f"expected key=value, got {word!r}; the keys are {', '.join(known)}")
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"the keys are {', '.join(known)}"
            raise ValueError(f"unknown key {key!r}; {hint}")
        if known[key].name in values:
            raise ValueError(f"{key} is given twice")
        values[known[key].name] = _value(key, text, types_by_name[known[key].name])
    missing = [key for key, field in known.items() if _required(field) and field.name not in values]
    if missing:
        raise ValueError(
            f"missing {', '.join(f'{key}=...' for key in missing)}; the keys are {', '.join(known)}"
        )
    return kind(**values)


def run_command(
    kind: type[Arguments], action: Callable[[Arguments], int | None], argv: Sequence[str] | None = None
) -> int:
    """Parse and act; the action's exit status, or 2 and one line on stderr for what the user got wrong."""
    argv = sys.argv[1:] if argv is None else argv
    if {"-h", "--help", "help"} & set(argv):
        print((kind.__doc__ or "").strip())
        return 0
    try:
        return action(parse_arguments(kind, argv)) or 0
    except (ValueError, OSError, SafetensorError) as error:  # the last: a disk that is full, for one
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def _required(field: Field) -> bool:
    return field.default is MISSING and field.default_factory is MISSING


def _value(key: str, text: str, kind: Any) -> Any:
    options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    wanted = next(option for option in options if option is not type(None))
    if text.lower() in ("none", "null") and type(None) in options and wanted is not str:
        return None  # but prompt=none is a prompt: a text is left out by not giving it
    try:
        if wanted is bool:
            return _BOOLEANS[text.lower()]
        if wanted == list[int]:
            return [int(part) for part in text.split(",")]
        return wanted(text)
    except (ValueError, KeyError):
        name = {bool: "true or false", list[int]: "whole numbers with commas between", int: "a whole number"}
        raise ValueError(f"{key}={text!r} is not {name.get(wanted, 'a number')}") from None
