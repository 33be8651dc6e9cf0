"""Rules of options: values checked against them, and errors that name what is near."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import field
from difflib import get_close_matches
from importlib import import_module
from operator import attrgetter
from typing import Any


class ConfigError(ValueError):
    """An option that does not exist, or a value that is not allowed."""


def _option(default: Any, help: str, **rule: Any) -> Any:
    return field(default=default, metadata={"help": help, **rule})


def whole(default: int | None, low: int, high: int, help: str) -> Any:
    """A whole number from low to high; None, where that is the default, is an option not given."""
    return _option(default, help, kind="whole", low=low, high=high)


def real(default: float | None, low: float, high: float, help: str) -> Any:
    """A number from low to high."""
    return _option(default, help, kind="real", low=low, high=high)


def choice(default: str, allowed: Iterable[str], help: str, imports: bool = False) -> Any:
    """One of a few words; with ``imports`` also MODULE:FUNCTION."""
    return _option(default, help, kind="choice", allowed=tuple(allowed), imports=imports)


def text(default: str, help: str, pattern: str = ".*", shape: str = "TEXT") -> Any:
    """Any text of a pattern."""
    return _option(default, help, kind="text", pattern=pattern, shape=shape)


def switch(default: bool, help: str) -> Any:
    """Yes or no."""
    return _option(default, help, kind="switch")


def several(default: tuple[Any, ...], of: Mapping[str, Any], help: str) -> Any:
    """A list, on the command line with commas."""
    return _option(default, help, kind="several", of=of)


def allowed(rule: Mapping[str, Any]) -> str:
    """Say what an option takes."""
    kind = rule["kind"]
    if kind == "whole":
        return f"a whole number from {rule['low']} to {rule['high']}"
    if kind == "real":
        return f"a number from {rule['low']:g} to {rule['high']:g}"
    if kind == "choice":
        return ", ".join(rule["allowed"]) + ", or MODULE:FUNCTION" * rule.get("imports", False)
    if kind == "switch":
        return "true or false"
    if kind == "several":
        return f"a list of {allowed(rule['of'])}"
    shape: str = rule["shape"]
    return {"DEV": "cpu, cuda or cuda:N"}.get(shape, "text")


def _number(word: str) -> object:
    try:
        return int(word) if re.fullmatch(r"[+-]?\d+", word) else float(word)
    except ValueError:
        return word


def read(rule: Mapping[str, Any], word: str) -> Any:
    """A value from the command line."""
    if rule["kind"] in ("whole", "real"):
        return check(rule, _number(word), word)
    if rule["kind"] == "several":
        words = [each.strip() for each in word.split(",")] if word.strip() else []
        return check(rule, [read(rule["of"], each) for each in words], word)
    if rule["kind"] == "switch":
        return check(rule, {"true": True, "false": False}.get(word.lower(), word))
    return check(rule, word)


def check(rule: Mapping[str, Any], value: Any, said: str | None = None) -> Any:
    """The value, if the rule allows it; ConfigError says what would be."""
    kind, good = rule["kind"], False
    if kind == "whole":
        good = type(value) is int and rule["low"] <= value <= rule["high"]
    elif kind == "real":
        good = type(value) in (int, float) and rule["low"] <= value <= rule["high"]
        value = float(value) if good else value
    elif kind == "choice":
        good = value in rule["allowed"] or (rule.get("imports", False) and is_import(value))
    elif kind == "switch":
        good = type(value) is bool
    elif kind == "text":
        good = isinstance(value, str) and re.fullmatch(rule["pattern"], value) is not None
    elif isinstance(value, (list, tuple)):
        value = tuple(check(rule["of"], each) for each in value)
        # Rates may drop twice at one place, methods are trained once; a run has at least one.
        good = rule["of"]["kind"] == "real" or 0 < len(value) == len(set(value))
    if not good:
        given = value if said is None else said
        near = nearest(str(given), rule["allowed"]) if kind == "choice" else ""
        raise ConfigError(f"got {given!r}, allowed is {allowed(rule)}{near}")
    return value


def is_import(value: object) -> bool:
    """Tells MODULE:FUNCTION from the name of something built in."""
    return isinstance(value, str) and re.fullmatch(r"[\w.]+:\w+", value) is not None


def imported(option: str, name: str) -> Callable[..., Any]:
    """Return the function that "MODULE:FUNCTION" names, from the working folder if nowhere else.

    Raises:
        ConfigError: it cannot be imported, or is no function.
    """
    module, _, function = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        found: Callable[..., Any] = attrgetter(function)(import_module(module))
    except (Exception, SystemExit) as error:
        raise ConfigError(f"{option}: {name!r} cannot be imported: {in_a_line(error)}") from error
    if not callable(found):
        raise ConfigError(f"{option}: {name!r} must be a function, got {type(found).__name__}")
    return found


def in_a_line(error: BaseException) -> str:
    """Return the kind of an error and the first line of its text."""
    return f"{type(error).__name__}: {error}".splitlines()[0].rstrip(": ")


def nearest(name: str, names: Iterable[str]) -> str:
    """Words for an error: the known name that a wrong one may have meant."""
    found = get_close_matches(name, list(names), n=1)
    return f"; did you mean {found[0]}?" if found else ""
