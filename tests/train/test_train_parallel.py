"""Distributed training: agreement with one process, launchers, and collectives."""

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
    fork,
    metrics,
    run,
    same_weights,
    small,
    start_training,
    stop_at_step,
    wait_for,
    weights,
)

import at_fused
from at_fused import AttentionTransfer
from at_fused.train import loop, parallel
from at_fused.train.config import ConfigError, to_toml
from at_fused.train.networks import build

METHODS = ["none", "at", "kd", "at+kd", "f-actt", "gradient-at", "flip-symmetry"]
TORCHRUN = ["-m", "torch.distributed.run"]


def run_distributed(count: int, function: Callable[[int], object]) -> list[int]:
    """Run a function of the rank in forked processes with a gloo group; return exit statuses."""
    port = parallel.free_port()

    def worker(rank: int) -> None:
        parallel.set_environment(rank, count, port)
        torch.set_num_threads(1)
        parallel.init_process_group()
        function(rank)
        parallel.destroy_process_group()

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    children = [fork(lambda rank=rank: worker(rank)) for rank in range(count)]
    torch.set_num_threads(before)
    return [wait_for(child) for child in children]


def assert_same_training(one: Path, two: Path) -> None:
    """Assert that losses, accuracy and weights of two runs agree to rounding."""
    lines = metrics(one), metrics(two)
    assert [p["run"] for p in lines[0]] == [p["run"] for p in lines[1]]
    for a, b in zip(*lines, strict=True):
        assert b["step"] == a["step"]
        for name in ("loss", "ce", "transfer"):
            assert b[name] == pytest.approx(a[name], rel=1e-4, abs=1e-7), (a["run"], name)
        # These depend on the weights after the step.
        for name in ("gradient_ratio", "gradient_cosine"):
            actual, expected = b.get(name, 0.0), a.get(name, 0.0)
            assert actual == pytest.approx(expected, rel=5e-3, abs=1e-3), (a["run"], name)
        # Rounding may decide ties of two of the 500 images.
        assert b["accuracy"] == pytest.approx(a["accuracy"], abs=0.41)
    torch.testing.assert_close(weights(two), weights(one), rtol=2e-3, atol=2e-4)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the weights of a teacher that was trained in one process."""
    out = tmp_path_factory.mktemp("teacher")
    run(small(compare=["kd"], epochs=1), out)
    return str(out / "teacher.pt")


def test_two_processes_train_like_one(teacher: str, tmp_path: Path) -> None:
    """Losses, accuracy and weights of all methods match one process with full batches.

    All have the same teacher, as rounding would grow in its 16 steps. The last batch, of 5, is
    split into 3 and 2.
    """
    options = {"compare": METHODS, "labels": 21, "batch_size": 8, "epochs": 1}
    options["method"] = {"at+kd": {"beta": "auto"}}
    config = small(**options, teacher_from=teacher)
    run(config, tmp_path / "one")
    assert run_distributed(2, lambda rank: run(config, tmp_path / "two")) == [0, 0]
    assert len(metrics(tmp_path / "one")) == len(METHODS)
    assert_same_training(tmp_path / "one", tmp_path / "two")


@pytest.mark.exhaustive
def test_resumed_distributed_run_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    config = small(compare=["at"], epochs=6, checkpoint_every=2)

    def interrupted(rank: int) -> None:
        with pytest.MonkeyPatch.context() as patch:
            if rank == 1:  # only one rank receives the signal
                stop_at_step(3, patch)
            with pytest.raises(loop.Stopped):
                run(config, tmp_path / "two")

    assert run_distributed(2, lambda rank: run(config, tmp_path / "reference")) == [0, 0]
    assert run_distributed(2, interrupted) == [0, 0]
    saved = tmp_path / "two/checkpoints/at-seed0/step-00000004.pt"
    assert len(torch.load(saved, weights_only=True)["random"]) == 2
    assert run_distributed(2, lambda rank: run(config, tmp_path / "two")) == [0, 0]
    assert same_weights(tmp_path / "reference", tmp_path / "two")


# ---- command line --------------------------------------------------------------------------------


def worker_ids(process: int) -> list[int]:
    """Return the ids of the processes that --nproc 2 has started."""
    children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    workers = [c for c in children if b"spawn_main" in Path(f"/proc/{c}/cmdline").read_bytes()]
    assert len(workers) == 2
    return list(map(int, workers))


@pytest.mark.exhaustive
def test_nproc_forwards_signals_and_exits_if_a_rank_dies(tmp_path: Path) -> None:
    """Send SIGTERM to the parent and, after --resume, SIGKILL to a rank."""
    file, out = tmp_path / "config.toml", tmp_path / "run"
    file.write_text(to_toml(small(compare=["none"], epochs=100_000, nproc=2)))
    process = start_training(out, "--config", str(file), "--out", str(out))
    process.terminate()
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert f"rank 0 of 2: stopped by SIGTERM; resume with at-fused-train --resume {out}" in errors
    assert errors.count("resume with") == 1
    assert "none-seed0: step " in output
    assert "results are in" not in output
    (saved,) = (out / "checkpoints/none-seed0").iterdir()

    again = start_training(out, "--resume", str(out))
    workers = worker_ids(again.pid)
    os.kill(workers[1], signal.SIGKILL)
    _, errors = again.communicate(timeout=60)
    assert again.returncode == 1
    assert "SIGKILL" in errors
    assert "the other processes were terminated" in errors
    assert not Path(f"/proc/{workers[0]}").exists()
    assert saved.exists()


def run_on_two_machines(
    folders: list[Path], *words: str, second: tuple[str, ...] = ()
) -> list[tuple[int, str, str]]:
    """Run the program with a launcher in each folder; return statuses, stdout and stderr."""
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
        outputs = [each.communicate(timeout=180) for each in launchers]
    finally:
        for launcher in launchers:
            launcher.terminate()  # which terminates its worker
    return [(each.returncode, *output) for each, output in zip(launchers, outputs, strict=True)]


@pytest.fixture
def machines(tmp_path: Path) -> list[Path]:
    """Return two working folders."""
    folders = [tmp_path / name for name in ("first", "second")]
    for folder in folders:
        folder.mkdir()
    return folders


@pytest.mark.exhaustive
@pytest.mark.parametrize("resumes", [False, True])
def test_two_machines_train_like_one_process(
    resumes: bool, machines: list[Path], tmp_path: Path
) -> None:
    """Start a new run, or resume one with a teacher and a checkpoint.

    Without --out the folder's name has the time, which may differ between processes.
    """
    config = small(compare=["at", "kd"], labels=20, checkpoint_every=2)
    run(config, tmp_path / "one")
    file, out = tmp_path / "config.toml", machines[0] / "run"
    words = ["--config", str(file)]
    if resumes:
        with pytest.MonkeyPatch.context() as patch:
            stop_at_step(3, patch)
            with pytest.raises(loop.Stopped):
                run(config, out)
        file, words = out / "config.toml", ["--resume", "run"]
    file.write_text(to_toml(config))
    done = run_on_two_machines(machines, *words)
    assert [status for status, _, _ in done] == [0, 0], done
    if not resumes:
        (out,) = (machines[0] / "runs").iterdir()
    assert done[0][1].count(f"results are in {out.relative_to(machines[0])}") == 1
    assert done[1][1] == ""
    assert not list(machines[1].rglob("*.*")), "only the first machine writes"
    assert_same_training(tmp_path / "one", out)


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("second", "message"),
    [
        ("--beto=3", "rank 1: invalid options"),
        ("--config=c.toml", "rank 1: rank 0 has neither --config nor --resume"),
        ("--lr=0.7", "lr: rank 1 has 0.7, rank 0 has 0.1; all ranks"),
    ],
)
def test_different_flags_on_a_machine_stop_all_ranks(
    second: str, message: str, machines: list[Path]
) -> None:
    """Expect status 1 on both machines, the message of rank 0, and no folder."""
    words = ["--preset=digits-quick", "--image-size=8", "--method=none", "--out=run"]
    done = run_on_two_machines(machines, *words, second=(second,))
    assert [status for status, _, _ in done] == [1, 1], done
    assert message in done[0][2]
    assert not (machines[0] / "run").exists()


# ---- BatchNorm, gradients and collectives --------------------------------------------------------


def test_sync_batchnorm_has_statistics_of_the_full_batch() -> None:
    """Use a mean far from 0; compare also in eval mode."""
    torch.manual_seed(0)
    x, norm = torch.randn(7, 3, 4, 5) * 3 + 100, nn.BatchNorm2d(3)
    expected, parts = norm(x), [slice(0, 4), slice(4, 7)]

    def worker(rank: int) -> None:
        model = nn.Sequential(nn.BatchNorm2d(3))
        synced = parallel.convert_sync_batchnorm(model, torch.device("cpu"))
        assert list(map(id, synced.parameters())) == list(map(id, model.parameters()))
        actual = synced(x[parts[rank]])
        torch.testing.assert_close(actual, expected[parts[rank]], rtol=2e-4, atol=2e-4)
        torch.testing.assert_close(list(synced.buffers()), list(norm.buffers()))
        norm.eval(), synced.eval()
        torch.testing.assert_close(synced(x), norm(x))

    assert run_distributed(2, worker) == [0, 0]


def test_gradient_ratio_refuses_fsdp_shards() -> None:
    def worker(rank: int) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (2,))
        student = fully_shard(nn.Sequential(fully_shard(nn.Linear(2, 2), mesh=mesh)), mesh=mesh)
        loss = student(torch.ones(1, 2)).sum()
        with pytest.raises(TypeError, match="parameters must not be sharded, got one that FSDP sh"):
            at_fused.gradient_ratio(loss, 2 * loss, student)

    assert run_distributed(2, worker) == [0, 0]


def test_auto_beta_is_the_same_on_all_ranks() -> None:
    """Use AttentionTransfer in a user's loop, where each rank measures its part of the batch."""
    torch.manual_seed(0)
    x, y = torch.randn(8, 1, 12, 12), torch.arange(8) % 3

    def worker(rank: int) -> None:
        torch.manual_seed(1)
        student, teacher = (build(name, 3, 1) for name in ("wrn-10-1-b4", "wrn-10-1-b8"))
        options = {"broadcast_buffers": False}
        distributed = nn.parallel.DistributedDataParallel(student, **options)
        at = AttentionTransfer(distributed, teacher, example=x, beta="auto", verbose=False)
        mine = slice(rank, None, 2)
        task = nn.functional.cross_entropy(distributed(x[mine])[0], y[mine])
        loss = at(x[mine], task_loss=task)
        betas, ratios = parallel.all_gather(at.beta), parallel.all_gather(3 / at.beta)
        assert betas[0] == betas[1]
        plain = AttentionTransfer(student, teacher, example=x, beta=1.0, verbose=False)
        again = nn.functional.cross_entropy(student(x[mine])[0], y[mine])
        own = parallel.all_gather(plain.gradient_ratio(again, plain(x[mine]), verbose=False).ratio)
        assert own[0] != own[1]
        assert ratios[0] == pytest.approx((own[0] * own[1]) ** 0.5, rel=1e-4)
        # Without its wrapper the student does not reveal the process group.
        plain.beta = "auto"
        again = nn.functional.cross_entropy(student(x[mine])[0], y[mine])
        with pytest.raises(ValueError, match="'auto' needs the student in its DistributedDataPara"):
            plain(x[mine], task_loss=again)
        (task + loss).backward()
        grads = torch.cat([p.grad.flatten() for p in student.parameters()])
        torch.testing.assert_close(*parallel.all_gather(grads))

    assert run_distributed(2, worker) == [0, 0]


def test_collectives_return_or_raise_on_all_ranks() -> None:
    """Check that ranks agree, and that no rank is left waiting."""

    def fail() -> None:
        raise OSError("disk full")

    def fail_on_rank_1(rank: int) -> None:
        if rank == 1:
            raise ConfigError("lr: no")

    def worker(rank: int) -> None:
        result = parallel.run_on_rank_0(lambda: {"rank": rank, "weights": torch.ones(2)})
        assert (result["rank"], result["weights"].tolist()) == (0, [1, 1])
        error = parallel.RankZeroError if rank else OSError
        with pytest.raises(error, match=r"^disk full$"):
            parallel.run_on_rank_0(fail)
        with pytest.raises(ConfigError, match=r"^lr: no$" if rank else r"^rank 1: lr: no$"):
            parallel.run_on_all_ranks(lambda: fail_on_rank_1(rank))
        assert parallel.run_on_all_ranks(lambda: rank) == rank
        parallel.check_same_on_all_ranks({"lr": 0.1, "data": "abc"})
        with pytest.raises(ConfigError, match=r"^lr: rank 1 has 0.2, rank 0 has 0.1; all"):
            parallel.check_same_on_all_ranks({"data": "abc", "lr": 0.1 * (rank + 1)})

    assert run_distributed(2, worker) == [0, 0]
    assert parallel.run_on_rank_0(lambda: 5) == 5


def test_shards_partition_a_batch() -> None:
    rows = torch.arange(7)

    def worker(rank: int) -> None:
        assert torch.equal(torch.cat(parallel.all_gather(parallel.shard(rows))), rows)
        # A last batch of 2 is dropped, as BatchNorm needs two images on each of three ranks.
        assert [len(b) for b in loop.Plan(small(batch_size=8), 18, 0, 1.0).batches(0)] == [8, 8]
        message = "5 images are too few for two on each of 3 ranks"
        with pytest.raises(ConfigError, match=message):
            loop.Plan(small(), 5, 0, 1.0)

    assert run_distributed(3, worker) == [0, 0, 0]
    assert torch.equal(parallel.shard(rows), rows)
    assert [len(b) for b in loop.Plan(small(batch_size=8), 18, 0, 1.0).batches(0)] == [8, 8, 2]
