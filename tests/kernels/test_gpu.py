"""Tests on a GPU: the contract, CUDA graphs, streams, memory pools, synchronisation, peak memory.

Without a GPU nothing is collected, unless AT_FUSED_GPU_DRY_RUN=1. The dry run checks these tests on
the CPU, with stand-ins for graphs and streams; tests that need a GPU are skipped.
scripts/gpu_check.py runs tests marked smoke first.
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
needs_gpu = pytest.mark.skipif(not GPU, reason="needs a CUDA device")


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Install stand-ins for graphs, streams and pools in a dry run."""
    if not GPU:
        pretend_cuda.install(monkeypatch)


@pytest.fixture(params=BACKENDS)
def gpu(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test on every back end for GPUs."""
    with at_fused.use_backend(request.param):
        yield request.param


# ---- tests of other files, with fixtures that create tensors on the device -----------------------


@pytest.fixture
def backend(gpu: str) -> Iterator[str]:
    with torch.device(DEVICE):
        yield gpu


@pytest.fixture
def fast_backend(backend: str) -> str:
    return backend


def imported(module: ModuleType, *names: str) -> dict[str, Callable[..., None]]:
    """Return the module's tests with these names, or by default all with a back end fixture."""
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
    """Return pairs of both layouts and two dtypes; blocks share the samples of the last one."""
    with torch.device(DEVICE):
        students = [
            features(8, 16, 32, 32),
            features(8, 32, 16, 16, layout="interleaved"),
            features(8, 64, 7, 7, dtype=torch.bfloat16),
            features(5, 96, 56, 56),  # does not fit in shared memory
        ]
        teachers = [features(x.shape[0], 48, *x.shape[2:]) for x in students]
    return [x.requires_grad_() for x in students], teachers


def randomise(inputs: Pairs) -> None:
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
    """Compute maps, their loss and the gradients, with collapse "max" and "mean"."""
    xs = [x.detach() for x in students]
    upstream = torch.stack([_ops.attention_map([x], 2.0, "mean")[0].sum() for x in xs])
    teacher_maps = _ops.attention_map(teachers, 2.0, "mean")
    results = []
    for collapse in ("max", "mean"):
        outputs = _ops.attention_map(xs, 3.0, collapse)
        maps, channels = outputs[: len(xs)], outputs[len(xs) :]
        loss, ks = MAP_LOSS([q.float() for q in maps], teacher_maps, *LOSS, False)
        rest = upstream, [*range(len(xs))], 3.0, [], channels
        results += [*outputs, loss, *ks, *_ops.attention_map_backward(xs, ks, *rest)]
    return results


def taps(students: list[Tensor], teachers: list[Tensor]) -> list[Tensor]:
    """Add gradients of maps to upstream gradients, out of place and in place."""
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


# ---- determinism, compile, values ----------------------------------------------------------------


@pytest.mark.parametrize("program", PROGRAMS)
def test_repeated_runs_are_bitwise_equal(gpu: str, program: Program) -> None:
    inputs = pairs()
    expected = program(*inputs)
    for _ in range(10):
        assert same_bits(expected, program(*inputs))


def compiled_loss(students: list[Tensor], teachers: list[Tensor]) -> list[Tensor]:
    weights = [1, 2, 3, 4][: len(students)]
    loss = at_fused.at_loss([x * 2 for x in students], teachers, weights=weights)
    return [3 * loss + at_fused.at(students[0]).square().mean()]


def compiled_gradient(students: list[Tensor], teachers: list[Tensor]) -> list[Tensor]:
    loss, gradients = at_fused.at_value_and_grad([x * 2 for x in students], teachers)
    return [loss * 3, *(g + 1 for g in gradients)]


def compiled_map_loss(students: list[Tensor], teachers: list[Tensor]) -> list[Tensor]:
    maps = [[at_fused.attention_map(x) for x in side] for side in (students, teachers)]
    return [at_fused.map_loss(*maps, form="paper") * 3]


@pytest.mark.smoke
@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune"])
@pytest.mark.parametrize("program", [compiled_loss, compiled_gradient, compiled_map_loss])
def test_compiled_programs_match_eager(gpu: str, program: Program, mode: str) -> None:
    """Run two inputs per step, so that two CUDA graphs are captured and replayed with new data."""
    torch._dynamo.reset()
    counters.clear()
    both = [pairs(), tuple(side[:2] for side in pairs())]
    run = torch.compile(program, mode=mode, fullgraph=True)

    def with_gradients(results: list[Tensor], students: list[Tensor]) -> list[Tensor]:
        differentiable = results[0].requires_grad
        return [*results, *(torch.autograd.grad(results[0], students) if differentiable else ())]

    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        results = [run(*inputs) for inputs in both]
        results = [with_gradients(x, inputs[0]) for x, inputs in zip(results, both, strict=True)]
        for actual, inputs in zip(results, both, strict=True):
            expected = with_gradients(program(*inputs), inputs[0])
            torch.testing.assert_close(actual, expected)
            randomise(inputs)
    assert not (GPU and counters["inductor"]["cudagraph_skips"])  # the graphs were captured


@pytest.mark.smoke
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str
)
def test_values_match_the_reference(backend: str, dtype: torch.dtype, layout: str) -> None:
    """Test single pairs, and a list with more blocks than the device runs at a time."""
    sizes = (64, 56), (128, 28), (256, 14), (512, 7), (16, 32), (3, 5)
    batch = 32 if GPU else 1
    students = [features(batch, c, h, h, layout=layout, dtype=dtype) for c, h in sizes]
    teachers = [features(*x.shape, layout=layout, dtype=dtype) for x in students]
    assert_matches_reference(students, teachers, scale=2.0**12)
    for pair in zip(students, teachers, strict=True):
        assert_matches_reference(pair[:1], pair[1:], scale=2.0**12)


# ---- graphs, streams and pools: stand-ins in a dry run -------------------------------------------


def capture(program: Program, inputs: Pairs) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
    """Capture a graph of the program; return it and the results that replays overwrite."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # warm-up: a capture must not compile or load kernels
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
    for replays in (1, 1, 3):  # each replay must reset its counters
        randomise(inputs)
        for _ in range(replays):
            graph.replay()
        assert same_bits(results, program(*inputs))


@pytest.mark.smoke
@pytest.mark.usefixtures("cuda")
def test_concurrent_streams(gpu: str) -> None:
    """Graph replays run concurrently with direct calls."""
    inputs = [pairs() for _ in range(4)]
    expected = [[program(*x) for program in PROGRAMS] for x in inputs]
    graphs = [[capture(program, x) for program in PROGRAMS] for x in inputs[:2]]
    streams = [torch.cuda.Stream() for _ in inputs]
    torch.cuda.synchronize()
    outcomes: list[tuple[list[Tensor], list[Tensor]]] = []
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
                outcomes.append((results, expected[i][k]))
    torch.cuda.synchronize()
    assert all(same_bits(*each) for each in outcomes)


@pytest.mark.smoke
@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("program", PROGRAMS)
def test_nothing_is_retained_in_a_memory_pool(gpu: str, program: Program) -> None:
    """The first call of a stream allocates in a pool. The next call must not depend on the pool."""
    inputs = pairs()
    expected = program(*inputs)
    pool, side = torch.cuda.MemPool(), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        with torch.cuda.use_mem_pool(pool):
            results = program(*inputs)
        assert same_bits(results, expected)
        del results
        torch.cuda.synchronize()
        blocks = [block for segment in pool.snapshot() for block in segment["blocks"]]
        assert not [block for block in blocks if block["state"] == "active_allocated"]
        del pool
        assert same_bits(program(*inputs), expected)


# ---- synchronisation, memory, devices: need a GPU ------------------------------------------------


@needs_gpu
def test_calls_do_not_synchronise(gpu: str) -> None:
    students, teachers = pairs()
    scale = torch.ones((), device=DEVICE)

    def call_all() -> None:
        loss_and_gradients(students, teachers)
        at_fused.at_value_and_grad(students, teachers, scale=scale)
        at_fused.at(students[0]).sum().backward()
        maps_and_their_loss(students, teachers)

    call_all()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call_all()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def peak(run: Callable[[], object]) -> int:
    """Return the peak of bytes allocated by a call."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()  # a cached block may be larger than requested
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = run()
    torch.cuda.synchronize()
    del result
    return torch.cuda.max_memory_allocated() - before


@needs_gpu
@pytest.mark.parametrize("layout", LAYOUTS)
def test_peak_memory(gpu: str, layout: str) -> None:
    with torch.device(DEVICE):
        # 16 MB each, because the allocator rounds up to 2 MB.
        s = features(16, 64, 64, 64, layout=layout).requires_grad_()
        t = features(16, 64, 64, 64, layout=layout)
    loss_and_gradients([s], [t])
    value_and_gradients([s], [t])
    # The maps have 1/64 of the features' bytes.
    assert peak(lambda: at_fused.at_loss(s, t)) < (s.nbytes + t.nbytes) / 8
    loss = at_fused.at_loss(s, t)
    assert peak(lambda: torch.autograd.grad(loss, s)) <= s.nbytes + (1 << 20)
    bound = s.nbytes + (s.nbytes + t.nbytes) / 8
    assert peak(lambda: at_fused.at_value_and_grad(s, t)) <= bound


@needs_gpu
def test_tensors_on_another_than_the_current_device(gpu: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device")
    with torch.device("cuda:1"):
        students = [features(4, 16, 8, 8), features(3, 96, 56, 56)]
        teachers = [features(x.shape[0], 24, *x.shape[2:]) for x in students]
        assert_matches_reference(students, teachers)
    assert torch.cuda.current_device() == 0
    with pytest.raises(ValueError, match="teacher of pair 0 is on cuda:0"):
        at_fused.at_loss(students, [x.to("cuda:0") for x in teachers])


# ---- training steps ------------------------------------------------------------------------------


def test_peak_memory_of_a_training_step(gpu: str) -> None:
    def peak_after_warm_up(step: Callable[[], object]) -> int:
        step()
        return peak(step)

    take = peak_after_warm_up if GPU else test_transfer_training.PeakMemory().measure
    test_transfer_training.check_memory(DEVICE, take)
