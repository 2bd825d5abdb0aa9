"""Reading the fields of a JSON body: each with its type and limits, and an error that names what is allowed."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Set
from typing import Any, NoReturn

from ..console.arguments import did_you_mean
from .api_errors import bad, shown


def parse_json(raw: bytes) -> dict[str, Any]:
    """The object that a body holds. Raises RequestError."""
    try:
        body = json.loads(raw.decode("utf-8"), parse_constant=_refuse_constant)
    except UnicodeDecodeError:
        raise bad("the body is not UTF-8; send a JSON object in UTF-8") from None
    except RecursionError:
        raise bad("the body is nested too deeply; send a JSON object as the API describes it") from None
    except ValueError as e:
        raise bad(f"the body is not JSON ({e}); send a JSON object") from None
    if not isinstance(body, dict):
        raise bad(f"the body must be a JSON object, not {shown(body)}")
    return body


def check_text(text: str, name: str) -> str:
    """Raises RequestError for lone surrogates, which JSON can write and UTF-8 cannot."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise bad(f"{name} holds a lone surrogate, which is no character", name) from None
    return text


class Fields:
    """The fields of one body; null counts as left out."""

    def __init__(self, body: Mapping[str, Any]) -> None:
        self._body = {k: v for k, v in body.items() if v is not None}

    def check_names(self, known: Set[str], refused: Mapping[str, str]) -> None:
        """Raise RequestError for fields that are not `known`, with the reason for those that are `refused`."""
        for name in self._body:
            if name in refused:
                raise bad(f"{name}: {refused[name]}", name, "unsupported_parameter")
            if name not in known:
                hint = did_you_mean(name, known) or f"; known fields: {', '.join(sorted(known))}"
                raise bad(f"unknown field {shown(name)}{hint}", shown(name), "unknown_parameter")

    def get(self, name: str) -> Any:
        return self._body.get(name)

    def flag(self, name: str, default: bool) -> bool:
        value = self._body.get(name, default)
        if not isinstance(value, bool):
            _wrong(name, "true or false", value)
        return value

    def whole(self, name: str, default: int | None, least: int, most: int | None = None) -> int | None:
        if name not in self._body:
            return default
        value = self._body[name]
        allowed = f"a whole number of at least {least}" if most is None else f"a whole number from {least} to {most}"
        if isinstance(value, float) and value.is_integer():  # 5.0, as some languages write a 5
            value = int(value)
        if (
            isinstance(value, bool)
            or not isinstance(value, int)
            or value < least
            or (most is not None and value > most)
        ):
            _wrong(name, allowed, value)
        return value

    def number(self, name: str, default: float, least: float, most: float) -> float:
        value = self._body.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
            _wrong(name, f"a number from {least:g} to {most:g}", value)
        return float(value)

    def text(self, name: str, default: str | None = None) -> str | None:
        value = self._body.get(name, default)
        if value is None:
            return None
        if not isinstance(value, str):
            _wrong(name, "a string", value)
        return check_text(value, name)

    def mapping(self, name: str) -> dict[str, Any]:
        value = self._body.get(name, {})
        if not isinstance(value, dict):
            _wrong(name, "an object", value)
        return value

    def texts(self, name: str, most: int) -> tuple[str, ...]:
        """One string or a list of up to `most`, none of them empty."""
        value = self._body.get(name, [])
        values = [value] if isinstance(value, str) else value
        if not isinstance(values, list) or len(values) > most or not all(isinstance(x, str) and x for x in values):
            _wrong(name, f"a string or a list of up to {most} strings, none of them empty", value)
        return tuple(check_text(x, name) for x in values)


def is_number(value: object) -> bool:
    """True for what JSON has as a finite number; a whole one may be too large for a float."""
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, int) and not isinstance(value, bool)


def _wrong(name: str, allowed: str, value: object) -> NoReturn:
    raise bad(f"{name} must be {allowed}, not {shown(value)}", name)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")
