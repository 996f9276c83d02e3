"""Processes that train together, as torchrun starts them: which one this is, and what all of them agree on.

A process alone is the first of one: nothing is sent and nothing more is imported.

What every step needs goes through collectives, in which a process that is a minute late counts as lost. What only
the first process does may take long (reading the text, a checkpoint, a sample); the others wait for it at the store,
where they see that it lives. A process that fails leaves the cause there for the others to name.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from seedbed import errors
from seedbed.device import is_out_of_memory
from seedbed.errors import ConfigError, LostProcessError, SeedbedError

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store


def seconds_of(name: str, usual: float) -> float:
    """A number of seconds that a variable of the environment holds.

    Raises:
        ConfigError: it holds something else.
    """
    text = os.environ.get(name, str(usual))
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < math.inf:
        raise ConfigError(f"{name}={text}: expected seconds, such as {usual:g}")
    return seconds


LOST_AFTER: Final = seconds_of("SEEDBED_LOST_AFTER", 60.0)
PULSE: Final = LOST_AFTER / 12  # seconds between two signs of life
PATIENCE: Final = LOST_AFTER / 6  # seconds for others to say why they ended
GO_ON: Final = "The same command goes on from the newest checkpoint"
S = TypeVar("S")
T = TypeVar("T")

_group: _Group | None = None
_weights_everywhere = True


def rank() -> int:
    """Which process this is, from 0 to the world size."""
    return _group.rank if _group else 0


def size() -> int:
    """The world size: how many processes there are."""
    return _group.size if _group else 1


def is_first() -> bool:
    """Whether this is rank 0, the process that writes the run folder and speaks."""
    return rank() == 0


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Be one of the processes that torchrun started together; alone, nothing happens.

    Raises:
        LostProcessError: another one failed, died or no longer answers.
    """
    global _group
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    group = _group = _Group()
    try:
        yield
        group.leave_in_peace()
    except BaseException as error:
        group.explain(error)
        raise
    finally:
        group.end()
        _group = None


def stay_to_the_end() -> None:
    """Ignore SIGTERM from now on: when one of several ends, torchrun sends it to the others, who have to say why."""
    if _group is not None:
        with contextlib.suppress(ValueError):  # not the main thread
            signal.signal(signal.SIGTERM, signal.SIG_IGN)


def local_device(device: torch.device) -> torch.device:
    """`device`, or the GPU of this process where several share a node.

    Raises:
        ConfigError: there is none for it.
    """
    if _group is None or device.type != "cuda":
        return device
    if device.index is not None and int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > 1:
        raise ConfigError(f"--device {device}: each process takes a GPU of its own; give --device cuda")
    found = torch.cuda.device_count()
    if _group.local_rank >= found:
        raise ConfigError(f"process {_group.local_rank} of this machine: no GPU left; start {found} here")
    own = torch.device("cuda", _group.local_rank if device.index is None else device.index)
    torch.cuda.set_device(own)
    return own


def share(start: int, end: int) -> tuple[int, int]:
    """This process's share of range(start, end): one piece, as long as the others' or one shorter."""
    return tuple(start + (end - start) * place // size() for place in (rank(), rank() + 1))  # type: ignore[return-value]


def largest_share(count: int) -> int:
    """The length of the longest share of `count` numbers."""
    return -(-count // size())


def total(value: float) -> float:
    """The sum of what all processes have, in float64: an all-reduce."""
    return _group.reduced([value], dist.ReduceOp.SUM)[0] if _group else value


def most(*values: float) -> Sequence[float]:
    """Of each value the largest that any process has: an all-reduce."""
    return _group.reduced(values, dist.ReduceOp.MAX) if _group else values


def of_first(tensor: Tensor) -> Tensor:
    """The tensor of rank 0 in all processes: a broadcast, into one of the same shape and type."""
    if _group:
        dist.broadcast(tensor, 0)
    return tensor


def on_first(work: Callable[[], T]) -> T:
    """What `work` gives on rank 0, plain JSON, for all processes; the others wait as long as it takes.

    Raises:
        SeedbedError: as it was raised there.
    """
    return _group.on_first(work) if _group else work()


def each_a_part(items: Sequence[S], work: Callable[[Sequence[S]], Sequence[T]]) -> Sequence[T]:
    """A result for each item, in their order, plain JSON; every process works on its share of the items."""
    start, end = share(0, len(items))
    own = work(items[start:end])
    return [result for part in _group.gathered(own) for result in part] if _group else own


def together(work: Callable[[], None]) -> None:
    """Do `work` in every process; an error in one is raised in all of them.

    `work` must not communicate itself: where it failed before, the others would take the next message for the answer.

    Raises:
        StorageError, OSError, MemoryError, RuntimeError: what went wrong, in every process.
    """
    if _group:
        _group.together(work)
    else:
        work()


@contextlib.contextmanager
def weights_in_first_only(only: bool = True) -> Iterator[None]:
    """While models are loaded or drawn, all processes but the first leave their weights out: see `without_weights`."""
    global _weights_everywhere
    _weights_everywhere = not only
    try:
        yield
    finally:
        _weights_everywhere = True


def without_weights() -> bool:
    """Whether a model that is loaded now stays on torch's meta device, since this process will get a part of it."""
    return not (_weights_everywhere or is_first())


@contextlib.contextmanager
def one_a_node_first() -> Iterator[None]:
    """On each node the first process runs the body before the others begin it, which find its results in the cache."""
    if _group is None:
        yield
        return
    with _group.one_a_node_first():
        yield


class _Group:
    """This process among several.

    Raises:
        LostProcessError: they do not find each other.
    """

    def __init__(self) -> None:
        self.local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        self._node = os.environ.get("GROUP_RANK", "0")
        self._turn = 0
        from torch.distributed.distributed_c10d import PrefixStore
        from torch.distributed.rendezvous import rendezvous

        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        try:
            store, self.rank, self.size = next(rendezvous("env://"))
            own = PrefixStore(f"seedbed/{_attempt()}", store)
            self._store = _PatientStore(own)
            pairs = PrefixStore("pairs", own)
            late = timedelta(seconds=LOST_AFTER)
            dist.init_process_group(backend, store=pairs, rank=self.rank, world_size=self.size, timeout=late)
        except (RuntimeError, ValueError) as error:
            raise LostProcessError(
                f"the processes that were started together do not find each other ({error}); start them with torchrun, "
                "and see whether one of them said why it left"
            ) from error
        self._ended = threading.Event()
        threading.Thread(target=self._beat, daemon=True).start()

    def leave_in_peace(self) -> None:
        """Give the connections back; the first process, which may hold the store, leaves last."""
        if self.rank:
            self._store.add("done", 1)
        else:
            deadline = time.monotonic() + LOST_AFTER
            while time.monotonic() < deadline and self._store.add("done", 0) < self.size - 1:
                time.sleep(0.01)
        dist.destroy_process_group()

    def end(self) -> None:
        """No more signs of life."""
        self._ended.set()

    def reduced(self, values: Sequence[float], operation: Any) -> list[float]:
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, op=operation)
        return tensor.tolist()

    def on_first(self, work: Callable[[], T]) -> T:
        key = self._next_key()
        if self.rank == 0:
            try:
                result = work()
            except SeedbedError as error:
                self._set(key, {"error": _described(error)})
                raise
            self._set(key, {"result": result})
            return result
        told = self._get(key, 0)
        if "error" in told:
            raise _raised(told["error"])
        return told["result"]  # type: ignore[no-any-return]

    def gathered(self, own: T) -> list[T]:
        key = self._next_key()
        self._set(f"{key}/{self.rank}", own)
        return [self._get(f"{key}/{other}", other) for other in range(self.size)]

    def together(self, work: Callable[[], None]) -> None:
        failure: Exception | None = None
        try:
            work()
        except (SeedbedError, OSError, MemoryError, RuntimeError) as error:
            if is_lost(error):
                raise
            failure = error
        told = self.gathered(_described(failure) if failure else None)
        if failure:
            raise failure
        for other, description in enumerate(told):
            if description:
                raise _raised({**description, "message": f"process {other}: {description['message']}"})

    @contextlib.contextmanager
    def one_a_node_first(self) -> Iterator[None]:
        key = f"{self._next_key()}/{self._node}"
        if self.local_rank:
            self._get(key, self.rank - self.local_rank)
        yield
        if not self.local_rank:
            self._set(key, None)

    def explain(self, error: BaseException) -> None:
        """Leave the cause for the others; where it was theirs, wait for it and name it.

        Raises:
            LostProcessError: another process is why this one ends.
        """
        if is_lost(error):
            raise self._why_lost()
        if isinstance(error, SeedbedError) and error.told:
            self._await_cause()
            return
        with contextlib.suppress(RuntimeError):
            described = json.dumps({**_described(error), "rank": self.rank})
            told = json.loads(self._store.set_if_none("cause", described))
            if isinstance(error, SeedbedError) and error.told is None:
                error.told = told["rank"] != self.rank
            self._let_others_read()

    def _await_cause(self) -> None:
        """Stay until the process that tells the error is about to: when one ends, torchrun ends them all."""
        with contextlib.suppress(RuntimeError):
            deadline = time.monotonic() + PATIENCE
            while time.monotonic() < deadline and not self._store.check("cause"):
                time.sleep(0.05)
            self._store.add("read", 1)

    def _why_lost(self) -> LostProcessError:
        """Where the link to the store is cut, asking it takes minutes: not longer than the others need to answer."""
        answers: list[LostProcessError] = []
        asking = threading.Thread(target=lambda: answers.append(self._ask_why_lost()), daemon=True)
        asking.start()
        asking.join(2 * PATIENCE)
        return answers[0] if answers else _lost("the connection to the others broke")

    def _ask_why_lost(self) -> LostProcessError:
        with contextlib.suppress(RuntimeError):  # the store may be gone with the process that held it
            self._store.set(f"lost/{self.rank}", "")
            deadline = time.monotonic() + PATIENCE
            while time.monotonic() < deadline:
                if cause := self._cause():
                    self._store.add("read", 1)
                    return cause
                time.sleep(0.1)
            missing = [str(other) for other in range(self.size) if not self._store.check(f"lost/{other}")]
            if missing:
                return self._lost(f"process {', '.join(missing)} of {self.size} died, or no longer answers")
        return self._lost("the connection to the others broke")

    def _let_others_read(self) -> None:
        """Where the store lives in the first process and not in torchrun, that ends once the others know the cause."""
        if self.rank:
            self._store.add("read", 1)
        elif os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            dist.destroy_process_group()  # lets those go that wait in a collective
            deadline = time.monotonic() + PATIENCE
            while time.monotonic() < deadline and self._store.add("read", 0) < self.size - 1:
                time.sleep(0.05)

    def _cause(self) -> LostProcessError | None:
        if not self._store.check("cause"):
            return None
        cause = json.loads(self._store.get("cause"))
        return self._lost(f"process {cause['rank']} of {self.size} ended: {cause['message']}", cause["exit_code"])

    def _lost(self, what: str, exit_code: int = 1) -> LostProcessError:
        lost = _lost(what, exit_code)
        with contextlib.suppress(RuntimeError):
            lost.told = self._store.add("told", 1) > 1
        return lost

    def _next_key(self) -> str:
        self._turn += 1
        return f"turn/{self._turn}"

    def _set(self, key: str, value: Any) -> None:
        self._store.set(key, json.dumps(value))

    def _get(self, key: str, setter: int) -> Any:
        """What process `setter` sets under `key`, waited for as long as it lives and none has failed."""
        pause, pulse, since = 0.001, b"", time.monotonic()
        while not self._store.check(key):
            # A process that failed may have set the key before.
            if self._store.check("cause") and not self._store.check(key) and (cause := self._cause()):
                raise cause
            now = self._store.get(f"pulse/{setter}")
            if now != pulse:
                pulse, since = now, time.monotonic()
            elif time.monotonic() - since > LOST_AFTER:
                raise self._lost(f"process {setter} of {self.size} died, or no longer answers")
            time.sleep(pause)
            pause = min(0.25, 1.5 * pause)
        return json.loads(self._store.get(key))

    def _beat(self) -> None:
        beats = 0
        with contextlib.suppress(RuntimeError):
            while not self._ended.wait(PULSE if beats else 0):
                beats += 1
                self._store.set(f"pulse/{self.rank}", str(beats))


def _lost(what: str, exit_code: int = 1) -> LostProcessError:
    lost = LostProcessError(f"{what}. {GO_ON}")
    lost.exit_code, lost.told = exit_code, False
    return lost


class _PatientStore:
    """The store that the processes share; where the link to it is cut, the network itself gives up only after minutes.

    Raises:
        RuntimeError: it gave no answer.
    """

    def __init__(self, store: Store) -> None:
        self._store = store

    def check(self, key: str) -> bool:
        return bool(self._ask(lambda: self._store.check([key])))

    def get(self, key: str) -> bytes:
        return bytes(self._ask(lambda: self._store.get(key)))

    def set(self, key: str, value: str) -> None:
        self._ask(lambda: self._store.set(key, value))

    def add(self, key: str, amount: int) -> int:
        return int(self._ask(lambda: self._store.add(key, amount)))

    def set_if_none(self, key: str, value: str) -> bytes:
        """What is there then."""
        return bytes(self._ask(lambda: self._store.compare_set(key, "", value)))

    def _ask(self, question: Callable[[], Any]) -> Any:
        outcome: Future[Any] = Future()

        def ask() -> None:
            try:
                outcome.set_result(question())
            except RuntimeError as error:  # all that a store raises
                outcome.set_exception(error)

        threading.Thread(target=ask, daemon=True).start()
        try:
            return outcome.result(LOST_AFTER)
        except TimeoutError:
            raise RuntimeError("Timed out waiting for the store") from None


def _attempt() -> str:
    """Which start this is, where torchrun keeps one store for all of them: what the last one left must not be read.

    On several nodes it makes a new store each time, and their counts may differ.
    """
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if os.environ.get("GROUP_WORLD_SIZE") == "1" else "0"


def is_lost(error: BaseException) -> bool:
    """Whether a collective failed because of another process; gloo has no type of its own for it."""
    if not dist.is_available():  # some builds of torch are for one process
        return False
    known = isinstance(error, dist.DistError) and not isinstance(error, torch.OutOfMemoryError)
    words = ("gloo", "Connection closed by peer", "Connection reset by peer", "Timed out waiting")
    return known or (isinstance(error, RuntimeError) and any(word in str(error) for word in words))


def _described(error: BaseException) -> dict[str, Any]:
    code = error.code if isinstance(error, SystemExit) else getattr(error, "exit_code", 1)
    message = str(error) if isinstance(error, Exception) else "it was interrupted"
    ours = type(error).__name__ if isinstance(error, SeedbedError) else None
    kind = ours or ("MemoryError" if is_out_of_memory(error) else "OSError")
    return {"type": kind, "message": message or type(error).__name__, "exit_code": code}


def _raised(description: dict[str, Any]) -> Exception:
    """The error that another process described, already told by it."""
    if of_python := {"MemoryError": MemoryError, "OSError": OSError}.get(description["type"]):
        return of_python(description["message"])
    kind = getattr(errors, description["type"])
    return errors.restored(kind, message := description["message"], {"told": True, "problems": message.splitlines()})
