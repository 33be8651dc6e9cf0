"""Trained networks as files: weights, and what builds the network that they fit."""

from __future__ import annotations

import argparse
import io
import pathlib
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import ZipFile

import numpy as np
import torch
from torch import Tensor, nn

from at_fused.train import checkpoints
from at_fused.train.config import Config, ConfigError, in_a_line, is_import
from at_fused.train.data import Data
from at_fused.train.networks import build, last_layer, torchvision_models

State = Mapping[str, Tensor]
TORCHVISION = "torchvision"

# ---- this program's files ------------------------------------------------------------------------


# Options that a data set is opened by, as a network's file has them.
DATA_OPTIONS = ("data", "root", "image_size", "mean", "std", "evaluate", "skip_unreadable")


def save_network(
    path: Path, side: str, model: nn.Module, data: Data, config: Config, **facts: Any
) -> None:
    """Write weights, what builds the network that they fit, what its images are, and a few facts.

    ``torch.load(path, weights_only=True)["model"]`` is the plain state_dict. The network takes
    ``(pixels - mean) / std`` of pixels in [0, 1], and its classes are ``names``. ``images`` are
    the DATA_OPTIONS; a root is kept as an absolute path, unless it is a function's argument.
    """
    images = {each: getattr(config, each) for each in DATA_OPTIONS}
    if not data.own:
        images["root"] = str(Path(config.root).expanduser().absolute())
    network = {
        "network": getattr(config, side),
        "classes": data.classes,
        "channels": data.channels,
        "image_size": data.image_size,
        "mean": list(data.mean),
        "std": list(data.std),
        "names": list(data.names),
        "images": images,
    }
    checkpoints.save(path, "network", {"model": model.state_dict(), **network, **facts})


def load_network(path: Path) -> tuple[nn.Module, dict[str, Any]]:
    """Return the network of a file that ``save_network`` wrote, in eval mode, and its content.

    Of a network MODULE:FUNCTION the module is imported again.
    """
    state = checkpoints.load(path, "network")
    try:
        model = build(state["network"], state["classes"], state["channels"], str(path))
        model.load_state_dict(state["model"])
    except (KeyError, TypeError, RuntimeError, ConfigError) as error:
        raise checkpoints.CheckpointError(
            f"{path}: no network of at-fused-train ({str(error).splitlines()[0]})"
        ) from error
    return model.eval(), state


def image_options(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of the data that a file's network was trained with.

    The mean and std are those that were in use, whichever gave them.
    """
    options: dict[str, Any] = state.get("images", {})
    own = is_import(options.get("data"))
    return options | ({} if own else {n: tuple(state[n]) for n in ("mean", "std")})


def check_classes(state: Mapping[str, Any], data: Data) -> None:
    """Raise ValueError where a network's images have other channels, or classes of other names."""
    theirs, ours = state["channels"], data.channels
    if theirs != ours:
        raise ValueError(f"the network takes images of {theirs} channels, the data have {ours}")
    if state["classes"] == data.classes:
        for number, (name, own) in enumerate(zip(state["names"], data.names, strict=True)):
            if name != own:
                raise ValueError(
                    f"class {number} of the network is {name!r}, of the data {own!r}; both must "
                    "have the same classes in the same order (classes of train name one's own)"
                )


def same_images(state: Mapping[str, Any], data: Data) -> str:
    """Return words on what cannot be compared; ValueError where the images are known to differ."""
    check_classes(state, data)
    said, both = "", [(state["mean"], state["std"]), (data.mean, data.std)]
    theirs, ours = (torch.tensor(each, dtype=torch.float64) for each in both)
    if is_import(state.get("images", {}).get("data")) or data.own:
        said = "; whether its images are normalised as these are is not known"
    elif (theirs - ours).abs().max() > 1e-6:
        one, other = (
            "--mean {} --std {}".format(*(",".join(f"{x:.7g}" for x in v) for v in each))
            for each in both
        )
        raise ValueError(
            f"its images are normalised as with {one}, these as with {other}; give the former"
        )
    trained, size = state["image_size"], data.image_size
    return said + f"; it was trained at image size {trained}, here it is {size}" * (trained != size)


# ---- anybody's weights ---------------------------------------------------------------------------


class WeightsFile(NamedTuple):
    """The content of a file, and the key in it that was asked for."""

    name: str
    key: str
    content: Any

    @property
    def state(self) -> dict[str, Any]:
        """The content of a file of this program, else nothing."""
        ours = isinstance(self.content, dict) and self.content.get("what") == "network"
        return self.content if ours else {}


def read_weights(source: str, option: str, network: str = "") -> WeightsFile:
    """Read a file from where people have weights.

    Args:
        source: a file of ``torch.save``, read with ``weights_only=True``, or of safetensors;
            "FILE:KEY" is a part of it; "torchvision" are the weights that torchvision publishes
            for the network.
        option: the name of the source in errors.
        network: a name of ``build``.
    """
    try:
        if source == TORCHVISION:
            published = _published(network)
            return WeightsFile(str(published), "", _content(published))
        file, _, key = source.rpartition(":")
        path, key = (Path(file), key) if file and not Path(source).is_file() else (Path(source), "")
        if not path.is_file():
            raise ValueError("no such file")
        return WeightsFile(source, key, _content(path))
    except checkpoints.CheckpointError as error:
        raise ConfigError(f"{option}: {error}") from error
    except (ValueError, OSError) as error:
        raise ConfigError(f"{option}: {source}: {error}") from error


def open_network(file: WeightsFile, network: str, data: Data) -> tuple[nn.Module, str]:
    """Return the network of any file that was read for --eval, in eval mode, and its name.

    ``network`` is that name, or "" for the one in a file of this program. The channels and classes
    of the data must be the network's.
    """
    state = file.state
    if not (name := network or state.get("network")):
        raise ConfigError(
            f"eval: {file.name} is no network of at-fused-train: name the network whose weights it "
            "has (--student)"
        )
    try:
        if state:
            check_classes(state, data)
    except ValueError as error:
        raise ConfigError(f"eval: {file.name}: {error}") from error
    model = build(name, data.classes, data.channels, "eval")
    weights, _ = find_weights(model, file, "eval", network=name)
    model.load_state_dict(weights, strict=False)
    return model.eval(), name


def find_weights(
    model: nn.Module,
    file: WeightsFile,
    option: str,
    *,
    network: str,
    new_head: bool = False,
    data: Data | None = None,
) -> tuple[dict[str, Tensor], str]:
    """Return a file's weights for ``model.load_state_dict(..., strict=False)``, and words on them.

    Args:
        model: takes them; it stays as it is.
        file: a state_dict, or a dictionary with one that fits. A prefix of names, "module." or
            "student.", is taken off; where several fit, the file's key is one of them.
        option, network: what errors call the file and the model.
        new_head: leave the last layer out where the file's has another number of classes.
        data: the images; a file of this program must have the channels, classes and normalisation.
    """
    try:
        said = same_images(file.state, data) if data and file.state else ""
        own: Any = model.state_dict()
        wanted = {k: v for k, v in own.items() if isinstance(v, Tensor)}
        found = _states(file, next(iter(wanted)))
        weights, line = _best(found, wanted, last_layer(model), file.name, network, new_head)
    except ValueError as error:
        raise ConfigError(f"{option}: {file.name} has no weights of {network}: {error}") from error
    # Safetensors say no version: a file with the tensors of this one is of it.
    own.clear()
    own.update(weights)
    return own, f"{file.name}: {line}{said}"


def _published(network: str) -> Path:
    """Return the file of the weights that torchvision publishes, fetched if it is not there."""
    models = torchvision_models(network, TORCHVISION)
    try:
        known = models.get_model_weights(network.replace("resnet-", "resnet"))
    except ValueError:
        raise ValueError("torchvision publishes no weights of this network") from None
    # The default may be another with another torchvision; the first stays.
    weights = getattr(known, "IMAGENET1K_V1", known.DEFAULT)
    path = Path(torch.hub.get_dir(), "checkpoints", weights.url.rpartition("/")[2])
    if not path.is_file():
        try:
            weights.get_state_dict(progress=sys.stderr.isatty(), check_hash=True)
        except Exception as error:
            raise ValueError(
                f"{weights.url} cannot be fetched ({in_a_line(error)}); put it at {path}"
            ) from error
    return path


def _content(path: Path) -> Any:
    """Return what a file holds: tensors in plain containers; ValueError for anything else."""
    with path.open("rb") as file:
        start = file.read(9)
    # By the content: people give either kind any suffix. Torch's start as an archive or a pickle.
    torchs = start[:2] in (b"PK", b"\x80\x02")
    if not torchs and (path.suffix == ".safetensors" or start[8:] == b"{"):
        try:
            from safetensors.torch import load_file
        except ImportError as error:
            raise ValueError("to read it needs safetensors: pip install safetensors") from error
        try:
            return load_file(path)
        except Exception as error:
            raise ValueError(f"not readable ({in_a_line(error)})") from error
    # Torch tells its older format from an archive by these four bytes, too.
    ours = start[:4] == b"PK\3\4" and _check_archive(path)
    # By its name torch.load would go by the suffix.
    content = io.BytesIO(checkpoints.verify(path)) if ours else path.open("rb")
    with content, _plain_values():
        try:
            return torch.load(content, map_location="cpu", weights_only=True)
        except Exception as error:  # torch's text says to trust the file
            raise ValueError(_objects(path)) from error


def _check_archive(path: Path) -> bool:
    """Tell a file of this program; CheckpointError where records are not those that were written.

    Torch looks at no checksum.
    """
    try:
        with ZipFile(path) as archive:
            if len(archive.comment) == checkpoints.SHA256:
                return True
            bad = archive.testzip()
            # Torch takes a record with this bit for a folder, and what it holds for nothing.
            bad = bad or next((r.filename for r in archive.filelist if r.external_attr & 16), None)
    except Exception as error:  # of a damaged directory as many kinds as it has fields
        raise checkpoints.CheckpointError(
            f"{path}: truncated or damaged ({in_a_line(error)})"
        ) from error
    if bad:
        raise checkpoints.CheckpointError(f"{path}: damaged: the checksum of {bad} is not right")
    return False


@contextmanager
def _plain_values() -> Iterator[None]:
    """Let torch.load read what training programs keep beside weights: arguments, paths, numbers."""
    scalar = np.float64().__reduce__()[0]
    named: list[Any] = [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    named += {type(np.dtype(code)) for code in np.typecodes["AllInteger"] + "?efd"}
    # Pure, because a path of Windows cannot be made elsewhere; Python 3.13 has them in _local.
    for module in ("pathlib", "pathlib._local"):
        for kind in ("PosixPath", "WindowsPath"):
            pure = getattr(pathlib, f"Pure{kind}")
            named += [(pure, f"{module}.{kind}"), (pure, f"{module}.Pure{kind}")]
    named += [argparse.Namespace, np.dtype, torch.torch_version.TorchVersion]
    with torch.serialization.safe_globals(named), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that an archive is torch.jit's
        yield


def _objects(path: Path) -> str:
    """Return why torch.load refuses a file."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:
        names = []
    if not names:
        return (
            "it is damaged, or no dictionary of torch.save: torch.save(model.state_dict(), FILE) "
            "writes one"
        )
    names = sorted(names, key=lambda name: (name.startswith("torch."), name))
    return (
        f"beside tensors it holds {_few(names, 3)}, which may run code; where that can be "
        "imported, torch.save(model.state_dict(), FILE) writes the weights alone"
    )


def _states(file: WeightsFile, first: str) -> dict[str, State]:
    """Return the state_dicts in a file, each by its key, or else by the prefix of its names.

    A dictionary of tensors has one for each prefix of the network's first name in it, or is one as
    a whole. The key that was asked for is a key or a prefix.
    """
    content, key = file.content, file.key
    if key and isinstance(content, Mapping) and key in content:
        content, key = content[key], ""
    states: dict[str, State] = {}
    parts = {"": content, **(content if isinstance(content, Mapping) else {})}
    dictionaries = {name: state for name, part in parts.items() if (state := _tensors(part))}
    for name, state in dictionaries.items():
        prefixes = [k.removesuffix(first) for k in state if f".{k}".endswith(f".{first}")]
        for prefix in prefixes or [""]:
            part = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
            label = name if len(part) == len(state) else prefix.rstrip(".")
            if key in ("", label, prefix.rstrip(".")):
                states[name if label in states else label] = part
    if states:
        return states
    if isinstance(content, Mapping):
        empty = {k for k, v in content.items() if isinstance(v, Mapping) and not v}
        has = _few([f"{k} (empty)" if k in empty else str(k) for k in content], 8) or "nothing"
    else:
        has = f"a {type(content).__name__}"
    lacks = repr(key) if key and dictionaries else "dictionary of tensors alone"
    raise ValueError(f"it has no {lacks}, but {has}")


def _tensors(part: Any) -> dict[str, Tensor]:
    """Return a dictionary of nothing but named tensors; empty for anything else."""
    if not isinstance(part, Mapping):
        return {}
    # Torch's AveragedModel counts in it.
    part = {k: v for k, v in part.items() if k != "n_averaged"}
    plain = all(isinstance(k, str) and isinstance(v, Tensor) for k, v in part.items())
    return part if plain else {}


def _few(names: list[str], count: int) -> str:
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more


def _best(
    states: Mapping[str, State],
    wanted: State,
    head: str,
    source: str,
    network: str,
    new_head: bool,
) -> tuple[dict[str, Tensor], str]:
    """Return the one state_dict that fits, and words on it; ValueError where none does."""
    misfits = {key: _misfits(state, wanted, network) for key, state in states.items()}
    least = min(len(each) for each in misfits.values())
    best = [key for key, each in misfits.items() if len(each) == least]
    state, bad, left = states[best[0]], misfits[best[0]], ""
    if bad:
        if not all(_is_other_head(name, head, state, wanted) for name in bad):
            first = [f"{name} {how}" for name, how in bad.items() if name in wanted][:3]
            if others := [name for name in bad if name not in wanted]:
                first.append(f"{network} has no {_few(others, 3)}")
            raise ValueError(f"{len(bad)} of its tensors do not fit: {'; '.join(first)}")
        name = next(iter(bad))
        theirs, ours = len(state[name]), len(wanted[name])
        if not new_head:
            raise ValueError(f"it has {theirs} classes, the data have {ours}")
        left = f"; its last layer, {head}, is left out ({theirs} classes, here {ours})"
    if len(best) > 1:
        raise ValueError(
            f"it has several that fit, {', '.join(best)}: choose one as {source}:{best[0]}"
        )
    found = {k: v.to(wanted[k].dtype) for k, v in state.items() if k not in bad}
    bad_values = {k: int((~v.isfinite()).sum()) for k, v in found.items()}
    if broken := [name for name, count in bad_values.items() if count]:
        name = broken[0]
        raise ValueError(
            f"NaN or inf in {len(broken)} of its {len(found)} tensors, first in {name} "
            f"({bad_values[name]} of {found[name].numel()} values)"
        )
    for name, value in found.items():
        if name.endswith("running_var") and value.min() < 0:
            raise ValueError(f"{name} has a negative variance, {value.min():g}")
    part = f" of its {best[0]!r}" if best[0] else ""
    return found, f"{len(found)} tensors{part}{left}"


def _misfits(state: State, wanted: State, network: str) -> dict[str, str]:
    """Return the names of what does not fit, and how each does not."""
    found = {}
    for name, own in wanted.items():
        given = state.get(name)
        if given is None:
            if not name.endswith("num_batches_tracked"):
                found[name] = "is missing"
        elif given.is_meta or given.layout != torch.strided:
            found[name] = "has no values (meta)" if given.is_meta else f"is {given.layout}"
        elif given.shape != own.shape:
            found[name] = f"is {tuple(given.shape)}, not {tuple(own.shape)}"
        elif own.is_floating_point() and not given.is_floating_point():
            found[name] = f"is {given.dtype}, not {own.dtype}"
    return found | {name: f"is not in {network}" for name in state if name not in wanted}


def _is_other_head(name: str, head: str, state: State, wanted: State) -> bool:
    """Tell a tensor of the last layer that would fit with another number of classes."""
    if name.rpartition(".")[0] != head or name not in state or name not in wanted:
        return False
    given, own = state[name].shape, wanted[name].shape
    return given[1:] == own[1:] and given[:1] != own[:1]
