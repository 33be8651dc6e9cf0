"""at-fused-train in several processes: the same training as in one, and how it ends."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import outside
import pytest
import torch
from torch import nn
from train_runs import ended, in_child, metrics, run, same, small, training, weights

from at_fused.train import loop, parallel
from at_fused.train.checkpoints import CheckpointError
from at_fused.train.config import to_toml
from at_fused.train.plan import Plan
from at_fused.train.rules import ConfigError
from at_fused.train.sync_norm import share_statistics

METHODS = ["none", "at", "kd", "at+kd", "f-actt", "gradient-at", "flip-symmetry"]


def together(count: int, function: Callable[[int], object]) -> list[int]:
    """Runs a function of the rank in forked processes with gloo between them; their statuses."""
    port = parallel.free_port()

    def member(rank: int) -> None:
        parallel.announce(rank, count, port)
        torch.set_num_threads(1)
        parallel.join(torch.device("cpu"))
        function(rank)
        parallel.leave()

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    children = [in_child(lambda rank=rank: member(rank)) for rank in range(count)]
    torch.set_num_threads(before)
    return [ended(child) for child in children]


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
    config = small(
        compare=METHODS,
        labels=21,
        batch_size=8,
        epochs=2,
        evaluate_every=1,
        teacher_from=teacher,
    )
    run(config, tmp_path / "one")
    assert together(2, lambda rank: run(config, tmp_path / "two")) == [0, 0]
    one, two = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    assert [p["run"] for p in one] == [p["run"] for p in two]
    assert len(one) == 2 * len(METHODS)
    for a, b in zip(one, two, strict=True):
        assert b["step"] == a["step"]
        for name in ("loss", "ce", "transfer"):
            assert b[name] == pytest.approx(a[name], rel=1e-4, abs=1e-7), (a["run"], name)
        # Of 500 images, each once: one may be a tie that rounding decides.
        assert b["accuracy"] == pytest.approx(a["accuracy"], abs=0.41)
    found, right = weights(tmp_path / "two"), weights(tmp_path / "one")
    torch.testing.assert_close(found, right, rtol=2e-3, atol=2e-4)


@pytest.mark.long
def test_a_resumed_run_of_two_is_the_whole_runs(tmp_path: Path) -> None:
    config = small(compare=["at"], epochs=6, checkpoint_every=2)

    def first_part(rank: int) -> None:
        step = loop.Trainer.train_step

        def stopped(self: Any, *arguments: Any) -> None:
            # The signal comes to one of them.
            if self.step == 3 and self.job.name != "teacher" and rank == 1:
                self.watch.signals.number = signal.SIGTERM
            step(self, *arguments)

        loop.Trainer.train_step = stopped  # type: ignore[method-assign]
        with pytest.raises(loop.Stopped):
            run(config, tmp_path / "two")

    assert together(2, lambda rank: run(config, tmp_path / "whole")) == [0, 0]
    assert together(2, first_part) == [0, 0]
    (saved,) = (
        p for p in (tmp_path / "two/checkpoints/at-seed0").iterdir() if p.stem == "step-00000004"
    )
    assert len(torch.load(saved, weights_only=True)["random"]) == 2
    assert together(2, lambda rank: run(config, tmp_path / "two")) == [0, 0]
    assert same(tmp_path / "whole", tmp_path / "two")


# ---- the command line ----------------------------------------------------------------------------


def ranks_of(process: int) -> list[int]:
    """The processes that --nproc 2 has started."""
    children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    ranks = [c for c in children if b"spawn_main" in Path(f"/proc/{c}/cmdline").read_bytes()]
    assert len(ranks) == 2
    return list(map(int, ranks))


@pytest.mark.long
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
    assert "none-seed0: epoch " in output
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


@pytest.mark.long
def test_torchrun_names_one_folder(tmp_path: Path) -> None:
    """After the time, of which every process has its own."""
    file = tmp_path / "config.toml"
    file.write_text(to_toml(small(compare=["none"])))
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    program = ["-m", "at_fused.train", "--config", str(file)]
    done = outside.run(tmp_path, *torchrun, *program)
    assert done.returncode == 0, done.stderr
    (out,) = (tmp_path / "runs").iterdir()
    assert f"everything is in runs/{out.name}" in done.stdout
    assert done.stdout.count("test accuracy") == 1
    assert [p["epoch"] for p in metrics(out)] == [2, 4, 6]


def two_machines(
    folders: list[Path], *words: str, second: tuple[str, ...] = ()
) -> list[tuple[int, str, str]]:
    """The program by two launchers, each in its own folder: statuses, outputs and errors."""
    port = str(parallel.free_port())
    there = ["--nnodes=2", "--nproc-per-node=1", "--master-addr=127.0.0.1", "--master-port", port]
    torchrun = [sys.executable, "-m", "torch.distributed.run", *there]
    program = ["-m", "at_fused.train", *words]
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    launchers = [
        subprocess.Popen(
            [*torchrun, f"--node-rank={i}", *program, *(second if i else ())], cwd=folder, **pipes
        )
        for i, folder in enumerate(folders)
    ]
    end = time.monotonic() + 180
    while time.monotonic() < end and None in (statuses := [each.poll() for each in launchers]):
        if any(statuses):  # one has failed: nothing keeps the other
            end = min(end, time.monotonic() + 10)
        time.sleep(0.1)
    for launcher in launchers:
        launcher.terminate()  # and it its worker
    return [(each.wait(), *each.communicate()) for each in launchers]


@pytest.fixture
def machines(tmp_path: Path) -> list[Path]:
    """Two working folders."""
    folders = [tmp_path / name for name in ("first", "second")]
    for folder in folders:
        folder.mkdir()
    return folders


@pytest.mark.long
def test_two_machines_train_as_one_process(
    teacher: str, machines: list[Path], tmp_path: Path
) -> None:
    config = small(compare=["none", "at+kd"], labels=20, epochs=2, teacher_from=teacher)
    run(config, tmp_path / "one")
    file = tmp_path / "config.toml"
    file.write_text(to_toml(config))
    done = two_machines(machines, "--config", str(file), "--out", "run")
    assert [status for status, _, _ in done] == [0, 0], "\n".join(
        each for _, *texts in done for each in texts
    )
    assert done[0][1].count("everything is in run") == 1
    assert done[1][1] == ""
    assert not list(machines[1].rglob("*.*")), "the first alone writes"
    one, two = metrics(tmp_path / "one"), metrics(machines[0] / "run")
    assert [p["run"] for p in two] == [p["run"] for p in one] == ["none-seed0", "at+kd-seed0"]
    for a, b in zip(one, two, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-4)
        assert b["accuracy"] == pytest.approx(a["accuracy"], abs=0.41)
    found, right = weights(machines[0] / "run"), weights(tmp_path / "one")
    torch.testing.assert_close(found, right, rtol=2e-3, atol=2e-4)


@pytest.mark.long
@pytest.mark.parametrize(
    ("second", "message"),
    [
        (("--beto=3",), "process 1: wrong options"),
        (("--config=c.toml",), "process 1: the first process has neither --config nor --resume"),
        (("--lr=0.7",), "lr: process 1 has 0.7, process 0 has 0.1; all processes"),
    ],
    ids=lambda each: each[0] if isinstance(each, tuple) else "",
)
def test_a_machine_that_was_told_otherwise_ends_all(
    second: tuple[str, ...], message: str, machines: list[Path]
) -> None:
    """In a line, where each would wait for the other."""
    words = ["--preset=digits-quick", "--image-size=8", "--method=none", "--out=run"]
    done = two_machines(machines, *words, second=second)
    assert [status for status, _, _ in done] == [1, 1], done
    assert message in done[0][2]
    assert not (machines[0] / "run").exists()


@pytest.mark.long
def test_machines_go_on_from_the_first_ones_folder(machines: list[Path], tmp_path: Path) -> None:
    """A teacher that is trained, a student with a checkpoint, and one to begin."""
    config = small(compare=["at", "kd"], epochs=6, checkpoint_every=2)

    def stopped(self: Any, *arguments: Any) -> None:
        if self.step == 3 and self.job.name != "teacher":
            self.watch.signals.number = signal.SIGTERM
        step(self, *arguments)

    step = loop.Trainer.train_step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Trainer, "train_step", stopped)
        with pytest.raises(loop.Stopped):
            run(config, machines[0] / "run")
    (machines[0] / "run/config.toml").write_text(to_toml(config))
    run(config, tmp_path / "one")
    done = two_machines(machines, "--resume", "run")
    assert [status for status, _, _ in done] == [0, 0], "\n".join(
        each for _, *texts in done for each in texts
    )
    assert not list(machines[1].rglob("*.*"))
    found, right = weights(machines[0] / "run"), weights(tmp_path / "one")
    torch.testing.assert_close(found, right, rtol=2e-3, atol=2e-4)


@pytest.mark.long
def test_an_error_is_said_in_a_line(tmp_path: Path) -> None:
    done = outside.run(tmp_path, "-m", "at_fused.train", "--nproc=2", "--student=wrn-11-1")
    assert done.returncode == 1
    assert "of 2: student: got 'wrn-11-1', allowed is a depth of 6n + 4" in done.stderr
    assert "Traceback" not in done.stderr


# ---- its parts -----------------------------------------------------------------------------------


def test_shared_statistics_are_those_of_the_whole_batch() -> None:
    """Far from 0 as well, and in evaluation. Gradients: test_two_processes_train_as_one."""
    torch.manual_seed(0)
    x, norm = torch.randn(7, 3, 4, 5) * 3 + 100, nn.BatchNorm2d(3)
    wanted, parts = norm(x), [slice(0, 4), slice(4, 7)]

    def member(rank: int) -> None:
        model = nn.Sequential(nn.BatchNorm2d(3))
        shared = share_statistics(model, torch.device("cpu"))
        assert list(map(id, shared.parameters())) == list(map(id, model.parameters()))
        found = shared(x[parts[rank]])
        torch.testing.assert_close(found, wanted[parts[rank]], rtol=2e-4, atol=2e-4)
        torch.testing.assert_close(list(shared.buffers()), list(norm.buffers()))
        norm.eval(), shared.eval()
        torch.testing.assert_close(shared(x), norm(x))

    assert together(2, member) == [0, 0]


class UnsendableError(Exception):
    def __init__(self, a: int, b: int) -> None:
        super().__init__(f"{a} and {b}")


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (ConfigError("out: no"), ConfigError, "^out: no$"),
        (CheckpointError("a.pt: cut"), CheckpointError, "^a.pt: cut$"),
        (OSError(errno.ENOSPC, "full", "run.json"), OSError, "full: 'run.json'"),
        (UnsendableError(1, 2), RuntimeError, "^UnsendableError: 1 and 2$"),
    ],
)
def test_all_raise_what_the_first_raises(error: Exception, kind: Any, message: str) -> None:
    def fail() -> None:
        raise error

    def member(rank: int) -> None:
        with pytest.raises(kind, match=message) as caught:
            parallel.from_first(fail)
        assert type(caught.value) is kind
        assert parallel.gather(rank) == [0, 1]  # nobody is left waiting

    assert together(2, member) == [0, 0]


def test_processes_with_other_options_or_images_are_refused() -> None:
    def member(rank: int) -> None:
        parallel.same_in_all({"lr": 0.1, "data": "abc"})
        with pytest.raises(ConfigError, match=r"^lr: process 1 has 0.2, process 0 has 0.1; all"):
            parallel.same_in_all({"data": "abc", "lr": 0.1 * (rank + 1)})

    assert together(2, member) == [0, 0]


def test_all_get_what_the_first_finds() -> None:
    def member(rank: int) -> None:
        found = parallel.from_first(lambda: {"rank": rank, "weights": torch.ones(2)})
        assert found["rank"] == 0
        assert torch.equal(found["weights"], torch.ones(2))

    assert together(2, member) == [0, 0]
    assert parallel.from_first(lambda: 5) == 5


def test_shares_are_a_partition() -> None:
    rows = torch.arange(7)

    def member(rank: int) -> None:
        assert torch.equal(torch.cat(parallel.gather(parallel.share(rows))), rows)
        # A batch of 2 is none for three processes, whose BatchNorm would have nothing to average.
        assert [len(b) for b in Plan(small(batch_size=8), 18, 0, 1.0).batches(0)] == [8, 8]
        message = "5 images make no batch of two for each of 3 processes"
        with pytest.raises(ConfigError, match=message):
            Plan(small(), 5, 0, 1.0)

    assert together(3, member) == [0, 0, 0]
    assert torch.equal(parallel.share(rows), rows)
    assert [len(b) for b in Plan(small(batch_size=8), 18, 0, 1.0).batches(0)] == [8, 8, 2]
