"""The processes that share the work, and how what each has found becomes one."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch

from melayer.errors import ProcessError


@dataclass(frozen=True, eq=False)
class Group:
    """The processes that share the work."""

    rank: int = 0
    size: int = 1

    @classmethod
    def joined(cls, device: str, *, patience: timedelta | None = None) -> Group:
        """The processes of `accelerate launch` or `torchrun`, or this one alone.

        Args:
            device: The type of the device that the model is on.
            patience: How long one may wait for another; by default torch's half hour.
        """
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls()
        from accelerate import PartialState

        state = PartialState(cpu=device == "cpu", **({} if patience is None else {"timeout": patience}))
        return cls(state.process_index, state.num_processes)

    def gather(self, values: list[Any]) -> list[Any]:
        """The lists of all processes, one after the other."""
        if self.size == 1:
            return values
        from accelerate.utils import gather_object

        with _alive("Another", self.size):
            return list(gather_object(values))

    def reduced(self, value: bytes, merged: Callable[[bytes, bytes], bytes]) -> bytes | None:
        """All values as one, in the first process; None in the others.

        Neighbours merge in pairs, then pairs of pairs: log2(size) rounds in which no process ever holds more than two
        values, where gathering them all would need `size` of them in the first.

        Raises:
            ProcessError: Another process has died.
        """
        step = 1
        while step < self.size:
            if self.rank % (2 * step):
                self._send(value, self.rank - step)
                return None
            if self.rank + step < self.size:
                value = merged(value, self._receive(self.rank + step))
            step *= 2
        return value

    def _send(self, value: bytes, to: int) -> None:
        content = torch.frombuffer(bytearray(value), dtype=torch.uint8).to(_device())
        with _alive(f"Process {to}", self.size):
            torch.distributed.send(torch.tensor([len(value)], device=_device()), dst=to)
            torch.distributed.send(content, dst=to)

    def _receive(self, source: int) -> bytes:
        length = torch.zeros(1, dtype=torch.int64, device=_device())
        with _alive(f"Process {source}", self.size):
            torch.distributed.recv(length, src=source)
            content = torch.empty(int(length), dtype=torch.uint8, device=_device())
            torch.distributed.recv(content, src=source)
        return content.cpu().numpy().tobytes()


def _device() -> torch.device:
    """Where the backend takes tensors from: NCCL sends from GPUs only."""
    if torch.distributed.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


@contextmanager
def _alive(other: str, size: int) -> Iterator[None]:
    """Turns what the backend says of a lost connection into our error."""
    try:
        yield
    except RuntimeError as error:  # what gloo and NCCL raise, or a child of it
        raise ProcessError(
            f"{other} of {size} processes (counted from 0) no longer answers: it has died, or its machine is not "
            f"reached ({str(error).splitlines()[0]}). Run the same command again: it goes on from what was kept."
        ) from error
