"""The calls of one model: replayed, captured, or run eagerly with the reason."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Hashable
from typing import Any

import torch

from e3nn_accel import compat, generation
from e3nn_accel.graphs import MODEL_CALL, eligibility, outputs, padding
from e3nn_accel.graphs.batches import BatchReader
from e3nn_accel.graphs.capture import Lane
from e3nn_accel.graphs.check import check
from e3nn_accel.graphs.eager import eager_call
from e3nn_accel.graphs.eligibility import Request, RunsEagerly
from e3nn_accel.graphs.fingerprint import Fingerprint, is_replica
from e3nn_accel.graphs.padding import Capacity, Size
from e3nn_accel.graphs.recompute import Forward, attach
from e3nn_accel.graphs.record import record
from e3nn_accel.graphs.store import MOST, Captured, Store
from e3nn_accel.graphs.training import TrainingStep
from e3nn_accel.guard import own_behaviour
from e3nn_accel.runner import Runner

log = logging.getLogger(__name__)
ENOUGH = 3
"""The call of a size at which it is captured; what is called once or twice doesn't pay for it."""
PAID = 20
"""So many replays, on average, pay for a capture."""
RARE = "a size that wasn't called often enough to be captured"


class ModelState:
    """What is known about the calls of one model; never holds the model itself."""

    def __init__(self, runner: Runner, lane_for: Callable[[torch.device], Lane]) -> None:
        self.generation = generation.current.name
        self.runner = runner
        self._never = runner.config is not None and runner.config.graph == "0"
        self._left = (
            "" if runner.config is None else runner.left or eligibility.left_by(runner.config)
        )
        self._always = runner.config is not None and runner.config.graph == "1"
        self._lane_for = lane_for
        self._lock = threading.RLock()
        self._store = Store()
        self._refused: dict[Hashable, str] = {}
        self._too_large: tuple[Size, str] | None = None
        self._captures = self._replays = self._unpaid = 0
        self._fingerprint: Fingerprint | None = None
        self._batches = BatchReader(padding.AXES)
        self._lane: Lane

    def call(
        self,
        module: torch.nn.Module,
        device: torch.device,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Replay where possible."""
        if self._never:
            return eager_call(module, self.runner, args, kwargs)
        reason = ""
        try:
            with self._lock:
                captures = self._captures
                for hurried in (True, False, False):
                    request, captured = self._prepared(module, device, args, kwargs, hurried)
                    step = self._step(module, captured, request)
                    tensors = self._replay(captured, request, step)
                    if self._was_right(module, captured, request):
                        break
                else:
                    raise RunsEagerly("the model changes while it is called")
                how = "captured" if self._captures > captures else ""
                self._replays += 1
                self.runner.count(MODEL_CALL, "graph", how or ("training" if step else ""))
        except RunsEagerly as found:
            reason = str(found)
        if reason:
            return self._eager(module, args, kwargs, reason)
        return self._finished(module, captured.recording.produced, request, tensors, step)

    def forget(self) -> None:
        """Let captured graphs go."""
        with self._lock:
            self._store.clear()
            self._fingerprint = None

    def _eager(
        self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], reason: str
    ) -> Any:
        self.runner.count(MODEL_CALL, "eager", reason)
        try:
            return eager_call(module, self.runner, args, kwargs)
        except Exception:
            # a capture that failed for arguments that no call takes says nothing about other calls
            self._refused.clear()
            raise

    def _prepared(
        self,
        module: torch.nn.Module,
        device: torch.device,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        hurried: bool,
    ) -> tuple[Request, Captured]:
        """What is called, and what takes it.

        In a hurry that is what took the last call, as far as the batch says. Whether the model still is what it was
        then, is looked at while the device is at work (`_was_right`); where it isn't, nobody hears of the results.
        """
        if self._left:
            raise RunsEagerly(self._left)
        flags = eligibility.flags_of(self.runner.stock_forward, args, kwargs)
        eligibility.check_process(device)
        data, reader, request = eligibility.data_of(args, kwargs), self._batches, None
        if hurried and "training" not in flags and self._knows(module):
            request, last = reader.read(data, flags, device), self._store.last
            if last and last.key[:3] == _called(request) and last.takes(request.size):
                return request, last
        self._check_model(module, device, "training" in flags)
        if request is None or reader is not self._batches:
            request = self._batches.read(data, flags, device)
        return request, self._captured(module, request)

    def _knows(self, module: torch.nn.Module) -> bool:
        """Whether the model was looked at, and does nothing that a replay wouldn't."""
        known = self._fingerprint
        return known is not None and not known.hooked() and not self._own_behaviour(module)

    def _was_right(self, module: torch.nn.Module, captured: Captured, request: Request) -> bool:
        """Whether what was replayed is of the model as it is."""
        known = self._fingerprint
        if known is None or not known.holds():
            self._fingerprint = None
            return False
        if "training" in request.flags:  # was looked at before
            return True
        return (
            known.in_place()
            and captured.key == self._key(request, known)
            and (self._always or known.frozen())
        )

    def _own_behaviour(self, module: torch.nn.Module) -> str:
        """What no replay does, or an empty string."""
        reason = own_behaviour(module, self.runner.stock_forward)
        if not reason and is_replica(module):
            reason = "torch.nn.DataParallel makes a new model for each call"
        return reason

    def _check_model(self, module: torch.nn.Module, device: torch.device, training: bool) -> None:
        """Captured graphs of a model that has changed, or moved, are let go."""
        reason = self._own_behaviour(module)
        if reason:
            raise RunsEagerly(reason)
        known = self._fingerprint
        hooked = known is not None and known.hooked()
        # what isn't replayed isn't looked at after the replay
        doubtful = known is not None and (bool(self._refused) or hooked)
        if known is None or not known.in_place() or (doubtful and not known.holds()):
            self._start_anew(device)
            known = self._fingerprint = Fingerprint(module)
            hooked = known.hooked()
            self._refused.clear()
            self._batches = BatchReader({**padding.AXES, **padding.feature_axes(module)})
        if hooked:
            raise RunsEagerly("modules of the model have hooks, which a replay wouldn't run")
        eligibility.check_gradients(known.frozen(), training, self._always)

    def _start_anew(self, device: torch.device) -> None:
        self._store.clear()
        self._too_large = None
        self._lane = self._lane_for(device)
        self._note()

    def _captured(self, module: torch.nn.Module, request: Request) -> Captured:
        """What takes this call, captured now if it is worth it."""
        assert self._fingerprint is not None
        key = self._key(request, self._fingerprint)
        found = self._store.find(key, request.size)
        if found is not None:
            return found
        if key in self._refused:
            raise RunsEagerly(self._refused[key])
        if self._too_large is not None and request.size.edges >= self._too_large[0].edges:
            raise RunsEagerly(self._too_large[1])
        capacity, calls = self._store.seen(key, request.size)
        # where sizes come and go faster than they are kept, captures get rarer and rarer
        patience = 1 << max(0, self._unpaid - MOST)
        if calls < (1 if self._always else ENOUGH) * patience:
            raise RunsEagerly(RARE)
        return self._capture(module, request, key, capacity)

    def _key(self, request: Request, known: Fingerprint) -> tuple[Hashable, ...]:
        """Of what a call must share with a captured one, besides fitting its size."""
        trained = known.trained() if "training" in request.flags else b""
        return *_called(request), compat.numeric_settings(), known.modes(), trained

    def _capture(
        self,
        module: torch.nn.Module,
        request: Request,
        key: tuple[Hashable, ...],
        capacity: Capacity,
    ) -> Captured:
        self._captures += 1
        self._unpaid = max(0, self._unpaid + (1 if self._replays < PAID else -1))
        self._replays = 0
        self._store.make_room()
        device = request.inputs["positions"].device
        try:
            captured = record(module, request, key, capacity, self._lane)
            self._check(module, captured, request)
        except torch.cuda.OutOfMemoryError as error:
            self._start_anew(device)
            self._too_large = (request.size, f"capture failed: {_line(error)}")
            raise RunsEagerly(self._too_large[1]) from error
        except Exception as error:
            log.info("capture failed", exc_info=True)
            self._refused[key] = f"capture failed: {_line(error)}"
            raise RunsEagerly(self._refused[key]) from error
        self._store.add(captured)
        if self._store.bytes > self._lane.limit:
            alone = len(self._store.kept) == 1
            reason = f"captured, it takes {self._store.bytes / 2**20:.0f} MiB, too much to keep"
            self._start_anew(device)
            self._too_large = (request.size, reason) if alone else None
            raise RunsEagerly(reason)
        self._note()
        return captured

    def _check(self, module: torch.nn.Module, captured: Captured, request: Request) -> None:
        config = self.runner.config
        if captured.recording.derivative is None or config is None or not config.self_check:
            return
        rerun = self._rerun(module, request)
        check(
            lambda other: TrainingStep(captured, other, self._lock, rerun),
            lambda step: self._replay(captured, step.request, step),
            request,
        )

    def _step(
        self, module: torch.nn.Module, captured: Captured, request: Request
    ) -> TrainingStep | None:
        if "training" not in request.flags:
            return None
        return TrainingStep(captured, request, self._lock, self._rerun(module, request))

    def _replay(
        self, captured: Captured, request: Request, step: TrainingStep | None
    ) -> list[torch.Tensor]:
        self._lane.enter()
        self._lane.left = None if step is None else step.left
        captured.inputs.load(request.inputs, request.size)
        captured.recording.replay()
        return outputs.unpadded(captured.recording.produced, request.size)

    def _finished(
        self,
        module: torch.nn.Module,
        produced: outputs.Produced,
        request: Request,
        tensors: list[torch.Tensor],
        step: TrainingStep | None,
    ) -> dict[str, Any]:
        """The results as forward returns them, and what it does to the batch."""
        for name in produced.marked:
            request.inputs[name].requires_grad_(True)
        finished = tuple(tensors)
        if step is not None:
            finished = step.attach(tensors)
        elif not self._always:
            finished = attach(self._rerun(module, request), produced, tensors, request.inputs)
        return outputs.hand_over(produced, finished, request.data)

    def _rerun(self, module: torch.nn.Module, request: Request) -> Forward:
        """The call, eagerly, for gradients that no replay has."""
        flags = {**eligibility.flags_to_pass(request.flags), "training": True}
        return lambda batch: eager_call(module, self.runner, (batch,), flags)

    def _note(self) -> None:
        self.runner.notes[MODEL_CALL] = f"replayed; {self._store}"


def _called(request: Request) -> tuple[Hashable, ...]:
    return request.flags, request.signature, request.inputs["positions"].device


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
