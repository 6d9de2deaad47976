"""The plugin manager: built-ins and third parties side by side, and what went wrong while loading them."""

from __future__ import annotations

import importlib.metadata
import logging
from collections.abc import Iterable
from dataclasses import dataclass, field

import pluggy
import torch

from e3nn_accel import hookspecs
from e3nn_accel.config import Config
from e3nn_accel.descriptor import Descriptor
from e3nn_accel.hookspecs import Event, HealthCheck, KernelSource, Target
from e3nn_accel.plan import Availability, Backend, Plan, PlanContext, Refusal

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
    _backends: list[tuple[Backend, Availability]] | None = None

    def plugins(self) -> list[str]:
        """Names of the plugins in use."""
        return [name for name, plugin in self.manager.list_name_plugin() if plugin is not None]

    def targets(self) -> list[Target]:
        """Classes to intercept; of two for the same class the plugin's wins over the built-in."""
        found: dict[str, Target] = {}
        for target in self._each("e3nn_accel_targets"):
            found.setdefault(target.path, target)
        return list(found.values())

    def describe(self, module: torch.nn.Module, operation: str) -> Descriptor | Refusal:
        """What ``module`` computes as ``operation``; a plugin that raises is a refusal with its error."""
        try:
            answer: Descriptor | None = self.manager.hook.e3nn_accel_describe(module=module, operation=operation)
        except Exception as error:
            log.debug("describing %s failed", type(module).__name__, exc_info=True)
            return Refusal("describe", f"{type(error).__name__}: {error}")
        if answer is None:
            return Refusal("describe", f"no plugin describes {type(module).__name__} as {operation}")
        return answer

    def backends(self) -> list[tuple[Backend, Availability]]:
        """Backends by falling priority, each asked once whether it is available."""
        if self._backends is None:
            found = sorted(self._each("e3nn_accel_backends"), key=lambda backend: -backend.priority)
            self._backends = [(backend, _available(backend)) for backend in found]
        return self._backends

    def plan(self, descriptor: Descriptor, context: PlanContext) -> tuple[Plan | None, list[Refusal]]:
        """The best plan, and every refusal on the way to it."""
        refusals: list[Refusal] = []
        wanted = context.config.backend
        candidates = [(b, a) for b, a in self.backends() if wanted in ("auto", b.name)]
        if not candidates:
            names = ", ".join(b.name for b, _ in self.backends()) or "none"
            return None, [Refusal(wanted, f"there is no such backend (there are: {names})")]
        for backend, availability in candidates:
            answer = _ask(backend, descriptor, context) if availability.ok else Refusal(backend.name, availability.reason)
            if isinstance(answer, Plan):
                self.event(Event("planned", str(descriptor), f"{answer.backend}: {answer.strategy}"))
                return answer, refusals
            refusals.append(answer)
        self.event(Event("refused", str(descriptor), "; ".join(map(str, refusals))))
        return None, refusals

    def kernel_source(self, plan: Plan) -> KernelSource | None:
        """The source a plugin puts in place of a plan's own."""
        source: KernelSource | None = self.manager.hook.e3nn_accel_kernel_source(plan=plan)
        return source

    def health_checks(self) -> list[HealthCheck]:
        """Every plugin's lines of ``doctor``."""
        return list(self._each("e3nn_accel_health_checks"))

    def event(self, event: Event) -> None:
        """Tell every plugin; one that raises is remembered and ignored."""
        log.info("%s: %s %s", event.kind, event.subject, event.detail)
        self._each("e3nn_accel_event", event=event)

    def _each(self, hook: str, **arguments: object) -> list:  # type: ignore[type-arg]
        """Call every implementation on its own, so that one that raises spoils nothing for the rest."""
        results: list[object] = []
        # pluggy keeps implementations in reverse order of calling
        for implementation in reversed(getattr(self.manager.hook, hook).get_hookimpls()):
            try:
                wanted = {name: arguments[name] for name in implementation.argnames}
                answer = implementation.function(**wanted)
                if isinstance(answer, Iterable):
                    results.extend(answer)
            except Exception as error:
                self.problems[implementation.plugin_name] = f"{hook}: {type(error).__name__}: {error}"
                log.info("plugin %s failed in %s", implementation.plugin_name, hook, exc_info=True)
        return results


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


def _available(backend: Backend) -> Availability:
    try:
        return backend.available()
    except Exception as error:
        return Availability(False, f"{type(error).__name__}: {error}")


def _ask(backend: Backend, descriptor: Descriptor, context: PlanContext) -> Plan | Refusal:
    try:
        return backend.plan(descriptor, context)
    except Exception as error:
        log.info("backend %s failed to plan %s", backend.name, descriptor, exc_info=True)
        return Refusal(backend.name, f"{type(error).__name__}: {error}")
