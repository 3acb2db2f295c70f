"""From a Program's instructions to stages: which entry computes an op, and what memory it meets."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refengine.program import Instruction, Value
from refengine_numba.arguments import Arguments
from refengine_numba.attention_arguments import attention_arguments, sealed_attention_arguments
from refengine_numba.attention_sizes import workspace_bytes
from refengine_numba.entries import Entry, entry
from refengine_numba.kv_arguments import kv_seal_arguments, kv_write_arguments
from refengine_numba.kv_pool import pool_of
from refengine_numba.matrix import quantization, rounding
from refengine_numba.row_arguments import elementwise, rms_norm, rope, rope_table, take_rows
from refengine_numba.stage import Span, Stage


@dataclass(frozen=True)
class Site:
    """An instruction with everything it is applied to.

    Attributes:
        instruction: of the Program.
        operands: arrays for the largest step, matrices in tiles, and caches.
        result: where the result goes; ``None`` for a changed state.
        workspace: uint8, the working memory that is planned for it.
        isa: the instruction set to compile for.
        threads: the most that will compute.
    """

    instruction: Instruction
    operands: tuple[Any, ...]
    result: NDArray[Any]
    workspace: NDArray[np.uint8]
    isa: str
    threads: int

    @property
    def attributes(self) -> Mapping[str, Any]:
        """Of the instruction."""
        return self.instruction.attributes

    @property
    def rows(self) -> str:
        """The symbol of the number of rows of the first operand, by which work is shared out."""
        return _rows(self.instruction.operands[0])


def _rows(value: Value | None) -> str:
    return "" if value is None else str(value.shape[0])


def lower(site: Site) -> list[Stage]:
    """The stages of an instruction."""
    return LOWERINGS[site.instruction.op.name](site)


def _embedding(site: Site) -> list[Stage]:
    ids, table = site.operands
    arguments = table.look_up(ids, site.result, rows=site.rows)
    return [Stage(entry("rows.look_up", table.encoding), arguments, (), (Span.of(site.result, site.rows),))]


def _linear(site: Site) -> list[Stage]:
    x, weight, *bias = site.operands
    arguments = weight.product(x, site.result, *bias, rows=site.rows)
    return [
        Stage(entry("products.float32", weight.encoding), arguments, (Span.of(x),), (Span.of(site.result),))
    ]


def _quantize(site: Site) -> list[Stage]:
    (x,) = site.operands
    arguments = quantization(x, site.result.reshape(-1), rows=site.rows)
    spans = (Span.of(x, site.rows),), (Span.of(site.result),)
    return [Stage(entry("activations.quantize"), arguments, *spans)]


def _linear_a8(site: Site) -> list[Stage]:
    codes, weight, *bias = site.operands
    arguments = weight.product(codes.reshape(-1), site.result, *bias, rows=site.rows)
    product = entry("products.mixed8", weight.encoding, site.isa)
    return [Stage(product, arguments, (Span.of(codes),), (Span.of(site.result),))]


def _linear_a16(site: Site) -> list[Stage]:
    x, weight, *bias = site.operands
    rounded = site.workspace[: x.nbytes].view(np.float32).reshape(x.shape)
    powers = site.workspace[x.nbytes : x.nbytes + 4 * len(x)].view(np.float32)
    by_rows = Span.of(rounded, site.rows), Span.of(powers, site.rows)
    first = rounding(x, rounded, powers, rows=site.rows)
    second = weight.product_of_halves(rounded, powers, site.result, *bias, rows=site.rows)
    reads = Span.of(rounded), Span.of(powers)
    return [
        Stage(entry("halves.round"), first, (Span.of(x, site.rows),), by_rows),
        Stage(entry("products.mixed16", weight.encoding), second, reads, (Span.of(site.result),)),
    ]


def _by_rows(site: Site, kernel: Entry, arguments: Arguments, *operands: NDArray[Any]) -> list[Stage]:
    """One stage in which each thread reads and writes rows of its own."""
    reads = tuple(Span.of(operand, site.rows) for operand in operands)
    return [Stage(kernel, arguments, reads, (Span.of(site.result, site.rows),))]


def _rms_norm(site: Site) -> list[Stage]:
    x, weight = site.operands
    arguments = rms_norm(x, weight, site.result, eps=site.attributes["eps"], rows=site.rows)
    return _by_rows(site, entry("norm.rms_norm"), arguments, x)


def _rope_table(site: Site) -> list[Stage]:
    options = {"frequencies": site.attributes["frequencies"], "rows": site.rows}
    arguments = rope_table(
        site.operands[0], site.result, magnitude=site.attributes.get("magnitude", 1.0), **options
    )
    return _by_rows(site, entry("rope.rope_table"), arguments)


def _rope(site: Site) -> list[Stage]:
    x, table = site.operands
    arguments = rope(x, table, site.result, rows=site.rows)
    return _by_rows(site, entry("rope.rope", site.attributes["pairing"]), arguments, x, table)


def _elementwise(name: str, site: Site, factor: float = 1.0) -> list[Stage]:
    x, y = (*site.operands, None)[:2]
    arguments = elementwise(name, x, y, site.result, factor=factor, rows=site.rows)
    return _by_rows(
        site, entry("elementwise.elementwise", name), arguments, *(x for x in (x, y) if x is not None)
    )


def _add(site: Site) -> list[Stage]:
    return _elementwise("add", site)


def _scale(site: Site) -> list[Stage]:
    return _elementwise("scale", site, site.attributes["factor"])


def _softcap(site: Site) -> list[Stage]:
    return _elementwise("softcap", site, site.attributes["cap"])


def _gated(site: Site) -> list[Stage]:
    return _elementwise(site.attributes["activation"], site)


def _kv_write(site: Site) -> list[Stage]:
    cache, k, v, slots = site.operands
    rows = _rows(site.instruction.operands[1])
    arguments = kv_write_arguments(cache, k, v, slots, rows=rows)
    reads = Span.of(k, rows), Span.of(v, rows)
    return [Stage(entry("kv_write.kv_write", pool_of(cache).kind), arguments, reads, (_cache_span(cache),))]


def _attention(site: Site) -> list[Stage]:
    q, cache, tables, starts, contexts = site.operands
    arguments = attention_arguments(
        q,
        cache,
        tables,
        starts,
        contexts,
        site.result,
        site.workspace,
        isa=site.isa,
        threads=site.threads,
        columns=_columns(site.instruction.operands[2]),
        **_scoring(site),
    )
    return _attending(site, arguments, _cache_span(cache))


def _sealed_attention(site: Site) -> list[Stage]:
    q, cache, exact, tables, exact_tables, starts, contexts = site.operands
    arguments = sealed_attention_arguments(
        q,
        cache,
        exact,
        tables,
        exact_tables,
        starts,
        contexts,
        site.result,
        site.workspace,
        isa=site.isa,
        threads=site.threads,
        columns=_columns(site.instruction.operands[3]),
        exact_columns=_columns(site.instruction.operands[4]),
        **_scoring(site),
    )
    return _attending(site, arguments, _cache_span(cache), _cache_span(exact))


def _scoring(site: Site) -> dict[str, Any]:
    """Attributes of attention that say what a score is."""
    return {name: site.attributes.get(name) for name in ("scale", "window", "softcap")}


def _attending(site: Site, arguments: Arguments, *caches: Span) -> list[Stage]:
    """Both stages of attention: work that is shared freely, and what is left of it, by rows."""
    q, working = Span.of(site.operands[0]), Span.of(site.workspace)
    merged = (Span.of(site.result, site.rows), working)
    return [
        Stage(entry("attention_entry.attention"), arguments, (q, *caches), (Span.of(site.result), working)),
        Stage(entry("attention_entry.merge"), arguments, (working,), merged),
    ]


def _kv_seal(site: Site) -> list[Stage]:
    cache, exact, tables, exact_tables, starts, contexts = site.operands
    columns, exact_columns = map(_columns, site.instruction.operands[2:4])
    arguments = kv_seal_arguments(
        cache,
        exact,
        tables,
        exact_tables,
        starts,
        contexts,
        columns=columns,
        exact_columns=exact_columns,
    )
    keys, values = (form.name for form in cache.formats)
    seal = entry("seal.kv_seal", keys, values, exact.keys.dtype.name)
    return [Stage(seal, arguments, (_cache_span(exact),), (_cache_span(cache),))]


def _cache_span(cache: Any) -> Span:
    """A layer's keys and values stand for each other: whoever writes one writes both."""
    return Span(cache.keys.ctypes.data, 1)


def _columns(tables: Value | None) -> str:
    """The symbol of a pool's columns of block tables."""
    return f"M{tables.name.rpartition('.')[2]}" if tables is not None else "M"


def _take_rows(site: Site) -> list[Stage]:
    x, ids = site.operands
    taken = str(site.instruction.result.shape[0])
    arguments = take_rows(x, ids, site.result, rows=site.rows, taken=taken)
    return [Stage(entry("copy.take_rows"), arguments, (Span.of(x),), (Span.of(site.result, taken),))]


LOWERINGS: Mapping[str, Callable[[Site], list[Stage]]] = MappingProxyType(
    {
        "embedding": _embedding,
        "rope_table": _rope_table,
        "rms_norm": _rms_norm,
        "linear": _linear,
        "quantize_a8": _quantize,
        "linear_a8": _linear_a8,
        "linear_a16": _linear_a16,
        "rope": _rope,
        "kv_write": _kv_write,
        "attention": _attention,
        "kv_seal": _kv_seal,
        "sealed_attention": _sealed_attention,
        "add": _add,
        "scale": _scale,
        "softcap": _softcap,
        "gated": _gated,
        "take_rows": _take_rows,
    }
)
"""Every op that this backend computes, by name."""


def workspace(instruction: Instruction, sizes: Mapping[str, int], threads: int) -> int:
    """Bytes of working memory that an instruction's kernels take at most, for steps up to these sizes."""
    if instruction.op.name == "linear_a16":
        return _rounded_bytes(instruction.operands[0], sizes)
    if instruction.op.name not in ("attention", "sealed_attention"):
        return 0
    q, cache = instruction.operands[:2]
    if q is None or cache is None:
        return 0
    _, heads, size = q.shape
    return workspace_bytes(sizes[str(q.shape[0])], int(heads), int(cache.shape[2]), int(size), threads)


def _rounded_bytes(x: Value | None, sizes: Mapping[str, int]) -> int:
    """Of activations [T, K], rounded, and of a power of two for each row."""
    return 0 if x is None else 4 * sizes[str(x.shape[0])] * (int(x.shape[1]) + 1)


VIEWS = frozenset({"split_heads", "merge_heads"})
"""Ops that only give memory another shape: nothing is computed."""
