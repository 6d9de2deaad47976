"""The plugin manager: built-ins and third parties side by side, and what went wrong while loading them."""

from __future__ import annotations

import importlib.metadata
import logging
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import pluggy
import torch

from e3nn_accel import compat, hookspecs
from e3nn_accel.config import Config
from e3nn_accel.descriptor import Descriptor
from e3nn_accel.hookspecs import Event, HealthCheck, KernelSource, Target
from e3nn_accel.plan import Availability, Backend, Plan, PlanContext, Refusal

if TYPE_CHECKING:
    from e3nn_accel.compile import KernelProgram

log = logging.getLogger(__name__)
GROUP = "e3nn_accel"


@dataclass
class Registry:
    """Loaded plugins and their answers.

    A plugin that fails to import, to register or to answer is kept out and remembered in
    `problems`, which ``doctor`` shows; it never stops the others.
    """

    manager: pluggy.PluginManager
    problems: dict[str, str] = field(default_factory=dict)
    blocked: tuple[str, ...] = ()
    _backends: list[Backend] | None = None
    _available: dict[str, Availability] = field(default_factory=dict)

    def plugins(self) -> list[str]:
        """Names of the plugins in use."""
        return [name for name, plugin in self.manager.list_name_plugin() if plugin is not None]

    def targets(self) -> list[Target]:
        """Classes to intercept; of two for the same class the plugin's wins over the built-in."""
        found: dict[str, Target] = {}
        for target in self._each("e3nn_accel_targets", _is_target):
            found.setdefault(target.path, target)
        return list(found.values())

    def describe(self, module: torch.nn.Module, operation: str) -> Descriptor | Refusal:
        """What ``module`` computes as ``operation``; a plugin that raises is a refusal with its error."""
        answer, errors = self._first(
            "e3nn_accel_describe", _is_hashable, module=module, operation=operation
        )
        if answer is not None:
            return cast(Descriptor, answer)
        if errors:
            return Refusal("describe", "; ".join(errors))
        return Refusal("describe", f"no plugin describes {type(module).__name__} as {operation}")

    def backends(self) -> list[tuple[Backend, Availability]]:
        """Backends by falling priority, with whether they can run here."""
        return [(backend, self.available(backend)) for backend in self._by_priority()]

    def backend(self, name: str) -> Backend | None:
        """The one of this name, not asked whether it is available."""
        return next((b for b in self._by_priority() if b.name == name), None)

    def available(self, backend: Backend) -> Availability:
        """Whether a backend can run here; asked once, and not before it is needed."""
        if backend.name not in self._available:
            self._available[backend.name] = _available(backend)
        return self._available[backend.name]

    def _by_priority(self) -> list[Backend]:
        if self._backends is None:
            found = self._each("e3nn_accel_backends", _is_backend)
            self._backends = sorted(found, key=lambda backend: -backend.priority)
        return self._backends

    def plan(
        self, descriptor: Descriptor, context: PlanContext, without: Collection[str] = ()
    ) -> tuple[Plan | None, list[Refusal]]:
        """The best plan, and every refusal on the way to it; backends named in ``without`` aren't asked."""
        refusals: list[Refusal] = []
        wanted = context.config.backend
        candidates = [b for b in self._by_priority() if wanted in ("auto", b.name)]
        if not candidates:
            names = ", ".join(b.name for b in self._by_priority()) or "none"
            return None, [Refusal(wanted, f"there is no such backend (there are: {names})")]
        for backend in candidates:
            if backend.name in without:
                continue
            answer = self._ask(backend, descriptor, context)
            if isinstance(answer, Plan):
                self.event(
                    Event("planned", str(descriptor), f"{answer.backend}: {answer.strategy}")
                )
                return answer, refusals
            refusals.append(answer)
        self.event(Event("refused", str(descriptor), "; ".join(map(str, refusals))))
        return None, refusals

    def _ask(
        self, backend: Backend, descriptor: Descriptor, context: PlanContext
    ) -> Plan | Refusal:
        """A backend's answer; one of another kind of device isn't even asked whether it is available."""
        device_type = getattr(backend, "device_type", None)
        if device_type not in (None, context.device.type):
            return Refusal(
                backend.name, f"plans for {device_type}, the tensors are on {context.device.type}"
            )
        availability = self.available(backend)
        return (
            _ask(backend, descriptor, context)
            if availability.ok
            else Refusal(backend.name, availability.reason)
        )

    def kernel_source(self, program: KernelProgram) -> KernelSource | None:
        """The source a plugin puts in place of a program's file."""
        answer, _ = self._first("e3nn_accel_kernel_source", _is_kernel_source, program=program)
        return cast("KernelSource | None", answer)

    def health_checks(self) -> list[HealthCheck]:
        """Every plugin's lines of ``doctor``."""
        return self._each("e3nn_accel_health_checks", _is_health_check)

    def event(self, event: Event) -> None:
        """Tell every plugin; one that raises is remembered and ignored."""
        log.info("%s: %s %s", event.kind, event.subject, event.detail)
        for _ in self._ask_all("e3nn_accel_event", {"event": event}):
            pass

    def _each(self, hook: str, fits: Callable[[Any], bool]) -> list[Any]:
        """The answers of every plugin; those that don't fit are remembered and left out."""
        results: list[Any] = []
        for name, answer, _ in self._ask_all(hook, {}, list):
            for item in answer:
                if fits(item):
                    results.append(item)
                else:
                    self.problems[name] = f"{hook}: unusable answer {item!r}"
        return results

    def _first(
        self, hook: str, fits: Callable[[Any], bool], **arguments: object
    ) -> tuple[object, list[str]]:
        """The first answer that isn't None, and what went wrong with the plugins asked before."""
        errors: list[str] = []
        for name, answer, error in self._ask_all(hook, arguments):
            if answer is not None and fits(answer):
                return answer, errors
            if answer is not None:
                error = f"unusable answer {answer!r}"
                self.problems[name] = f"{hook}: {error}"
            errors += [error] if error else []
        return None, errors

    def _ask_all(
        self, hook: str, arguments: Mapping[str, object], finish: Callable[[Any], Any] | None = None
    ) -> Iterator[tuple[str, Any, str]]:
        """Call every implementation on its own, so that one that raises spoils nothing for others.

        Yields:
            The plugin's name, its answer (after ``finish``, which an exception makes empty), and
            what it raised; the last one registered comes first.
        """
        # pluggy keeps implementations in reverse order of calling
        for implementation in reversed(getattr(self.manager.hook, hook).get_hookimpls()):
            name, error = implementation.plugin_name, ""
            if implementation.hookwrapper or implementation.wrapper:
                self.problems[name] = f"{hook}: hook wrappers are not called"
                continue
            answer: Any = finish(()) if finish else None
            try:
                found = implementation.function(
                    *map(arguments.__getitem__, implementation.argnames)
                )
                answer = finish(found) if finish else found
            except Exception as raised:
                error = f"{type(raised).__name__}: {raised}"
                self.problems[name] = f"{hook}: {error}"
                log.info("plugin %s failed in %s", name, hook, exc_info=True)
            yield name, answer, error


def load(config: Config) -> Registry:
    """Register the built-ins, then every entry point of the group that isn't blocked."""
    from e3nn_accel import builtins

    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    registry = Registry(manager, blocked=config.blocked_plugins)
    for name in config.blocked_plugins:
        manager.set_blocked(name)
    for name, plugin in builtins.PLUGINS.items():
        manager.register(plugin, name=name)
    for entry in importlib.metadata.entry_points(group=GROUP):
        if manager.is_blocked(entry.name):
            continue
        try:
            manager.register(entry.load(), name=entry.name)
            manager.check_pending()
        except Exception as error:
            registry.problems[entry.name] = f"{type(error).__name__}: {error}"
            log.info("plugin %s could not be loaded", entry.name, exc_info=True)
            if manager.has_plugin(entry.name):
                manager.unregister(name=entry.name)
    return registry


def _is_target(answer: Any) -> bool:
    return isinstance(answer, Target) and answer.path.count(":") == 1


def _is_backend(answer: Any) -> bool:
    methods = all(callable(getattr(answer, name, None)) for name in ("available", "plan"))
    ordered = isinstance(getattr(answer, "priority", None), int | float)
    return methods and ordered and hasattr(answer, "name")


def _is_health_check(answer: Any) -> bool:
    return isinstance(answer, HealthCheck)


def _is_kernel_source(answer: Any) -> bool:
    return isinstance(answer, KernelSource)


def _is_hashable(answer: Any) -> bool:
    try:
        hash(answer)
    except TypeError:
        return False
    return True


def _available(backend: Backend) -> Availability:
    try:
        answer: object = backend.available()
    except Exception as error:
        return Availability(False, f"{type(error).__name__}: {error}")
    if not isinstance(answer, Availability):
        return Availability(False, f"unusable answer {answer!r} of available()")
    return answer


def _ask(backend: Backend, descriptor: Descriptor, context: PlanContext) -> Plan | Refusal:
    try:
        answer: object = backend.plan(descriptor, context)
    except compat.OutOfMemory:
        raise  # of the device, not of the backend
    except Exception as error:
        log.info("backend %s failed to plan %s", backend.name, descriptor, exc_info=True)
        return Refusal(backend.name, f"{type(error).__name__}: {error}")
    if not isinstance(answer, Plan | Refusal):
        return Refusal(backend.name, f"unusable answer {answer!r} of plan()")
    return answer
