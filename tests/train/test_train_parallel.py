"""at-fused-train in several processes: the same training as in one, and how it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from train_runs import (
    ended,
    in_child,
    metrics,
    run,
    same,
    small,
    stop_in_step,
    training,
    weights,
)

import at_fused
from at_fused import AttentionTransfer
from at_fused.train import loop, parallel
from at_fused.train.config import ConfigError, to_toml
from at_fused.train.networks import build

METHODS = ["none", "at", "kd", "at+kd", "f-actt", "gradient-at", "flip-symmetry"]
TORCHRUN = ["-m", "torch.distributed.run"]


def together(count: int, function: Callable[[int], object]) -> list[int]:
    """Run a function of the rank in forked processes with gloo between them; their statuses."""
    port = parallel.free_port()

    def member(rank: int) -> None:
        parallel.announce(rank, count, port)
        torch.set_num_threads(1)
        parallel.join()
        function(rank)
        parallel.leave()

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    children = [in_child(lambda rank=rank: member(rank)) for rank in range(count)]
    torch.set_num_threads(before)
    return [ended(child) for child in children]


def assert_alike(one: Path, two: Path) -> None:
    """Losses, accuracy and weights of two runs agree to rounding."""
    lines = metrics(one), metrics(two)
    assert [p["run"] for p in lines[0]] == [p["run"] for p in lines[1]]
    for a, b in zip(*lines, strict=True):
        assert b["step"] == a["step"]
        for name in ("loss", "ce", "transfer"):
            assert b[name] == pytest.approx(a[name], rel=1e-4, abs=1e-7), (a["run"], name)
        # With the weights after the step.
        for name in ("gradient_ratio", "gradient_cosine"):
            found = b.get(name, 0.0), a.get(name, 0.0)
            assert found[0] == pytest.approx(found[1], rel=5e-3, abs=1e-3), (a["run"], name)
        # Of 500 images, each once: one may be a tie that rounding decides.
        assert b["accuracy"] == pytest.approx(a["accuracy"], abs=0.41)
    torch.testing.assert_close(weights(two), weights(one), rtol=2e-3, atol=2e-4)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The weights of a teacher that was trained in one process."""
    out = tmp_path_factory.mktemp("teacher")
    run(small(compare=["kd"], epochs=1), out)
    return str(out / "teacher.pt")


def test_two_processes_train_as_one(teacher: str, tmp_path: Path) -> None:
    """Every method: losses, accuracy and weights are those of one process with the whole batch.

    From one teacher, in whose 16 steps rounding would grow; the students' last batch, of 5, is cut
    into 3 and 2.
    """
    options = {"compare": METHODS, "labels": 21, "batch_size": 8, "epochs": 1}
    options["method"] = {"at+kd": {"beta": "auto"}}
    config = small(**options, teacher_from=teacher)
    run(config, tmp_path / "one")
    assert together(2, lambda rank: run(config, tmp_path / "two")) == [0, 0]
    assert len(metrics(tmp_path / "one")) == len(METHODS)
    assert_alike(tmp_path / "one", tmp_path / "two")


@pytest.mark.exhaustive
def test_a_resumed_run_of_two_is_the_whole_runs(tmp_path: Path) -> None:
    config = small(compare=["at"], epochs=6, checkpoint_every=2)

    def first_part(rank: int) -> None:
        with pytest.MonkeyPatch.context() as patch:
            if rank == 1:  # the signal comes to one of them
                stop_in_step(3, patch)
            with pytest.raises(loop.Stopped):
                run(config, tmp_path / "two")

    assert together(2, lambda rank: run(config, tmp_path / "whole")) == [0, 0]
    assert together(2, first_part) == [0, 0]
    saved = tmp_path / "two/checkpoints/at-seed0/step-00000004.pt"
    assert len(torch.load(saved, weights_only=True)["random"]) == 2
    assert together(2, lambda rank: run(config, tmp_path / "two")) == [0, 0]
    assert same(tmp_path / "whole", tmp_path / "two")


# ---- the command line ----------------------------------------------------------------------------


def ranks_of(process: int) -> list[int]:
    """Return the processes that --nproc 2 has started."""
    children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    ranks = [c for c in children if b"spawn_main" in Path(f"/proc/{c}/cmdline").read_bytes()]
    assert len(ranks) == 2
    return list(map(int, ranks))


@pytest.mark.exhaustive
def test_nproc_passes_a_signal_on_and_a_rank_that_dies_ends_the_rest(tmp_path: Path) -> None:
    """SIGTERM first; then --resume, of which one process is killed."""
    file, out = tmp_path / "config.toml", tmp_path / "run"
    file.write_text(to_toml(small(compare=["none"], epochs=100_000, nproc=2)))
    process = training(out, "--config", str(file), "--out", str(out))
    process.terminate()
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert f"process 0 of 2: SIGTERM; go on with at-fused-train --resume {out}" in errors
    assert errors.count("go on with") == 1
    assert "none-seed0: step " in output
    assert "everything is in" not in output
    (saved,) = (out / "checkpoints/none-seed0").iterdir()

    again = training(out, "--resume", str(out))
    ranks = ranks_of(again.pid)
    os.kill(ranks[1], signal.SIGKILL)
    _, errors = again.communicate(timeout=60)
    assert again.returncode == 1
    assert "SIGKILL" in errors
    assert "the others were ended" in errors
    assert not Path(f"/proc/{ranks[0]}").exists()
    assert saved.exists()


def two_machines(
    folders: list[Path], *words: str, second: tuple[str, ...] = ()
) -> list[tuple[int, str, str]]:
    """Run the program by two launchers, each in its folder: statuses, outputs and errors."""
    address = ["--master-addr=127.0.0.1", f"--master-port={parallel.free_port()}"]
    torchrun = [sys.executable, *TORCHRUN, "--nnodes=2", "--nproc-per-node=1", *address]
    program = ["-m", "at_fused.train", *words]
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    launchers = [
        subprocess.Popen(
            [*torchrun, f"--node-rank={i}", *program, *(second if i else ())], cwd=folder, **pipes
        )
        for i, folder in enumerate(folders)
    ]
    try:
        said = [each.communicate(timeout=180) for each in launchers]
    finally:
        for launcher in launchers:
            launcher.terminate()  # and it its worker
    return [(each.returncode, *found) for each, found in zip(launchers, said, strict=True)]


@pytest.fixture
def machines(tmp_path: Path) -> list[Path]:
    """Two working folders."""
    folders = [tmp_path / name for name in ("first", "second")]
    for folder in folders:
        folder.mkdir()
    return folders


@pytest.mark.exhaustive
@pytest.mark.parametrize("resumes", [False, True])
def test_two_machines_train_as_one_process(
    resumes: bool, machines: list[Path], tmp_path: Path
) -> None:
    """From the start, or with a teacher that is there, a checkpoint, and a student to begin.

    Without a name the folder is of the time, of which every process has its own.
    """
    config = small(compare=["at", "kd"], labels=20, checkpoint_every=2)
    run(config, tmp_path / "one")
    file, out = tmp_path / "config.toml", machines[0] / "run"
    words = ["--config", str(file)]
    if resumes:
        with pytest.MonkeyPatch.context() as patch:
            stop_in_step(3, patch)
            with pytest.raises(loop.Stopped):
                run(config, out)
        file, words = out / "config.toml", ["--resume", "run"]
    file.write_text(to_toml(config))
    done = two_machines(machines, *words)
    assert [status for status, _, _ in done] == [0, 0], done
    if not resumes:
        (out,) = (machines[0] / "runs").iterdir()
    assert done[0][1].count(f"everything is in {out.relative_to(machines[0])}") == 1
    assert done[1][1] == ""
    assert not list(machines[1].rglob("*.*")), "the first alone writes"
    assert_alike(tmp_path / "one", out)


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("second", "message"),
    [
        ("--beto=3", "process 1: wrong options"),
        ("--config=c.toml", "process 1: the first process has neither --config nor --resume"),
        ("--lr=0.7", "lr: process 1 has 0.7, process 0 has 0.1; all processes"),
    ],
)
def test_a_machine_that_was_told_otherwise_ends_all(
    second: str, message: str, machines: list[Path]
) -> None:
    """In a line, where each would wait for the other."""
    words = ["--preset=digits-quick", "--image-size=8", "--method=none", "--out=run"]
    done = two_machines(machines, *words, second=(second,))
    assert [status for status, _, _ in done] == [1, 1], done
    assert message in done[0][2]
    assert not (machines[0] / "run").exists()


# ---- its parts -----------------------------------------------------------------------------------


def test_shared_statistics_are_those_of_the_whole_batch() -> None:
    """Far from 0 as well, and in evaluation. Gradients: test_two_processes_train_as_one."""
    torch.manual_seed(0)
    x, norm = torch.randn(7, 3, 4, 5) * 3 + 100, nn.BatchNorm2d(3)
    wanted, parts = norm(x), [slice(0, 4), slice(4, 7)]

    def member(rank: int) -> None:
        model = nn.Sequential(nn.BatchNorm2d(3))
        shared = parallel.share_statistics(model, torch.device("cpu"))
        assert list(map(id, shared.parameters())) == list(map(id, model.parameters()))
        found = shared(x[parts[rank]])
        torch.testing.assert_close(found, wanted[parts[rank]], rtol=2e-4, atol=2e-4)
        torch.testing.assert_close(list(shared.buffers()), list(norm.buffers()))
        norm.eval(), shared.eval()
        torch.testing.assert_close(shared(x), norm(x))

    assert together(2, member) == [0, 0]


def test_gradients_of_sharded_weights_are_refused() -> None:
    def member(rank: int) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (2,))
        student = fully_shard(nn.Sequential(fully_shard(nn.Linear(2, 2), mesh=mesh)), mesh=mesh)
        loss = student(torch.ones(1, 2)).sum()
        with pytest.raises(TypeError, match="parameters must not be sharded, got one that FSDP sh"):
            at_fused.gradient_ratio(loss, 2 * loss, student)

    assert together(2, member) == [0, 0]


def test_auto_beta_of_a_distributed_student_is_the_same_in_all() -> None:
    """AttentionTransfer in a loop of one's own: each process measures its part of the batch."""
    torch.manual_seed(0)
    x, y = torch.randn(8, 1, 12, 12), torch.arange(8) % 3

    def member(rank: int) -> None:
        torch.manual_seed(1)
        student, teacher = (build(name, 3, 1) for name in ("wrn-10-1-b4", "wrn-10-1-b8"))
        of_student = {"broadcast_buffers": False}
        distributed = nn.parallel.DistributedDataParallel(student, **of_student)
        at = AttentionTransfer(distributed, teacher, example=x, beta="auto", verbose=False)
        mine = slice(rank, None, 2)
        task = nn.functional.cross_entropy(distributed(x[mine])[0], y[mine])
        loss = at(x[mine], task_loss=task)
        betas, ratios = parallel.gather(at.beta), parallel.gather(3 / at.beta)
        assert betas[0] == betas[1]
        plain = AttentionTransfer(student, teacher, example=x, beta=1.0, verbose=False)
        again = nn.functional.cross_entropy(student(x[mine])[0], y[mine])
        own = parallel.gather(plain.gradient_ratio(again, plain(x[mine]), verbose=False).ratio)
        assert own[0] != own[1]
        assert ratios[0] == pytest.approx((own[0] * own[1]) ** 0.5, rel=1e-4)
        # The network inside does not say that there is another process.
        plain.beta = "auto"
        again = nn.functional.cross_entropy(student(x[mine])[0], y[mine])
        with pytest.raises(ValueError, match="'auto' needs the student in its DistributedDataPara"):
            plain(x[mine], task_loss=again)
        (task + loss).backward()
        grads = torch.cat([p.grad.flatten() for p in student.parameters()])
        torch.testing.assert_close(*parallel.gather(grads))

    assert together(2, member) == [0, 0]


def test_processes_agree_or_all_of_them_end() -> None:
    """On what the first finds, and the options and errors of each; none is left waiting."""

    def fail() -> None:
        raise OSError("disk full")

    def wrong(rank: int) -> None:
        if rank == 1:
            raise ConfigError("lr: no")

    def member(rank: int) -> None:
        found = parallel.from_first(lambda: {"rank": rank, "weights": torch.ones(2)})
        assert (found["rank"], found["weights"].tolist()) == (0, [1, 1])
        kind = parallel.FirstFailedError if rank else OSError
        with pytest.raises(kind, match=r"^disk full$"):
            parallel.from_first(fail)
        with pytest.raises(ConfigError, match=r"^lr: no$" if rank else r"^process 1: lr: no$"):
            parallel.in_all(lambda: wrong(rank))
        assert parallel.in_all(lambda: rank) == rank
        parallel.same_in_all({"lr": 0.1, "data": "abc"})
        with pytest.raises(ConfigError, match=r"^lr: process 1 has 0.2, process 0 has 0.1; all"):
            parallel.same_in_all({"data": "abc", "lr": 0.1 * (rank + 1)})

    assert together(2, member) == [0, 0]
    assert parallel.from_first(lambda: 5) == 5


def test_shares_are_a_partition() -> None:
    rows = torch.arange(7)

    def member(rank: int) -> None:
        assert torch.equal(torch.cat(parallel.gather(parallel.share(rows))), rows)
        # A batch of 2 is none for three processes, whose BatchNorm would have nothing to average.
        assert [len(b) for b in loop.Plan(small(batch_size=8), 18, 0, 1.0).batches(0)] == [8, 8]
        message = "5 images make no batch of two for each of 3 processes"
        with pytest.raises(ConfigError, match=message):
            loop.Plan(small(), 5, 0, 1.0)

    assert together(3, member) == [0, 0, 0]
    assert torch.equal(parallel.share(rows), rows)
    assert [len(b) for b in loop.Plan(small(batch_size=8), 18, 0, 1.0).batches(0)] == [8, 8, 2]
