"""The arena as a timeline: time runs to the right, op by op; memory lies upwards, offset by offset."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import TYPE_CHECKING, Literal

from markupsafe import Markup

from refengine.cli.charts.svg import drawing, element, line, path, rectangle, stairs, text, ticks
from refengine.cli.figures import bytes_figure

if TYPE_CHECKING:
    from refengine.program import Instruction, MemoryPlan, Program

Kind = Literal["stream", "norm", "attention", "ffn", "rope", "output", "workspace"]

KINDS: dict[Kind, str] = {
    "stream": "residual stream",
    "norm": "norm",
    "attention": "attention",
    "ffn": "feed-forward",
    "rope": "rope table",
    "output": "rows for logits",
    "workspace": "working memory",
}

SHORT = {"attention": "attn", "attention output": "out"}

LEFT, RIGHT, TOP = 64.0, 12.0, 26.0
CURVE, GAP, ARENA, OPS = 92.0, 34.0, 372.0, 104.0
"""Heights in pixels: the curve of living bytes, the room below it, the arena, the names of the ops."""


@dataclass(frozen=True)
class Box:
    """A piece of the arena while it belongs to one value, or to several that share it in turn.

    Attributes:
        label: its name.
        kind: what it serves.
        offset, nbytes: where it lies.
        first, last: from which instruction to which.
        about: lines that say what lies there.
    """

    label: str
    kind: Kind
    offset: int
    nbytes: int
    first: int
    last: int
    about: tuple[str, ...]


@dataclass(frozen=True)
class Stretch:
    """Consecutive instructions that stand under one heading, each so many pixels wide."""

    heading: str
    first: int
    last: int
    width: float
    named: bool


def boxes(program: Program, plan: MemoryPlan) -> list[Box]:
    """What lies in the arena, in order of time."""
    values: dict[tuple[int, int, int], list[Instruction]] = defaultdict(list)
    for instruction in program:
        if (place := plan.placements.get(instruction.result.index)) is not None:
            values[place.offset, place.first, place.last].append(instruction)
    found = []
    for (offset, first, last), instructions in values.items():
        place = plan.placements[instructions[0].result.index]
        names = list(dict.fromkeys(map(name, instructions)))
        about = (" → ".join(names), *(_value(i, plan) for i in instructions), *_place(offset, place.nbytes))
        found.append(Box(names[0], _kind(instructions[0]), offset, place.nbytes, first, last, about))
    for at, place in plan.workspaces.items():
        op = program.instructions[at]
        about = (f"working memory of {op.op.name} ({name(op)})", *_place(place.offset, place.nbytes))
        found.append(Box("", "workspace", place.offset, place.nbytes, at, at, about))
    return sorted(found, key=lambda box: (box.first, box.offset))


def living(found: Sequence[Box], instructions: int) -> list[int]:
    """Bytes of the arena in use at each instruction."""
    changes = [0] * (instructions + 1)
    for box in found:
        changes[box.first] += box.nbytes
        changes[min(box.last + 1, instructions)] -= box.nbytes
    return list(accumulate(changes))[:-1]


def name(instruction: Instruction) -> str:
    """What a value is called: after the weight that gives it, else after its op."""
    roles = [v.name.rpartition(".")[2] for v in instruction.operands if v is not None and v.kind == "weight"]
    if instruction.op.name == "embedding":
        return "x"
    return (roles[0] if roles else instruction.op.name).replace("_", " ")


def overview(program: Program, detailed: int = 2, width: float = 1140) -> list[Stretch]:
    """The first layers and the output op by op, the layers between them small."""
    sections = _sections(program)
    small = sections[1 + detailed : -1]
    wide = sum(last - first + 1 for _, first, last in [*sections[: 1 + detailed], sections[-1]])
    room = min(0.24 * width, 11.0 * len(small))
    each = min((width - room) / wide, 34)
    shown = [Stretch(h, first, last, each, True) for h, first, last in sections[: 1 + detailed]]
    if small:
        (_, first, _), (_, _, last) = small[0], small[-1]
        heading = f"layers {detailed} to {len(sections) - 3}"
        shown.append(Stretch(heading, first, last, room / (last - first + 1), False))
    heading, first, last = sections[-1]
    return [*shown, Stretch(heading, first, last, each, True)]


def whole(program: Program, each: float = 15) -> list[Stretch]:
    """Every layer op by op."""
    return [Stretch(heading, first, last, each, True) for heading, first, last in _sections(program)]


def draw(program: Program, plan: MemoryPlan, stretches: Sequence[Stretch], **attributes: object) -> Markup:
    """The timeline, and above it the bytes in use at each instruction."""
    return _Timeline(program, plan, stretches).svg(**attributes)


def _sections(program: Program) -> list[tuple[str, int, int]]:
    """Instructions before the layers, of each layer and after them: heading, first, last."""
    rows = max(at for at, i in enumerate(program) if i.op.name == "take_rows")
    headings = [
        "output" if at >= rows else "input" if i.layer is None else f"layer {i.layer}"
        for at, i in enumerate(program)
    ]
    sections = []
    for heading, group in groupby(range(len(headings)), headings.__getitem__):
        positions = list(group)
        sections.append((heading, positions[0], positions[-1]))
    return sections


def _kind(instruction: Instruction) -> Kind:
    op, role = instruction.op.name, name(instruction)
    if op in ("embedding", "scale", "add"):
        return "stream"
    if op == "rms_norm":
        return "norm" if role != "output norm" else "output"
    if op == "rope_table":
        return "rope"
    if role in ("gate", "up", "down", "gated"):
        return "ffn"
    return "output" if op == "take_rows" or instruction.layer is None else "attention"


def _value(instruction: Instruction, plan: MemoryPlan) -> str:
    shape = " × ".join(f"{plan.sizes.get(str(d), d):,}" for d in instruction.result.shape)
    how = {"view": ", a view", "in_place": ", in place"}.get(instruction.op.sharing, "")
    return f"%{instruction.result.index} = {instruction.op.name}{how}: {shape} {plan.dtype.name}"


def _place(offset: int, nbytes: int) -> tuple[str, ...]:
    return (f"{nbytes:,} bytes from offset {offset:,}",)


def _label(box: Box, left: float, right: float, top: float, bottom: float) -> list[Markup]:
    """A box's name inside it, level or upright, in full or its last word, where there is room for one."""
    full = "x, the residual stream" if box.kind == "stream" else box.label
    for label in dict.fromkeys((full, box.label, box.label.rpartition(" ")[2], SHORT.get(box.label, ""))):
        length = 6.4 * len(label) + 9
        if label and bottom - top >= 11 and right - left >= length:
            return [text(left + 6, (top + bottom) / 2 + 3.8, label, "label")]
        if label and right - left >= 12 and bottom - top >= length:
            x, y = (left + right) / 2 + 3.8, bottom - 6
            return [text(x, y, label, "label", transform=f"rotate(-90 {x:.1f} {y:.1f})")]
    return []


class _Timeline:
    """Scales and parts of one picture."""

    def __init__(self, program: Program, plan: MemoryPlan, stretches: Sequence[Stretch]) -> None:
        self.program, self.plan, self.stretches = program, plan, stretches
        self.boxes = boxes(program, plan)
        widths = [s.width for s in stretches for _ in range(s.first, s.last + 1)]
        self.edges = [LEFT, *(LEFT + x for x in accumulate(widths))]
        self.curve_bottom = TOP + CURVE
        self.arena_top = self.curve_bottom + GAP
        self.arena_bottom = self.arena_top + ARENA

    def svg(self, **attributes: object) -> Markup:
        """The picture."""
        width, height = self.edges[-1] + RIGHT, self.arena_bottom + OPS
        description = (
            f"The arena of {bytes_figure(self.plan.arena_bytes)} over {len(self.program)} instructions: "
            f"{len(self.boxes)} pieces of memory, each with its offset and its life"
        )
        parts = [
            *self._headings(),
            *self._curve(),
            *self._axis(),
            *map(self._box, self.boxes),
        ]
        return drawing(width, height, description, [*parts, *self._ops()], **attributes)

    def _headings(self) -> list[Markup]:
        """Where layers begin and end."""
        parts = []
        for stretch in self.stretches:
            left, right = self.edges[stretch.first], self.edges[stretch.last + 1]
            parts.append(line(right, TOP - 8, right, self.arena_bottom, "border"))
            label = stretch.heading if right - left > 6 * len(stretch.heading) else ""
            parts.append(text((left + right) / 2, TOP - 12, label, "heading"))
        return parts

    def _curve(self) -> list[Markup]:
        """Bytes in use under the line of the arena's size."""
        most = self.plan.arena_bytes
        used = living(self.boxes, len(self.program))

        def y(nbytes: float) -> float:
            return self.curve_bottom - nbytes / most * (CURVE - 14)

        steps = stairs((self.edges[at], self.edges[at + 1], y(n)) for at, n in enumerate(used))
        area = [(LEFT, self.curve_bottom), *steps, (self.edges[-1], self.curve_bottom)]
        peak = max(used)
        told = (
            "all of it in use at the peak"
            if peak == most
            else f"{bytes_figure(peak)} in use at the peak, {peak / most:.1%}"
        )
        return [
            path(area, "alive-area", closed=True),
            path(steps, "alive-line"),
            line(LEFT, y(most), self.edges[-1], y(most), "limit"),
            text(LEFT + 4, y(most) - 5, f"arena {bytes_figure(most)}, {told}", "note strong"),
            text(LEFT - 8, self.curve_bottom, "0", "tick end"),
            text(LEFT - 8, y(most) + 4, bytes_figure(most), "tick end"),
            text(
                14,
                (y(most) + self.curve_bottom) / 2,
                "in use",
                "axis",
                transform=f"rotate(-90 14 {(y(most) + self.curve_bottom) / 2})",
            ),
        ]

    def _axis(self) -> list[Markup]:
        parts = [rectangle(LEFT, self.arena_top, self.edges[-1] - LEFT, ARENA, "ground")]
        for offset in ticks(self.plan.arena_bytes, 5):
            parts.append(line(LEFT, self._y(offset), self.edges[-1], self._y(offset), "grid"))
            parts.append(
                text(LEFT - 8, self._y(offset) + 4, bytes_figure(offset) if offset else "0", "tick end")
            )
        middle = self.arena_top + ARENA / 2
        parts.append(text(14, middle, "offset in the arena", "axis", transform=f"rotate(-90 14 {middle})"))
        return parts

    def _y(self, offset: float) -> float:
        return self.arena_bottom - offset / self.plan.arena_bytes * ARENA

    def _box(self, box: Box) -> Markup:
        left, right = self.edges[box.first], self.edges[box.last + 1]
        top, bottom = self._y(box.offset + box.nbytes), self._y(box.offset)
        inset = 0.75 if right - left > 3 else 0.0
        life = (
            f"from {self._at(box.first)} to {self._at(box.last)}"
            if box.last > box.first
            else f"during {self._at(box.first)}"
        )
        shape = rectangle(
            left + inset, top + min(inset, (bottom - top) / 4), right - left - 2 * inset,
            bottom - top - 2 * min(inset, (bottom - top) / 4), f"box {box.kind}", rx=2 if inset else None,
        )  # fmt: skip
        parts = [element("title", "\n".join([*box.about, life])), shape]
        return element("g", *parts, *_label(box, left, right, top, bottom))

    def _at(self, at: int) -> str:
        instruction = self.program.instructions[at] if at < len(self.program) else None
        if instruction is None:
            return "the end"
        where = "" if instruction.layer is None else f" of layer {instruction.layer}"
        return f"{instruction.op.name} ({name(instruction)}){where}"

    def _ops(self) -> list[Markup]:
        """The names of the instructions, where there is room."""
        parts = []
        for stretch in self.stretches:
            if not stretch.named:
                left, right = self.edges[stretch.first], self.edges[stretch.last + 1]
                parts.append(
                    text((left + right) / 2, self.arena_bottom + 18, "again and again", "note middle")
                )
                continue
            for at in range(stretch.first, stretch.last + 1):
                x, y = (self.edges[at] + self.edges[at + 1]) / 2 + 3, self.arena_bottom + 10
                label = self._label(self.program.instructions[at])
                parts.append(text(x, y, label, "op", transform=f"rotate(-55 {x:.1f} {y:.1f})"))
        return parts

    def _label(self, instruction: Instruction) -> str:
        if instruction.result is self.program.output:
            return "linear logits"
        op = instruction.op.name
        return f"{op} {name(instruction)}" if op == "linear" else op.replace("_", " ")
