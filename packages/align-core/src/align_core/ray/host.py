"""Lives in a worker process: the objects that do the work, and the calls on them, through Ray or over a direct line."""

import faulthandler
import logging
import os
import pickle
import signal
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ray import cloudpickle

from align_core.errors import AlignError
from align_core.ray import lines, logs, progress
from align_core.ray.logs import Whereabouts
from align_core.ray.shared import opened

_LOST_PEER = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting", "timed out")


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """An error on its way from a worker, as text, because not every exception survives pickling."""

    error: AlignError | None
    text: str

    @property
    def lost_peer(self) -> bool:
        """Whether this rank probably failed because another one had."""
        return self.error is None and any(sign in self.text for sign in _LOST_PEER)


class Host:
    """Lives in a worker process and holds the objects that do the work, by name."""

    def __init__(self, board: Any, worker: str, gpus: Sequence[int], environment: Mapping[str, str]) -> None:
        # Before torch is imported, which reads it once. Not by Ray's runtime_env: with one, the processes that Ray has
        # started beforehand are of no use, and a service of its own must be up before others are started.
        os.environ.update(environment)
        faulthandler.enable()  # a crash in native code leaves its Python stack in the log
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the driver's affair: it ends the step and saves first
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
        logging.getLogger("megatron").setLevel(logging.WARNING)  # it lists every parameter
        _see_only(gpus)
        self._targets: dict[str, Any] = {}
        self._heartbeat = progress.Heartbeat(board, worker)

    def whereabouts(self) -> Whereabouts:
        """This process, and where it logs."""
        return logs.here()

    def serve(self, address: str, secret: str, number: int) -> None:
        """Answers the calls that come over a direct line, until the driver hangs up; Ray's calls wait meanwhile."""
        line = lines.dial(address, secret, number)
        while (message := line.receive()) is not None:
            line.send(packed(self._answer(message)))

    def build(self, target: str, make: Callable[[], Any]) -> Any:
        """Makes an object here, known as `target`; returns nothing of it, or the Failure it ended in."""

        def build() -> None:
            self._targets[target] = make()

        return self._guarded("build", build)

    def call(self, target: str, method: str, answers: bool, *arguments: Any) -> Any:
        """`object.method(*arguments)` if it `answers`, else nothing; or the Failure it ended in."""
        result = self._guarded(method, lambda: getattr(self._targets[target], method)(*opened(arguments)))
        return result if answers or isinstance(result, Failure) else None

    def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """`function(*arguments)` in this process, or the Failure it ended in."""
        return self._guarded(getattr(function, "__name__", "run"), lambda: function(*arguments))

    def drop(self, target: str) -> None:
        """Lets go of an object."""
        close = getattr(self._targets.pop(target, None), "close", None)
        if close is not None:
            self._guarded("close", close)

    def _answer(self, message: bytearray) -> Any:
        try:
            method, arguments = pickle.loads(message)  # noqa: S301  (packed by the driver of this run)
        except Exception:  # a class that this process cannot import, say
            return Failure(error=None, text=traceback.format_exc())
        return getattr(self, method)(*arguments)

    def _guarded(self, name: str, work: Callable[[], Any]) -> Any:
        self._heartbeat.begin(name)
        try:
            result = work()
            self._heartbeat.end()
            return result
        except AlignError as error:
            self._heartbeat.end(failed=error)
            return Failure(error=error, text=str(error))
        except Exception as error:  # any failure is the answer: the driver raises it
            self._heartbeat.end(failed=error)
            return Failure(error=None, text=traceback.format_exc())


def packed(message: Any) -> bytes:
    """A message for a line; what cannot be packed becomes a Failure that says so."""
    try:
        return bytes(cloudpickle.dumps(message))
    except Exception:  # a class of the user's may fail in any way
        return bytes(cloudpickle.dumps(Failure(error=None, text=traceback.format_exc())))


def _see_only(gpus: Sequence[int]) -> None:
    """Hides the node's other GPUs from this process, before CUDA starts in it.

    Not through Ray's own shares of GPUs: an engine over several GPUs that trainers use too cannot be asked for so.
    """
    if gpus:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        names = visible.split(",") if visible else [str(index) for index in range(max(gpus) + 1)]
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(names[index] for index in gpus)
