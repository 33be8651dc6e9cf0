"""torch.cuda's graphs, streams, events and pools as far as our programs use them, on the CPU."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch._dynamo  # before torch.cuda is replaced, which it takes apart
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Graph(TorchDispatchMode):
    """Keeps the operators that run while it is captured, and runs them into the same memory."""

    ran = 0  # operators of all graphs: the device's clock
    capturing = False

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing\nmore of it")
        result = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, result))
        return result

    @torch.no_grad()
    def replay(self) -> None:
        assert not Graph.capturing
        for function, args, kwargs, result in self.calls:
            again = function(*args, **kwargs)
            for x, y in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if isinstance(x, Tensor) and x.data_ptr() != y.data_ptr():
                    x.copy_(y)
        Graph.ran += len(self.calls)


class Event:
    def __init__(self, enable_timing: bool = False) -> None:
        self.at = 0

    def record(self) -> None:
        self.at = Graph.ran

    def elapsed_time(self, end: Event) -> float:
        return float(end.at - self.at)

    def synchronize(self) -> None:
        pass


def captures() -> Any:
    """``torch.cuda.graph``, with what a capture that fails leaves.

    Its pool, and an older torch's generator, stay as in a capture; the allocator, and so the next
    capture, asks its graph.
    """
    Graph.capturing = False
    recording: list[Any] = []
    graphs: list[weakref.ref[Graph]] = []

    @contextmanager
    def graph(graph: Graph, pool: Any = None) -> Iterator[None]:
        assert all(each() for each in graphs)
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
    """Puts these in torch.cuda's place."""
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
