"""Arguments that several commands share, and the files they name."""

from __future__ import annotations

import argparse
import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

from e3nn_accel.cli import CommandError
from e3nn_accel.errors import E3nnAccelWarning

DTYPES = ("float32", "float64")


def add_json(parser: argparse.ArgumentParser) -> None:
    """``--json``."""
    parser.add_argument(
        "--json", action="store_true", help="print one JSON document and nothing else"
    )


def add_structures(parser: argparse.ArgumentParser) -> None:
    """``--structures``."""
    parser.add_argument(
        "--structures", metavar="FILE", help="any file that ase reads (default: built from the "
        "model's elements)",
    )  # fmt: skip


def add_device(
    parser: argparse.ArgumentParser, default: str | None = "cpu", meaning: str = "cpu"
) -> None:
    """``--device``; of a default that depends on other arguments, None, its ``meaning`` is told."""
    parser.add_argument(
        "--device",
        type=_device,
        default=default,
        metavar="cuda",
        help=f"where to run (default: {meaning})",
    )


def _device(text: str) -> str:
    import torch

    try:
        device = torch.device(text)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"{text!r}: wanted cpu, cuda or cuda:1, say")
    if device.type == "cuda":
        devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= devices:
            raise CommandError(
                f"--device {text}: torch finds {devices or 'no'} CUDA devices; "
                "`e3nn-accel doctor` says more"
            )
    return text


def dtypes(text: str) -> tuple[str, ...]:
    """A comma-separated list of dtypes."""
    names = tuple(part.strip() for part in text.split(","))
    if not names or any(name not in DTYPES for name in names):
        raise argparse.ArgumentTypeError(f"{text!r}: wanted one or both of {','.join(DTYPES)}")
    return names


def positive(text: str) -> int:
    """A whole number above zero."""
    if not text.strip().isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: wanted a whole number above zero")
    return int(text)


@contextlib.contextmanager
def readable() -> Iterator[None]:
    """Within it, files that can't be used end the command with one line and exit code 2."""
    from e3nn_accel.structures import InputError

    try:
        yield
    except InputError as error:
        raise CommandError(str(error)) from error


@contextlib.contextmanager
def without_warnings() -> Iterator[None]:
    """Fallbacks are in the command's own output, with their reasons."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", E3nnAccelWarning)
        # torch about MACE's own annotations, whenever a block is copied
        warnings.filterwarnings("ignore", message="The TorchScript type system")
        yield


def model_and_structures(args: argparse.Namespace) -> tuple[Any, list[Any]]:
    """What ``MODEL`` and ``--structures`` name, ready for use."""
    from e3nn_accel.structures import (
        check_elements,
        default_structures,
        load_mace,
        read_structures,
    )

    with readable():
        model = load_mace(args.model)
        structures = read_structures(args.structures) if args.structures else None
        if structures is None:
            return model, default_structures(model)
        check_elements(model, structures)
        return model, structures
