"""What has broken such kernels elsewhere, looked for in the Triton IR of a compiled one."""

from __future__ import annotations

import linecache
import re
from typing import NamedTuple

__all__ = ["Product", "products_of_turned_products", "wide_offsets"]


def wide_offsets(ttir: str) -> bool:
    """Whether every offset that all of a program shares has 64 bits: operands may have 2^31 entries."""
    offsets = re.findall(r"tt\.addptr [^:]*: !tt\.ptr<\w+>, (i\d+)", ttir)
    return bool(offsets) and set(offsets) == {"i64"}


class Product(NamedTuple):
    """A line of a kernel."""

    file: str
    line: int

    @property
    def text(self) -> str:
        """The source."""
        return linecache.getline(self.file, self.line).strip()


class _Operation(NamedTuple):
    name: str
    operands: list[str]
    location: str


def products_of_turned_products(ttir: str) -> list[Product]:
    """Products of which an operand is the transposed result of a product, by the lines of their source.

    On Hopper such a product is wrong under Triton 3.4 to 3.7 in some layouts (flash-linear-attention #640 and
    #984). What is loaded from memory in between is no such result.
    """
    made, products = _parsed(ttir), []
    for operation in made.values():
        if operation.name == "tt.dot" and any(_is_turned_product(x, made) for x in operation.operands[:2]):
            products.append(_source(operation.location, ttir))
    return sorted(set(products))


def _parsed(ttir: str) -> dict[str, _Operation]:
    """Value -> what makes it; what a loop or a branch gives, and what a loop carries, is what it yields."""
    made: dict[str, _Operation] = {}
    opened: list[str | None] = []
    for line in map(str.strip, ttir.splitlines()):
        found = re.match(r"(%\w+)(?::\d+)? = \"?([\w.]+)(.*)", line)
        if found is not None:
            value, name, rest = found.groups()
            inputs, _, place = rest.partition(" loc(")
            made[value] = _Operation(name, re.findall(r"%\w+", inputs), place.rstrip(")"))
            for carried in re.findall(r"(%\w+) = %\w+", inputs) if name == "scf.for" else ():
                made[carried] = _Operation("carried", [value], "")
        region = re.match(r"(?:%\w+(?::\d+)? = )?scf\.(for|if|while)", line)
        if region is not None:
            opened.append(found[1] if found is not None else None)
        elif line.startswith("scf.yield") and opened and opened[-1] is not None:
            made[opened[-1]].operands.extend(re.findall(r"%\w+", line.split(":")[0]))
        elif re.match(r"\}(?! else)", line) and opened:
            opened.pop()
    return made


def _is_turned_product(value: str, made: dict[str, _Operation]) -> bool:
    """Whether a product's result gets there by a transposition, and by anything but memory."""
    queue, seen = [(value, False)], set()
    while queue:
        here, turned = queue.pop()
        operation = made.get(here)
        if (here, turned) in seen or operation is None:
            continue
        seen.add((here, turned))
        if operation.name == "tt.dot":
            if turned:
                return True
        elif operation.name not in ("tt.load", "tt.descriptor_load"):
            queue += [(x, turned or operation.name == "tt.trans") for x in operation.operands]
    return False


def _source(location: str, ttir: str) -> Product:
    """The innermost line of a location."""
    name = location
    while True:
        found = re.search(rf"^{re.escape(name)} = loc\((.*)\)$", ttir, re.MULTILINE)
        text = found[1] if found is not None else name
        place = re.search(r'"([^"]+)":(\d+)', text)
        if place is not None:
            return Product(place[1], int(place[2]))
        inner = re.search(r"#loc\w*", text)
        assert inner is not None and inner[0] != name, text
        name = inner[0]
