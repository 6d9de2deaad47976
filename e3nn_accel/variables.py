"""The table of environment variables, as the README shows it; `e3nn_accel.config` reads them."""

from __future__ import annotations

from typing import NamedTuple


class Variable(NamedTuple):
    """One row of the documented table of environment variables."""

    name: str
    values: str
    default: str
    meaning: str


VARIABLES: tuple[Variable, ...] = (
    Variable(
        "E3NN_ACCEL",
        "0, 1, strict, verify",
        "0",
        "enable in every Python process of this environment; strict: raise instead of falling back; "
        "verify: run stock e3nn beside every accelerated call and compare",
    ),
    Variable(
        "E3NN_ACCEL_BACKEND",
        "auto or a backend's name",
        "auto",
        "which backend plans; a named one must succeed",
    ),
    Variable(
        "E3NN_ACCEL_LOG",
        "DEBUG, INFO, WARNING, ERROR",
        "unset",
        "level of the logger e3nn_accel, on stderr",
    ),
    Variable(
        "E3NN_ACCEL_REPORT",
        "0, 1, FILE.json",
        "0",
        "print (1) or write the report when the process ends",
    ),
    Variable(
        "E3NN_ACCEL_PROFILE",
        "0, 1",
        "0",
        "time every call for the report (adds a clock read a call)",
    ),
    Variable(
        "E3NN_ACCEL_SKIP",
        "globs, comma-separated",
        "unset",
        "classes or module paths left to stock e3nn",
    ),
    Variable(
        "E3NN_ACCEL_ONLY",
        "globs, comma-separated",
        "unset",
        "accelerate these classes or module paths alone",
    ),
    Variable(
        "E3NN_ACCEL_PLUGINS", "-name, comma-separated", "unset", "plugins that are not loaded"
    ),
    Variable(
        "E3NN_ACCEL_SELF_CHECK", "0, 1", "1", "compare each plan with stock e3nn at its first use"
    ),
    Variable(
        "E3NN_ACCEL_DETERMINISTIC",
        "0, 1",
        "1",
        "0: kernels may add up gradients by float atomics, faster and not to the same bit each time "
        "(never under torch.use_deterministic_algorithms)",
    ),
    Variable(
        "E3NN_ACCEL_GRAPH",
        "auto, 0, 1",
        "auto",
        "capture whole energy and force calls of MACE models on a GPU and replay them; auto: where parameters "
        "are frozen, and training calls; 1: also where they aren't, results are then detached; 0: never",
    ),
    Variable(
        "E3NN_ACCEL_PRECISION",
        "float32, tf32, bf16",
        "float32",
        "what linears, skip connections and the last layer of radial MLPs multiply on a GPU, of float32: "
        "tf32 (11 bits) and bf16 (8 bits) are faster and not as accurate as float32; sums are float32, and float64 "
        "stays what it is; `e3nn-accel verify` shows the error of forces",
    ),
    Variable(
        "E3NN_ACCEL_NEIGHBOURS",
        "auto, 0, 1",
        "auto",
        "find the neighbours of a MACECalculator's structure from those of its last one; auto: once it is "
        "seen to move slowly; 1: from its second call; 0: never",
    ),
    Variable(
        "E3NN_ACCEL_CACHE_DIR",
        "a folder",
        "unset",
        "where compiled kernels are kept, rather than in the user's cache folder",
    ),
    Variable(
        "E3NN_ACCEL_DUMP", "a folder", "unset", "write source and resources of every kernel in use"
    ),
)
