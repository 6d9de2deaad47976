"""What `bench --plot` draws: a group of bars for each thing that was timed, a bar for each way to do it."""

from __future__ import annotations

from collections.abc import Mapping
from math import nan

from e3nn_accel.cli import CommandError
from e3nn_accel.cli.timing import Spread

LONGEST = 60
"""Letters of a label's line: an operation may be of many modules, and bars need room."""


def bars(measured: Mapping[str, Mapping[str, Spread]], path: str, title: str) -> None:
    """Draw medians as bars with their quartiles, and save the picture.

    Args:
        measured: Times by label, which may have lines, and by way. A way that has none has no bar.
        path: Of the picture; its suffix says which kind.
        title: What it is of, and on which machine.

    Raises:
        CommandError: matplotlib is not installed, or the file can't be written.
    """
    try:
        import matplotlib
    except ImportError:
        raise CommandError("--plot needs matplotlib: pip install 'e3nn_accel[cli]'") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    ways = list(dict.fromkeys(way for times in measured.values() for way in times))
    figure, axes = plt.subplots(figsize=(9, 1.5 + 0.16 * len(measured) * len(ways)))
    height = 0.8 / max(len(ways), 1)
    for n, way in enumerate(ways):
        found = [times.get(way, Spread(nan, nan, nan)) for times in measured.values()]
        places = [row + n * height for row in range(len(found))]
        reach = [
            [1e3 * (s.median - s.low) for s in found],
            [1e3 * (s.high - s.median) for s in found],
        ]
        axes.barh(places, [1e3 * s.median for s in found], height, xerr=reach, label=way, capsize=2)
    axes.set_yticks(
        [row + 0.4 - height / 2 for row in range(len(measured))],
        ["\n".join(map(_cut, label.splitlines())) for label in measured],
        fontsize="x-small",
    )
    axes.margins(y=0.01)
    axes.invert_yaxis()
    axes.set(xscale="log", xlabel="ms, median and quartiles")
    axes.legend(loc="lower right", fontsize="small")
    figure.suptitle(title, fontsize="small", wrap=True)
    figure.tight_layout()
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise CommandError(f"--plot {path}: {error}") from error
    finally:
        plt.close(figure)


def _cut(line: str) -> str:
    return line if len(line) <= LONGEST else f"{line[: LONGEST - 3]}..."
