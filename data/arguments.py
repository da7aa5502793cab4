"""`key=value` arguments of this package's commands."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable

REQUIRED = object()


def parse_arguments(arguments: list[str], allowed: dict[str, tuple[Callable, object]]) -> dict:
    """`allowed`: key -> (type, default or REQUIRED). Accepts key=value and --key=value. Raises ValueError."""
    values = {key: default for key, (_, default) in allowed.items()}
    for argument in arguments:
        key, separator, text = argument.removeprefix("--").partition("=")
        if key not in allowed:
            close = difflib.get_close_matches(key, allowed, n=1)
            hint = f" (did you mean {close[0]}?)" if close else ""
            raise ValueError(f"unknown argument {key!r}{hint}: known are {', '.join(allowed)}")
        if not separator:
            raise ValueError(f"{argument!r}: expected {key}=VALUE")
        kind = allowed[key][0]
        try:
            values[key] = kind(text)
        except ValueError:
            raise ValueError(f"{key}={text!r}: expected {kind.__name__}") from None
    missing = [key for key, value in values.items() if value is REQUIRED]
    if missing:
        raise ValueError(f"missing {', '.join(f'{key}=...' for key in missing)}")
    return values


def run_command(main: Callable[[list[str]], None]) -> None:
    """A ValueError is the user's to repair: one line, exit status 2. A full disk or the like: status 1."""
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, ValueError) else 1)
