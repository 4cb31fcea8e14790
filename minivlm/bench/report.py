"""A measured row, its arithmetic, and how rows are shown: a table, JSON, a plot.

It measures nothing.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from minivlm.errors import InputError

GIGA = 1e9


@dataclass(frozen=True)
class Floor:
    """The least that a machine must do: bytes to read once and operations to do, at the rates measured in this run.

    bytes, operations: of one run of the row; bandwidth: bytes a second; rate: operations a second.
    measured: seconds, where the floor is itself a measured time.
    """

    bytes: float = 0.0
    operations: float = 0.0
    bandwidth: float = 1.0
    rate: float = 1.0
    measured: float = 0.0

    @property
    def seconds(self) -> float:
        """Reading and computing may overlap, so the longer of the two. 0.5 GB at 25 GB/s: 0.02."""
        return max(self.bytes / self.bandwidth, self.operations / self.rate, self.measured)


@dataclass(frozen=True)
class Row:
    """One line of the table.

    name      as in `minivlm bench NAME`; setting: what was run
    seconds   median of minivlm's time; peers: medians of the others' in the same run, by name
    tokens    produced in that time, 0 where the row makes none; context: positions in the cache before it
    size      of what is varied, 0 where nothing is; memory: bytes that it took beside the weights
    note      what a reader must know
    """

    name: str
    setting: str
    seconds: float
    floor: Floor | None = None
    peers: dict[str, float] = field(default_factory=dict)
    tokens: int = 0
    batch: int = 1
    context: int = 0
    size: int = 0
    memory: int = 0
    note: str = ""

    @property
    def share(self) -> float | None:
        """The part of the floor's speed that is reached, 1 at best."""
        return None if self.floor is None else self.floor.seconds / self.seconds

    @property
    def ratios(self) -> dict[str, float]:
        """How many times as long each peer takes."""
        return {name: seconds / self.seconds for name, seconds in self.peers.items()}

    def to_json(self) -> dict[str, Any]:
        """Plain values, the derived ones among them."""
        floor = None if self.floor is None else asdict(self.floor) | {"seconds": self.floor.seconds}
        speed = self.tokens / self.seconds if self.tokens else None
        derived = {"floor": floor, "share_of_floor": self.share, "ratios": self.ratios, "tokens_per_second": speed}
        return asdict(self) | derived


@dataclass(frozen=True)
class Memory:
    """The most memory that loading and answering took, of minivlm and of others, beside what is needed."""

    name: str
    setting: str
    needed: int  # bytes of weights and cache
    peak: int  # bytes of anonymous memory above that of the interpreter before loading
    peers: dict[str, int]

    def to_json(self) -> dict[str, Any]:
        """Plain values with the ratio to what is needed."""
        return asdict(self) | {"ratio": self.peak / self.needed}


@dataclass(frozen=True)
class Report:
    """What was run where, and the rows."""

    machine: dict[str, str]
    rows: tuple[Row | Memory, ...]

    def to_json(self) -> dict[str, Any]:
        """One object."""
        return {"machine": self.machine, "rows": [row.to_json() for row in self.rows]}

    def lines(self) -> list[str]:
        """The table in Markdown, below what it was measured on."""
        head = [f"{name:14}{value}" for name, value in self.machine.items()]
        names = ("row", "setting", "floor", "minivlm", "of floor", "tokens/s", "others (times as long)")
        body = [_cells(row) for row in self.rows]
        widths = [max(len(line[i]) for line in (names, *body)) for i in range(len(names))]
        table = [names, tuple("-" * width for width in widths), *body]
        padded = (" | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in table)
        return [*head, "", *(f"| {line} |" for line in padded)]


def _cells(row: Row | Memory) -> tuple[str, ...]:
    if isinstance(row, Memory):
        others = ", ".join(f"{name} {size / GIGA:.2f} GB" for name, size in row.peers.items())
        size, ratio = f"{row.peak / GIGA:.2f} GB", f"{row.peak / row.needed:.2f} x"
        return row.name, row.setting, f"{row.needed / GIGA:.2f} GB", size, ratio, "", others
    others = ", ".join(f"{name} {milli(row.peers[name])} ({ratio:.2f})" for name, ratio in row.ratios.items())
    share = "" if row.share is None else f"{row.share:.0%}"
    floor = "" if row.floor is None else milli(row.floor.seconds)
    speed = f"{row.tokens / row.seconds:.1f}" if row.tokens else ""
    memory = f"{row.memory / 1e6:.1f} MB" if row.memory else ""
    rest = "; ".join(part for part in (others, memory, row.note) if part)
    return row.name, row.setting, floor, milli(row.seconds), share, speed, rest


def milli(seconds: float) -> str:
    """Milliseconds with three digits: 0.0213 s is "21.3 ms"."""
    value = 1000 * seconds
    return f"{value:.0f} ms" if value >= 100 else f"{value:.3g} ms"


def plot(rows: Sequence[Row | Memory], path: Path) -> None:
    """Tokens per second against context and against batch size, with the floor and the peers, and how time and memory
    grow, as a picture file.

    Raises InputError where matplotlib is missing, or where no row has a speed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError("--plot needs matplotlib: pip install 'minivlm[train]'") from error
    timed = [row for row in rows if isinstance(row, Row) and row.tokens and row.context]
    grown = [row for row in rows if isinstance(row, Row) and row.size]
    speeds = bool(_series(timed, "context") or _series(timed, "batch"))
    if not speeds and not grown:
        raise InputError("--plot: no two of the rows measured differ in context or batch alone")
    figure = Figure(figsize=(14, 4.5 * (speeds + bool(grown))), layout="constrained")
    FigureCanvasAgg(figure)
    panels = list(figure.subplots(speeds + bool(grown), 2, squeeze=False))
    if speeds:
        _plot_speed(panels[0], timed)
    if grown:
        _plot_growth(panels[-1], grown)
    figure.savefig(path, dpi=120)


def _plot_growth(panels: Sequence, rows: Sequence[Row]) -> None:
    """Seconds and bytes against size, one line for all rows that vary the same."""
    series: dict[str, list[Row]] = {}
    for row in rows:
        what, _, size = row.setting.rpartition(", ")
        series.setdefault(f"{what}, by {size.split()[-1]}", []).append(row)
    for what, points in series.items():
        at = [row.size for row in points]
        (line,) = panels[0].plot(at, [row.seconds for row in points], marker="o", label=what)
        for peer in points[0].peers:
            times = [row.peers[peer] for row in points]
            panels[0].plot(at, times, color=line.get_color(), linestyle="--", marker=".", label=f"{what}: {peer}")
        panels[1].plot(at, [row.memory / 1e6 for row in points], color=line.get_color(), marker="o", label=what)
    for axes, label in zip(panels, ("seconds", "MB beside the weights"), strict=True):
        axes.set(xscale="log", yscale="log", xlabel="size", ylabel=label)
        axes.legend(fontsize=6, loc="upper left", bbox_to_anchor=(1, 1))


def _plot_speed(panels: Sequence, timed: Sequence[Row]) -> None:
    """Tokens a second against context and against batch."""
    for axes, axis, rest in zip(panels, ("context", "batch"), ("batch", "context"), strict=True):
        for setting, points in _series(timed, axis).items():
            points = sorted(points, key=lambda row: row.context if axis == "context" else row.batch)
            at = [row.context if axis == "context" else row.batch for row in points]
            (line,) = axes.plot(at, [row.tokens / row.seconds for row in points], marker="o", label=setting)
            floors = [row.tokens / row.floor.seconds for row in points if row.floor is not None]
            axes.plot(at, floors, color=line.get_color(), linestyle=":", label=f"{setting}: floor")
            for peer in points[0].peers:
                speeds = [row.tokens / row.peers[peer] for row in points]
                axes.plot(at, speeds, color=line.get_color(), linestyle="--", marker=".", label=f"{setting}: {peer}")
        axes.set(ylim=(0, None), xlabel=f"{axis} (the same {rest})", ylabel="tokens per second")
        if _series(timed, axis):
            axes.legend(fontsize=6, loc="upper left", bbox_to_anchor=(1, 1))


def _series(rows: Sequence[Row], axis: str) -> dict[str, list[Row]]:
    """The rows that differ in nothing but the axis, by what they share; only where there are two or more."""
    series: dict[str, list[Row]] = {}
    for row in rows:
        parts = row.setting.split(", ")
        words = "keys" if axis == "context" else "rows"
        series.setdefault(", ".join(part for part in parts if words not in part), []).append(row)
    return {setting: points for setting, points in series.items() if len(points) > 1}
