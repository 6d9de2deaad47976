"""The one place that holds the version: the build and `e3nn_accel.__version__` both read it."""

__version__ = "0.1.0"
