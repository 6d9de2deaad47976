"""How the contraction's kernels are laid out: all that was, or can be, chosen by measuring.

`tests/gpu/tune_contraction.py` times others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Kind = Literal["forward", "features", "weights"]


@dataclass(frozen=True)
class Schedule:
    """What a kernel is compiled and launched with.

    Attributes:
        threads: Of a block, at most.
        blocks: That a multiprocessor is to hold: a bound of registers; 1: none but the hardware's.
        registers: In words, for all weights and variables of a pass: more are computed in several passes.
            The compiler needs fewer, where it has but to sum: no limit.
        section: Lines of generated code between branches.
        together: Warps wait for one another between sections, so that they share what is fetched of the
            code: all of it is more than a multiprocessor's nearest instruction cache holds.
        each: Nodes that a thread takes one after the other, at most; those of a species share weights.
    """

    threads: int = 128
    blocks: int = 1
    registers: int = 1 << 20
    section: int = 1000
    together: bool = False
    each: int = 8


Choice = Callable[[Kind, bool, int, int], Schedule]
"""Of a kernel, whether it is that of a derivative, the bytes of a number, and components of outputs."""


_CHOSEN: dict[tuple[Kind, bool, int], Schedule] = {
    # for MACE's 0e+1o; dw's sums stay in registers, a pass at a time
    ("forward", False, 4): Schedule(blocks=5),
    ("features", False, 4): Schedule(blocks=5),
    ("weights", False, 4): Schedule(blocks=5, registers=210, section=300),
    ("forward", True, 4): Schedule(blocks=5),
    ("features", True, 4): Schedule(blocks=2, registers=180),
    ("weights", True, 4): Schedule(blocks=4, registers=210),
    ("forward", False, 8): Schedule(blocks=4),
    ("features", False, 8): Schedule(blocks=2, registers=210),
    ("weights", False, 8): Schedule(blocks=1, registers=210, section=100),
    ("forward", True, 8): Schedule(blocks=3),
    ("features", True, 8): Schedule(blocks=2, registers=210),
    ("weights", True, 8): Schedule(blocks=2, registers=210),
}


_FEW_OUTPUTS = 4
_MANY_OUTPUTS: dict[tuple[Kind, bool, int], Schedule] = {
    # 0e+1o+2e needs more registers
    ("features", False, 4): Schedule(blocks=4, section=300),
    ("weights", False, 4): Schedule(blocks=5, registers=210),
}


def chosen(kind: Kind, tangent: bool, number_bytes: int, outputs: int) -> Schedule:
    """For every device."""
    key = kind, tangent, number_bytes
    return _MANY_OUTPUTS.get(key, _CHOSEN[key]) if outputs > _FEW_OUTPUTS else _CHOSEN[key]


@dataclass(frozen=True)
class Layout:
    """A block's threads: so many nodes at a time, a team of threads for the channels of each.

    Attributes:
        team: Threads of a node.
        group: Nodes.
        chunks: Teams that the channels of a node need.
        threads: Of a block, whole warps.
    """

    team: int
    group: int
    chunks: int
    threads: int

    @classmethod
    def of(cls, schedule: Schedule, channels: int, several: bool) -> Layout:
        """``several``: a block may have several nodes at a time."""
        chunks = -(-channels // schedule.threads)
        team = -(-channels // chunks)
        group = schedule.threads // team if several else 1
        return cls(team, group, chunks, -(-group * team // 32) * 32)


def nodes_each(schedule: Schedule, teams: int, multiprocessors: int) -> int:
    """Nodes that a team takes one after the other, so that the device is filled a whole number of times.

    Args:
        schedule: Says how many at most, and how many blocks a multiprocessor holds.
        teams: Blocks that would be launched with a node each.
        multiprocessors: Of the device.
    """
    at_once = schedule.blocks * multiprocessors
    rounds = -(-teams // (schedule.each * at_once))
    return max(1, -(-teams // (rounds * at_once))) if rounds else 1
