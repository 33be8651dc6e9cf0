"""CPU stand-ins for the graphs, streams, events and memory pools of torch.cuda."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch._dynamo  # must be imported before torch.cuda is patched
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Graph(TorchDispatchMode):
    """A graph that records operators, and replays them into the same memory."""

    replayed = 0  # operators of all graphs, as a clock for Event
    capturing = False

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing\nsecond line")
        result = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, result))
        return result

    @torch.no_grad()
    def replay(self) -> None:
        assert not Graph.capturing
        for function, args, kwargs, result in self.calls:
            new_result = function(*args, **kwargs)
            for x, y in zip(tree_leaves(result), tree_leaves(new_result), strict=True):
                if isinstance(x, Tensor) and x.data_ptr() != y.data_ptr():
                    x.copy_(y)
        Graph.replayed += len(self.calls)


class Event:
    def __init__(self, enable_timing: bool = False) -> None:
        self.time = 0

    def record(self) -> None:
        self.time = Graph.replayed

    def elapsed_time(self, end: Event) -> float:
        return float(end.time - self.time)

    def synchronize(self) -> None:
        pass


def captures() -> Any:
    """Return a stand-in for ``torch.cuda.graph`` with the state that a failed capture leaves.

    Its pool stays in recording mode, and the next capture checks that its graph is still alive.
    """
    Graph.capturing = False
    recording: list[Any] = []
    graphs: list[weakref.ref[Graph]] = []

    @contextmanager
    def graph(graph: Graph, pool: Any = None) -> Iterator[None]:
        assert all(failed() for failed in graphs)
        if pool is not None and pool in recording:
            raise RuntimeError("already recording to mempool_id")
        Graph.capturing = True
        recording.append(pool)
        graphs.append(weakref.ref(graph))
        with graph:
            yield
        Graph.capturing = False
        recording.pop()
        graphs.pop()

    return graph


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the parts of torch.cuda by these stand-ins."""
    stream = SimpleNamespace(wait_stream=lambda other: None)
    stand_ins: dict[str, Any] = {
        "CUDAGraph": Graph,
        "Event": Event,
        "MemPool": lambda: SimpleNamespace(snapshot=list),
        "graph": captures(),
        "graph_pool_handle": object,
        **dict.fromkeys(("Stream", "current_stream"), lambda: stream),
        **dict.fromkeys(("stream", "use_mem_pool"), lambda _: nullcontext()),
        **dict.fromkeys(("synchronize", "_sleep"), lambda *_: None),
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
