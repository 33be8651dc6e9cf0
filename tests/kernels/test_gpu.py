"""On a real GPU: the contract on its back ends, graphs, streams, memory, launches.

Without a GPU none of this is collected, except for AT_FUSED_GPU_DRY_RUN=1: this runs on the CPU
what does not need a GPU, with stand-ins for graphs and streams, so that these tests are not first
run on a machine that has one. The tests marked smoke are the first that scripts/gpu_check.py runs.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from types import ModuleType

import pretend_cuda
import pytest
import test_contract
import test_forward_mode
import test_loss_options
import test_map_operators
import test_operators
import test_tap
import test_tap_operators
import test_transfer_training
import torch
from reference import assert_matches_reference
from test_contract import LAYOUTS, features
from torch import Tensor
from torch._dynamo.utils import counters

import at_fused
from at_fused import _ops
from at_fused.backends import candidates

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
ROUNDS = 10 if GPU else 1
BACKENDS = [
    name for name in candidates(DEVICE) if name != "eager" and at_fused.backends()[name].available
]

pytestmark = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(not GPU, reason="no CUDA device: not part of the dry run")


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs, streams and pools: in a dry run what stands in for them."""
    if not GPU:
        pretend_cuda.install(monkeypatch)


@pytest.fixture(params=BACKENDS)
def gpu(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once on every back end for GPUs."""
    with at_fused.use_backend(request.param):
        yield request.param


# ---- tests of other files: these fixtures put all tensors on the device --------------------------


@pytest.fixture
def backend(gpu: str) -> Iterator[str]:
    with torch.device(DEVICE):
        yield gpu


@pytest.fixture
def fast_backend(backend: str) -> str:
    return backend


def imported(module: ModuleType, *names: str) -> dict[str, Callable[..., None]]:
    """The module's tests of these names, or all that run on a back end."""
    if names:
        return {f"test_{name}": getattr(module, f"test_{name}") for name in names}
    return {
        name: test
        for name, test in vars(module).items()
        if name.startswith("test_")
        and inspect.signature(test).parameters.keys() & {"backend", "fast_backend"}
    }


OPERATORS = "opcheck", "no_grad_and_inference_mode", "offsets_beyond_int32"
OPERATORS += (
    "maps_of_features_without_gradients_have_none",
    "features_changed_in_place_before_backward_raise",
)
# Reference counts of gradients depend on autograd's threads, and a GPU has its own.
TAP = "map_and_gradients", "tap_gradcheck_and_gradgradcheck", "gradient_is_rounded_once"
TAP += (
    "gradients_without_other_owners_are_updated_in_place",
    "addition_passes_one_gradient_to_both_terms",
)
TAP += "two_taps_share_one_gradient", "gradients_that_the_caller_captures_or_passes"
TAP += "retained_graph_and_saved_tensor_hooks", "module_backward_hooks_see_unchanged_gradients"
TAP += ("checkpointing",)
for module in (test_contract, test_map_operators, test_loss_options, test_tap_operators):
    globals().update(imported(module))
globals().update(imported(test_operators, *OPERATORS))
globals().update(imported(test_forward_mode, "operators_in_forward_mode"))
globals().update(imported(test_tap, *TAP))


# ---- inputs and programs -------------------------------------------------------------------------

MAP_LOSS = torch.ops.at_fused.map_loss.default
LOSS = [], "paper", "sum", "add", 1e-6, True
Pairs = tuple[list[Tensor], list[Tensor]]
Program = Callable[..., list[Tensor]]


def pairs() -> Pairs:
    """Four pairs: of either layout and another dtype, of whole samples and of shared ones."""
    with torch.device(DEVICE):
        students = [
            features(8, 16, 32, 32),
            features(8, 32, 16, 16, layout="interleaved"),
            features(8, 64, 7, 7, dtype=torch.bfloat16),
            features(5, 96, 56, 56),  # does not fit on chip
        ]
        teachers = [features(x.shape[0], 48, *x.shape[2:]) for x in students]
    return [x.requires_grad_() for x in students], teachers


def change(inputs: Pairs) -> None:
    with torch.no_grad():
        for x in (*inputs[0], *inputs[1]):
            x.copy_(torch.randn_like(x))


def loss_and_gradients(students: list[Tensor], teachers: list[Tensor]) -> list[Tensor]:
    loss = at_fused.at_loss(students, teachers)
    return [loss.detach(), *torch.autograd.grad(loss, students)]


def value_and_gradients(students: list[Tensor], teachers: list[Tensor]) -> list[Tensor]:
    loss, gradients = at_fused.at_value_and_grad(students, teachers, scale=3.0)
    return [loss, *gradients]


def maps_and_their_loss(students: list[Tensor], teachers: list[Tensor]) -> list[Tensor]:
    """Sums and maxima, and the gradients of both."""
    plain = [x.detach() for x in students]
    above = torch.stack([_ops.attention_map([x], 2.0, "mean")[0].sum() for x in plain])
    other = _ops.attention_map(teachers, 2.0, "mean")
    results = []
    for collapse in ("max", "mean"):
        found = _ops.attention_map(plain, 3.0, collapse)
        maps, channels = found[: len(plain)], found[len(plain) :]
        loss, ks = MAP_LOSS([q.float() for q in maps], other, *LOSS, False)
        rest = above, [*range(len(plain))], 3.0, [], channels
        results += [*found, loss, *ks, *_ops.attention_map_backward(plain, ks, *rest)]
    return results


def taps(students: list[Tensor], teachers: list[Tensor]) -> list[Tensor]:
    """Gradients added to others, new and in place."""
    results = []
    for x in (student.detach() for student in students):
        for collapse in ("mean", "max"):
            q, *channels = _ops.attention_map([x], 2.0, collapse)
            g, rest = x * 2, (x, q, 2.0, collapse, *channels)
            results += [_ops.attention_tap_backward(g, *rest), g]
            _ops.attention_tap_backward_(g, *rest)
    return results


PROGRAMS = (loss_and_gradients, value_and_gradients, maps_and_their_loss, taps)


def same_bits(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# ---- what can be run on the CPU as well ----------------------------------------------------------


@pytest.mark.parametrize("program", PROGRAMS)
def test_same_bits_in_every_run(gpu: str, program: Program) -> None:
    inputs = pairs()
    once = program(*inputs)
    for _ in range(10):
        assert same_bits(once, program(*inputs))


def a_loss(students: list[Tensor], teachers: list[Tensor]) -> list[Tensor]:
    weights = [1, 2, 3, 4][: len(students)]
    loss = at_fused.at_loss([x * 2 for x in students], teachers, weights=weights)
    return [3 * loss + at_fused.at(students[0]).square().mean()]


def a_gradient(students: list[Tensor], teachers: list[Tensor]) -> list[Tensor]:
    loss, gradients = at_fused.at_value_and_grad([x * 2 for x in students], teachers)
    return [loss * 3, *(g + 1 for g in gradients)]


def a_loss_of_maps(students: list[Tensor], teachers: list[Tensor]) -> list[Tensor]:
    maps = [[at_fused.attention_map(x) for x in side] for side in (students, teachers)]
    return [at_fused.map_loss(*maps, form="paper") * 3]


@pytest.mark.smoke
@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune"])
@pytest.mark.parametrize("program", [a_loss, a_gradient, a_loss_of_maps])
def test_compiled(gpu: str, program: Program, mode: str) -> None:
    """In its own graphs warmed up, captured and replayed with new data, two side by side."""
    torch._dynamo.reset()
    counters.clear()
    both = [pairs(), tuple(side[:2] for side in pairs())]
    run = torch.compile(program, mode=mode, fullgraph=True)

    def with_gradients(results: list[Tensor], students: list[Tensor]) -> list[Tensor]:
        differentiable = results[0].requires_grad
        return [*results, *(torch.autograd.grad(results[0], students) if differentiable else ())]

    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        found = [run(*inputs) for inputs in both]
        found = [with_gradients(x, inputs[0]) for x, inputs in zip(found, both, strict=True)]
        for results, inputs in zip(found, both, strict=True):
            expected = with_gradients(program(*inputs), inputs[0])
            torch.testing.assert_close(results, expected)
            change(inputs)
    assert not (GPU and counters["inductor"]["cudagraph_skips"])  # else nothing was captured


@pytest.mark.smoke
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str
)
def test_numbers(backend: str, dtype: torch.dtype, layout: str) -> None:
    """Pairs alone, and a list of more blocks than the device runs at a time."""
    sizes = (64, 56), (128, 28), (256, 14), (512, 7), (16, 32), (3, 5)
    batch = 32 if GPU else 1
    students = [features(batch, c, h, h, layout=layout, dtype=dtype) for c, h in sizes]
    teachers = [features(*x.shape, layout=layout, dtype=dtype) for x in students]
    assert_matches_reference(students, teachers, scale=2.0**12)
    for pair in zip(students, teachers, strict=True):
        assert_matches_reference(pair[:1], pair[1:], scale=2.0**12)


# ---- graphs, streams and pools: in a dry run stand-ins -------------------------------------------


def capture(program: Program, inputs: Pairs) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
    """A graph of the program, and where its results are after each replay."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # compiles, loads and allocates what a capture may not
            program(*inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = program(*inputs)
    return graph, results


@pytest.mark.smoke
@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("program", PROGRAMS)
def test_graph_capture_and_replay(gpu: str, program: Program) -> None:
    inputs = pairs()
    graph, results = capture(program, inputs)
    for replays in (1, 1, 3):  # each sets its counters to zero itself
        change(inputs)
        for _ in range(replays):
            graph.replay()
        assert same_bits(results, program(*inputs))


@pytest.mark.smoke
@pytest.mark.usefixtures("cuda")
def test_streams_at_once(gpu: str) -> None:
    """Replays of a graph beside calls."""
    inputs = [pairs() for _ in range(4)]
    expected = [[program(*x) for program in PROGRAMS] for x in inputs]
    graphs = [[capture(program, x) for program in PROGRAMS] for x in inputs[:2]]
    streams = [torch.cuda.Stream() for _ in inputs]
    torch.cuda.synchronize()
    found: list[tuple[list[Tensor], list[Tensor]]] = []
    for _ in range(ROUNDS):
        for k, program in enumerate(PROGRAMS):
            for i, stream in enumerate(streams):
                with torch.cuda.stream(stream):
                    if i < len(graphs):
                        graph, results = graphs[i][k]
                        graph.replay()
                        results = [x.clone() for x in results]
                    else:
                        results = program(*inputs[i])
                found.append((results, expected[i][k]))
    torch.cuda.synchronize()
    assert all(same_bits(*each) for each in found)


@pytest.mark.smoke
@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("program", PROGRAMS)
def test_a_memory_pool_that_dies(gpu: str, program: Program) -> None:
    """A stream's first call allocates in it: nothing of that may be left for the next."""
    inputs = pairs()
    expected = program(*inputs)
    pool, side = torch.cuda.MemPool(), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        with torch.cuda.use_mem_pool(pool):
            found = program(*inputs)
        assert same_bits(found, expected)
        del found
        torch.cuda.synchronize()
        blocks = [block for segment in pool.snapshot() for block in segment["blocks"]]
        assert not [block for block in blocks if block["state"] == "active_allocated"]
        del pool
        assert same_bits(program(*inputs), expected)


# ---- what needs a GPU ----------------------------------------------------------------------------


@needs_gpu
def test_nothing_waits_for_the_device(gpu: str) -> None:
    students, teachers = pairs()
    scale = torch.ones((), device=DEVICE)

    def everything() -> None:
        loss_and_gradients(students, teachers)
        at_fused.at_value_and_grad(students, teachers, scale=scale)
        at_fused.at(students[0]).sum().backward()
        maps_and_their_loss(students, teachers)

    everything()
    torch.cuda.set_sync_debug_mode("error")
    try:
        everything()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def peak(run: Callable[[], object]) -> int:
    """Bytes allocated at the most, beyond those before."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()  # a cached block may be larger than what is asked for
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = run()
    torch.cuda.synchronize()
    del result
    return torch.cuda.max_memory_allocated() - before


@needs_gpu
@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory(gpu: str, layout: str) -> None:
    with torch.device(DEVICE):
        # 16 MB each: the allocator rounds to 2.
        s = features(16, 64, 64, 64, layout=layout).requires_grad_()
        t = features(16, 64, 64, 64, layout=layout)
    loss_and_gradients([s], [t])
    value_and_gradients([s], [t])
    # A map is a 64th of its feature.
    assert peak(lambda: at_fused.at_loss(s, t)) < (s.nbytes + t.nbytes) / 8
    loss = at_fused.at_loss(s, t)
    assert peak(lambda: torch.autograd.grad(loss, s)) <= s.nbytes + (1 << 20)
    bound = s.nbytes + (s.nbytes + t.nbytes) / 8
    assert peak(lambda: at_fused.at_value_and_grad(s, t)) <= bound


@needs_gpu
def test_a_device_that_is_not_the_current_one(gpu: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device")
    with torch.device("cuda:1"):
        students = [features(4, 16, 8, 8), features(3, 96, 56, 56)]
        teachers = [features(x.shape[0], 24, *x.shape[2:]) for x in students]
        assert_matches_reference(students, teachers)
    assert torch.cuda.current_device() == 0
    with pytest.raises(ValueError, match="teacher of pair 0 is on cuda:0"):
        at_fused.at_loss(students, [x.to("cuda:0") for x in teachers])


# ---- whole steps ---------------------------------------------------------------------------------


def test_memory_of_a_step_with_attention_transfer(gpu: str) -> None:
    def second(step: Callable[[], object]) -> int:
        step()
        return peak(step)

    take = second if GPU else test_transfer_training.PeakMemory().measure
    test_transfer_training.check_memory(DEVICE, take)
