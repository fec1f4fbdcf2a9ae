"""JSON that other hands may have touched: read strictly, taken by key, type and range."""

import json
import math
import re
from typing import Any, NoReturn

from .errors import BundleError

_PATH = re.compile(r"[A-Za-z0-9_.+-]+(/[A-Za-z0-9_.+-]+)*")


def parse_json(data: bytes, name: str) -> "JsonObject":
    """Read a JSON object; refuses duplicate keys, NaN and Infinity, other encodings than UTF-8, half characters."""
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_unique_keys, parse_constant=_refuse_constant)
        json.dumps(value, ensure_ascii=False).encode("utf-8")  # a lone \ud800 would fail much later
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{name} is not JSON as export-onnx writes it ({error}): export it again") from error
    return JsonObject(value, name)


class JsonObject:
    """A JSON object whose values are taken by key, type and range; a wrong one raises :class:`BundleError`."""

    def __init__(self, value: Any, where: str) -> None:
        self._where = where
        if not isinstance(value, dict):
            self._refuse("", value, "an object")
        self._values: dict[str, Any] = value

    @property
    def names(self) -> list[str]:
        """All keys."""
        return list(self._values)

    def text(self, key: str) -> str:
        """Take a string."""
        value = self._values.get(key)
        return value if isinstance(value, str) else self._refuse(key, value, "a string")

    def whole(self, key: str, *, low: int = 1, high: int = 2**31 - 1) -> int:
        """Take a whole number from ``low`` to ``high``."""
        value = self._values.get(key)
        if type(value) is int and low <= value <= high:
            return value
        return self._refuse(key, value, f"a whole number from {low} to {high}")

    def number(self, key: str) -> float:
        """Take a finite number."""
        value = self._values.get(key)
        if isinstance(value, float) and math.isfinite(value):  # 1e999 is read as infinity
            return value
        return self._refuse(key, value, "a number with a point")

    def flag(self, key: str) -> bool:
        """Take true or false."""
        value = self._values.get(key)
        return value if isinstance(value, bool) else self._refuse(key, value, "true or false")

    def path(self, key: str) -> str:
        """Take a relative path that stays inside the bundle."""
        value = self._values.get(key)
        if isinstance(value, str) and _PATH.fullmatch(value) and not {".", ".."} & set(value.split("/")):
            return value
        return self._refuse(key, value, "a relative path inside the bundle")

    def child(self, key: str) -> "JsonObject":
        """Take an object."""
        return JsonObject(self._values.get(key), f"{self._where}: {key}")

    def children(self, key: str) -> list["JsonObject"]:
        """Take an array of objects."""
        return [JsonObject(value, f"{self._where}: {key}[{i}]") for i, value in enumerate(self.array(key))]

    def array(self, key: str) -> list[Any]:
        """Take an array, of anything."""
        value = self._values.get(key)
        return value if isinstance(value, list) else self._refuse(key, value, "an array")

    def is_null(self, key: str) -> bool:
        """Tell whether the key is there and its value is null."""
        return key in self._values and self._values[key] is None

    def _refuse(self, key: str, value: Any, wanted: str) -> NoReturn:
        shown = "missing" if value is None else json.dumps(value)[:40]
        raise BundleError(f"{self._where}: {key or 'value'} is {shown}, not {wanted}: export the bundle again")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("a key is given twice")
    return values


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"it holds {name}")
