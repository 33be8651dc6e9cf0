"""Trained networks as files: weights, and what builds the network that they fit."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PosixPath
from typing import Any, NamedTuple
from zipfile import ZipFile

import numpy as np
import torch
from torch import Tensor, nn

from at_fused.train import checkpoints
from at_fused.train.config import Config, ConfigError, in_a_line, is_import, naming
from at_fused.train.data import Data
from at_fused.train.networks import build, last_layer, torchvision_models

State = Mapping[str, Tensor]
TORCHVISION = "torchvision"
# Kinds of what training programs keep beside weights: arguments, paths, numbers, also of NumPy 1.
_SCALAR = np.float64().__reduce__()[0]
PLAIN: list[Any] = [
    *(argparse.Namespace, PosixPath, torch.torch_version.TorchVersion, np.dtype),
    *((_SCALAR, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    *(type(np.dtype(code)) for code in np.typecodes["AllInteger"] + "?efd"),
]

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
    sizes = {name: getattr(data, name) for name in ("classes", "channels", "image_size")}
    lists = {name: list(getattr(data, name)) for name in ("mean", "std", "names")}
    made = {"network": getattr(config, side), **sizes, **lists, "images": images, **facts}
    checkpoints.save(path, "network", {"model": model.state_dict(), **made})


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


def check_images(state: Mapping[str, Any], data: Data) -> None:
    """Raise ConfigError where a network is known to be of other images than the data have."""
    theirs, ours = state["channels"], data.channels
    if theirs != ours:
        raise ConfigError(f"the network takes images of {theirs} channels, the data have {ours}")
    if state["classes"] == data.classes:
        for number, (name, own) in enumerate(zip(state["names"], data.names, strict=True)):
            if name != own:
                raise ConfigError(
                    f"class {number} of the network is {name!r}, of the data {own!r}; both must "
                    "have the same classes in the same order (classes of train name one's own)"
                )
    if data.own or is_import(state.get("images", {}).get("data")):
        return  # nobody knows how they were normalised
    known, given = (state["mean"], state["std"]), (data.mean, data.std)
    if not np.allclose(known, given, rtol=0, atol=1e-6):
        one, other = (
            "--mean {} --std {}".format(*(",".join(f"{x:.7g}" for x in v) for v in each))
            for each in (known, given)
        )
        raise ConfigError(
            f"its images are normalised as with {one}, these as with {other}; give the former"
        )


# ---- anybody's weights ---------------------------------------------------------------------------


class WeightsFile(NamedTuple):
    """The content of a file, and the part of it that was asked for."""

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
        source: a file of ``torch.save``, read with ``weights_only=True``, or NAME.safetensors;
            "FILE:KEY" is a part of it; "torchvision" are the weights that torchvision publishes
            for the network.
        option: the name of the source in errors.
        network: a name of ``build``.
    """
    with naming(f"{option}: {source}"):
        if source == TORCHVISION:
            return _published(network)
        file, _, key = source.rpartition(":")
        path, key = (Path(file), key) if file and not Path(source).is_file() else (Path(source), "")
        if not path.is_file():
            raise ConfigError("no such file")
        return WeightsFile(str(path), key, _content(path))


def open_network(file: WeightsFile, network: str, data: Data) -> tuple[nn.Module, str]:
    """Return the network of any file that was read for --eval, in eval mode, and its name.

    ``network`` is that name, or "" for the one in a file of this program.
    """
    if not (name := network or file.state.get("network")):
        raise ConfigError(
            f"eval: {file.name} is no network of at-fused-train: name the network whose weights it "
            "has (--student)"
        )
    model = build(name, data.classes, data.channels, "eval")
    weights, _ = find_weights(model, file, "eval", network=name, data=data)
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
        file: a state_dict, or dictionaries with one that fits. Prefixes of names come off; where
            several fit, the file's key is the prefix of one.
        option, network: what errors call the file and the model.
        new_head: leave the last layer out where the file's has another number of classes.
        data: the images; a file of this program must have the channels, classes and normalisation.
    """
    with naming(f"{option}: {file.name} has no weights of {network}"):
        if data and file.state:
            check_images(file.state, data)
        own: Any = model.state_dict()
        wanted = {k: v for k, v in own.items() if isinstance(v, Tensor)}
        weights, line = _best(_states(file, wanted), wanted, last_layer(model), file.name, new_head)
    # Safetensors say no version: a file with the tensors of this one is of it.
    own.clear()
    own.update(weights)
    return own, f"{file.name}: {line}"


def _published(network: str) -> WeightsFile:
    """Return the weights that torchvision publishes, fetched if they are not there."""
    models = torchvision_models(network, TORCHVISION)
    try:
        known = models.get_model_weights(network.replace("resnet-", "resnet"))
    except ValueError:
        raise ConfigError("torchvision publishes no weights of this network") from None
    # The default may be another with another torchvision; the first stays.
    weights = getattr(known, "IMAGENET1K_V1", known.DEFAULT)
    path = Path(torch.hub.get_dir(), "checkpoints", weights.url.rpartition("/")[2])
    try:
        shown = {"progress": sys.stderr.isatty(), "map_location": "cpu"}
        content = weights.get_state_dict(check_hash=True, weights_only=True, **shown)
    except Exception as error:
        raise ConfigError(
            f"{weights.url} cannot be fetched or read ({in_a_line(error)}); put it at {path}"
        ) from error
    return WeightsFile(str(path), "", content)


def _content(path: Path) -> Any:
    """Return what a file holds: tensors in plain containers; ConfigError for anything else."""
    read: Callable[[Path], Any] = _read_torchs
    if path.suffix == ".safetensors":
        try:
            from safetensors.torch import load_file
        except ImportError as error:
            raise ConfigError("to read it needs safetensors: pip install safetensors") from error
        read = load_file
    try:
        return read(path)
    except checkpoints.CheckpointError:
        raise
    except Exception as error:  # torch's text says to trust the file
        raise ConfigError(
            "it is unreadable, damaged, or holds other than tensors and plain values; where its "
            "program runs, torch.save(model.state_dict(), FILE) writes the weights alone"
        ) from error


def _read_torchs(path: Path) -> Any:
    """Read a file of torch.save; an error of some kind where it is damaged."""
    with path.open("rb") as file:
        archive = file.read(4) == b"PK\3\4"
    if archive:
        with ZipFile(path) as records:
            if records.comment:  # a digest, or what a cut has left of it
                return checkpoints.load(path, "network")
            # Torch looks at no checksum, and takes a record with this bit for an empty folder.
            if records.testzip() or any(r.external_attr & 16 for r in records.filelist):
                raise ValueError("damaged")
    with torch.serialization.safe_globals(PLAIN):
        return torch.load(path, map_location="cpu", weights_only=True)


def _named(content: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors that have values, of dictionaries in each other, by dotted names."""
    for key, part in content.items() if isinstance(content, Mapping) else ():
        if not isinstance(part, Tensor):
            yield from ((f"{key}.{name}", tensor) for name, tensor in _named(part))
        elif part.layout == torch.strided and not part.is_meta:
            yield str(key), part


def _states(file: WeightsFile, wanted: State) -> dict[str, State]:
    """Return the parts of a file in which names of the network are, by the prefix of all names."""
    tensors = dict(_named(file.content))
    paths = [name.split(".") for name in tensors]
    found = {
        ".".join(path[:i])
        for path in paths
        for i in range(len(path))
        if ".".join(path[i:]) in wanted
    }
    asked = [p for p in sorted(found) if not file.key or f"{p}.".startswith(f"{file.key}.")]
    if not asked:
        has = _few([p for p in sorted(found) if p] or [*tensors], 3) or "no tensors"
        raise ConfigError(f"it has no {file.key or 'tensor of such a name'}, but {has}")
    starts = {p: f"{p}." if p else "" for p in asked}
    return {
        p: {k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)}
        for p, start in starts.items()
    }


def _few(names: list[str], count: int) -> str:
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more


def _best(
    states: Mapping[str, State], wanted: State, head: str, source: str, new_head: bool
) -> tuple[dict[str, Tensor], str]:
    """Return the one state_dict that fits, and words on it; ConfigError where none does."""
    misfits = {key: _misfits(state, wanted) for key, state in states.items()}
    # First by the tensors that fit: a part of another network misses few, and has few.
    fits = {
        key: (len((state.keys() & wanted.keys()) - misfits[key].keys()), -len(misfits[key]))
        for key, state in states.items()
    }
    best = [key for key, each in fits.items() if each == max(fits.values())]
    state, bad, left = states[best[0]], misfits[best[0]], ""
    if bad:
        shapes = [(state[k].shape, wanted[k].shape) for k in bad if k in state and k in wanted]
        heads = {f"{head}.weight", f"{head}.bias"}
        resized = [given for given, own in shapes if given[1:] == own[1:] and given != own]
        if not bad.keys() <= heads or len(resized) < len(bad):
            all_bad = [f"{name} {how}" for name, how in bad.items()]
            raise ConfigError(f"{len(bad)} of its tensors do not fit: {_few(all_bad, 4)}")
        name = next(iter(bad))
        theirs, ours = len(state[name]), len(wanted[name])
        if not new_head:
            raise ConfigError(f"it has {theirs} classes, the data have {ours}")
        left = f"; its last layer, {head}, is left out ({theirs} classes, here {ours})"
    if len(best) > 1:
        raise ConfigError(
            f"it has several that fit, {', '.join(best)}: choose one as {source}:{best[0]}"
        )
    found = {k: v.to(wanted[k].dtype) for k, v in state.items() if k not in bad}
    if broken := [name for name, value in found.items() if not value.isfinite().all()]:
        raise ConfigError(f"NaN or inf in {len(broken)} of its tensors: {_few(broken, 3)}")
    part = f" of its {best[0]!r}" if best[0] else ""
    return found, f"{len(found)} tensors{part}{left}"


def _misfits(state: State, wanted: State) -> dict[str, str]:
    """Return the names of what does not fit, and how each does not."""
    found = {}
    for name, own in wanted.items():
        given = state.get(name)
        if given is None:
            if not name.endswith("num_batches_tracked"):
                found[name] = "is missing"
        elif given.shape != own.shape:
            found[name] = f"is {tuple(given.shape)}, not {tuple(own.shape)}"
        elif own.is_floating_point() and not given.is_floating_point():
            found[name] = f"is {given.dtype}, not {own.dtype}"
    return found | {name: "is not in the network" for name in state if name not in wanted}
