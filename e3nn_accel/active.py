"""What is switched on in this process."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary, WeakSet

from e3nn_accel.config import Config

if TYPE_CHECKING:
    import torch

    from e3nn_accel.dispatch import Dispatcher
    from e3nn_accel.interception import Interception


class _Active:
    """What is switched on: the global configuration, single models, and what was changed for them."""

    def __init__(self) -> None:
        self.config: Config | None = None
        self.models: WeakKeyDictionary[torch.nn.Module, tuple[Config, str]] = WeakKeyDictionary()
        self.seen: WeakSet[torch.nn.Module] = WeakSet()
        self.dispatcher: Dispatcher | None = None
        self.previous: Dispatcher | None = None
        self.interception: Interception | None = None
        self.cancel: list[Callable[[], None]] = []
        self.last: Config | None = None  # of what was switched on last, for the report at exit

    def settings_of(self, module: torch.nn.Module) -> tuple[Config | None, str]:
        """The configuration that applies to a module, its model's own before the global one."""
        return self.models.get(module) or (self.config, "")


active = _Active()
