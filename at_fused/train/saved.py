"""Files of trained networks: this program's, and weights of other programs."""

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
from at_fused.train.config import Config, ConfigError, error_prefix, error_summary, is_import_path
from at_fused.train.data import Data
from at_fused.train.networks import build, classifier_name, torchvision_models

State = Mapping[str, Tensor]
TORCHVISION = "torchvision"
# Types that training programs save with weights: arguments, paths, and scalars of NumPy 1 and 2.
_SCALAR = np.float64().__reduce__()[0]
SAFE_TYPES: list[Any] = [
    *(argparse.Namespace, PosixPath, torch.torch_version.TorchVersion, np.dtype),
    *((_SCALAR, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    *(type(np.dtype(code)) for code in np.typecodes["AllInteger"] + "?efd"),
]

# ---- this program's files ------------------------------------------------------------------------


# Options of the data set, stored in a network's file.
DATA_OPTIONS = ("data", "root", "image_size", "mean", "std", "evaluate", "skip_unreadable")


def save_network(
    path: Path, side: str, model: nn.Module, data: Data, config: Config, **facts: Any
) -> None:
    """Write a network's weights and a description of the network and its images.

    ``torch.load(path, weights_only=True)["model"]`` is the state_dict. The network expects
    ``(pixels - mean) / std`` for pixels in [0, 1]; its classes are ``names``. ``images`` has the
    DATA_OPTIONS, with root as an absolute path unless it is a function's argument.
    """
    images = {name: getattr(config, name) for name in DATA_OPTIONS}
    if not data.is_custom:
        images["root"] = str(Path(config.root).expanduser().absolute())
    sizes = {name: getattr(data, name) for name in ("classes", "channels", "image_size")}
    lists = {name: list(getattr(data, name)) for name in ("mean", "std", "names")}
    state = {"network": getattr(config, side), **sizes, **lists, "images": images, **facts}
    checkpoints.save(path, "network", {"model": model.state_dict(), **state})


def load_network(path: Path) -> tuple[nn.Module, dict[str, Any]]:
    """Return the network in a file of ``save_network``, in eval mode, and the file's content.

    Imports the module of a MODULE:FUNCTION network.
    """
    state = checkpoints.load(path, "network")
    try:
        model = build(state["network"], state["classes"], state["channels"], str(path))
        model.load_state_dict(state["model"])
    except (KeyError, TypeError, RuntimeError, ConfigError) as error:
        raise checkpoints.CheckpointError(
            f"{path}: not a network of at-fused-train ({str(error).splitlines()[0]})"
        ) from error
    return model.eval(), state


def image_options(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the data options that a network was trained with, with the actual mean and std."""
    options: dict[str, Any] = state.get("images", {})
    is_own = is_import_path(options.get("data"))
    return options | ({} if is_own else {n: tuple(state[n]) for n in ("mean", "std")})


def check_images(state: Mapping[str, Any], data: Data) -> None:
    """Raise ConfigError if a network was trained on other images than ``data``."""
    theirs, ours = state["channels"], data.channels
    if theirs != ours:
        raise ConfigError(f"the network takes images with {theirs} channels, the data have {ours}")
    if state["classes"] == data.classes:
        for number, (name, own) in enumerate(zip(state["names"], data.names, strict=True)):
            if name != own:
                raise ConfigError(
                    f"class {number} is {name!r} in the network, {own!r} in the data; both must "
                    "have the same classes in the same order (train.classes sets your own)"
                )
    if data.is_custom or is_import_path(state.get("images", {}).get("data")):
        return  # their normalisation is unknown
    constants = (state["mean"], state["std"]), (data.mean, data.std)
    if not np.allclose(*constants, rtol=0, atol=1e-6):
        expected, actual = (
            "--mean {} --std {}".format(*(",".join(f"{x:.7g}" for x in v) for v in each))
            for each in constants
        )
        raise ConfigError(f"the network expects {expected}, got {actual}; set the network's values")


# ---- weights of any program ----------------------------------------------------------------------


class WeightsFile(NamedTuple):
    """Content of a file of weights, and the key of the state_dict in it (may be empty)."""

    name: str
    key: str
    content: Any

    @property
    def state(self) -> dict[str, Any]:
        """The content if ``save_network`` wrote the file, else an empty dictionary.

        Files of 0.1.0 have no images: they are only weights.
        """
        is_ours = isinstance(self.content, dict) and self.content.get("what") == "network"
        return self.content if is_ours and "images" in self.content else {}


def read_weights(source: str, option: str, network: str = "") -> WeightsFile:
    """Read a file of weights.

    Args:
        source: a file of ``torch.save``, read with ``weights_only=True``, or NAME.safetensors.
            "FILE:KEY" selects a part of it. "torchvision" means torchvision's weights of the
            network, which are downloaded if needed.
        option: the option to name in errors.
        network: the network's name in ``build``.
    """
    with error_prefix(f"{option}: {source}"):
        if source == TORCHVISION:
            return _torchvision_weights(network)
        file, _, key = source.rpartition(":")
        path, key = (Path(file), key) if file and not Path(source).is_file() else (Path(source), "")
        if not path.is_file():
            raise ConfigError("no such file")
        return WeightsFile(str(path), key, _read_content(path))


def open_network(file: WeightsFile, network: str, data: Data) -> tuple[nn.Module, str]:
    """Return the network for --eval, in eval mode, and its name.

    An empty ``network`` means the one that the file names.
    """
    if not (name := network or file.state.get("network")):
        raise ConfigError(
            f"eval: {file.name} does not name its network; give the network of these weights "
            "(--student)"
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
    """Return a file's weights for ``model.load_state_dict(..., strict=False)``, and a summary.

    Args:
        model: the network that the weights must match; it is not changed.
        file: a state_dict, or nested dictionaries that contain one. Prefixes of names are removed.
            If several match, the file's key selects one.
        option, network: the option and the network to name in errors.
        new_head: skip the last layer if the file has another number of classes.
        data: the images. A file of this program must have their channels, classes and
            normalisation.
    """
    with error_prefix(f"{option}: cannot load {file.name} into {network}"):
        if data and file.state:
            check_images(file.state, data)
        own: Any = model.state_dict()
        expected = {k: v for k, v in own.items() if isinstance(v, Tensor)}
        states = _candidate_states(file, expected)
        head = classifier_name(model)
        weights, summary = _select_state(states, expected, head, file.name, new_head)
    # Keeps _metadata, which safetensors lack: load_state_dict reads the modules' versions from it.
    own.clear()
    own.update(weights)
    return own, f"{file.name}: {summary}"


def _torchvision_weights(network: str) -> WeightsFile:
    """Return torchvision's weights of a network, downloaded if needed."""
    models = torchvision_models(network, TORCHVISION)
    try:
        available = models.get_model_weights(network.replace("resnet-", "resnet"))
    except ValueError:
        raise ConfigError("torchvision has no weights for this network") from None
    # Not DEFAULT, which differs between versions of torchvision.
    weights = getattr(available, "IMAGENET1K_V1", available.DEFAULT)
    path = Path(torch.hub.get_dir(), "checkpoints", weights.url.rpartition("/")[2])
    try:
        options = {"progress": sys.stderr.isatty(), "map_location": "cpu"}
        content = weights.get_state_dict(check_hash=True, weights_only=True, **options)
    except Exception as error:
        raise ConfigError(
            f"cannot download or read {weights.url} ({error_summary(error)}); save it as {path}"
        ) from error
    return WeightsFile(str(path), "", content)


def _read_content(path: Path) -> Any:
    """Return the content of a file; raise ConfigError unless it is tensors in plain containers."""
    read: Callable[[Path], Any] = _read_torch_file
    if path.suffix == ".safetensors":
        try:
            from safetensors.torch import load_file
        except ImportError as error:
            raise ConfigError("requires safetensors: pip install safetensors") from error
        read = load_file
    try:
        return read(path)
    except checkpoints.CheckpointError:
        raise
    except Exception as error:  # torch's message advises to trust the file
        raise ConfigError(
            "unreadable, damaged, or contains more than tensors and plain values; in the program "
            "that wrote it, torch.save(model.state_dict(), FILE) saves the weights only"
        ) from error


def _read_torch_file(path: Path) -> Any:
    """Return the content of a file of torch.save; raise if it is damaged."""
    with path.open("rb") as file:
        is_archive = file.read(4) == b"PK\3\4"
    if is_archive:
        with ZipFile(path) as records:
            if records.comment:  # a digest, or the rest of a truncated one
                return checkpoints.load(path, "network")
            # torch verifies no checksum, and reads a record with this bit as an empty folder.
            if records.testzip() or any(r.external_attr & 16 for r in records.filelist):
                raise ValueError("damaged")
    with torch.serialization.safe_globals(SAFE_TYPES):
        return torch.load(path, map_location="cpu", weights_only=True)


def _named_tensors(content: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield all tensors with values in nested dictionaries, by dotted name."""
    for key, part in content.items() if isinstance(content, Mapping) else ():
        if not isinstance(part, Tensor):
            yield from ((f"{key}.{name}", tensor) for name, tensor in _named_tensors(part))
        elif part.layout == torch.strided and not part.is_meta:
            yield str(key), part


def _candidate_states(file: WeightsFile, expected: State) -> dict[str, State]:
    """Return the parts of a file that contain names of the network, by prefix."""
    tensors = dict(_named_tensors(file.content))
    paths = [name.split(".") for name in tensors]
    prefixes = {
        ".".join(path[:i])
        for path in paths
        for i in range(len(path))
        if ".".join(path[i:]) in expected
    }
    selected = [p for p in sorted(prefixes) if not file.key or f"{p}.".startswith(f"{file.key}.")]
    if not selected:
        names = _join_first([p for p in sorted(prefixes) if p] or [*tensors], 3) or "no tensors"
        raise ConfigError(f"no {file.key or 'tensor with a name of the network'}, only {names}")
    starts = {p: f"{p}." if p else "" for p in selected}
    return {
        p: {k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)}
        for p, start in starts.items()
    }


def _join_first(names: list[str], count: int) -> str:
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more


def _select_state(
    states: Mapping[str, State], expected: State, head: str, source: str, new_head: bool
) -> tuple[dict[str, Tensor], str]:
    """Return the only state_dict that matches, and a summary; raise ConfigError otherwise."""
    mismatches = {key: _mismatches(state, expected) for key, state in states.items()}
    # Matching tensors count first: a part of another network has few mismatches, as it is small.
    scores = {
        key: (len((state.keys() & expected.keys()) - mismatches[key].keys()), -len(mismatches[key]))
        for key, state in states.items()
    }
    best = [key for key, score in scores.items() if score == max(scores.values())]
    state, bad, skipped = states[best[0]], mismatches[best[0]], ""
    if bad:
        shapes = [(state[k].shape, expected[k].shape) for k in bad if k in state and k in expected]
        heads = {f"{head}.weight", f"{head}.bias"}
        resized = [theirs for theirs, ours in shapes if theirs[1:] == ours[1:] and theirs != ours]
        if not bad.keys() <= heads or len(resized) < len(bad):
            reasons = [f"{name} {reason}" for name, reason in bad.items()]
            raise ConfigError(f"{len(bad)} tensors do not match: {_join_first(reasons, 4)}")
        name = next(iter(bad))
        theirs, ours = len(state[name]), len(expected[name])
        if not new_head:
            raise ConfigError(f"it has {theirs} classes, the data have {ours}")
        skipped = f"; skipped its last layer, {head} ({theirs} classes, the data have {ours})"
    if len(best) > 1:
        raise ConfigError(
            f"several state_dicts match, {', '.join(best)}: choose one, such as {source}:{best[0]}"
        )
    weights = {k: v.to(expected[k].dtype) for k, v in state.items() if k not in bad}
    if not_finite := [name for name, value in weights.items() if not value.isfinite().all()]:
        raise ConfigError(f"NaN or inf in {len(not_finite)} tensors: {_join_first(not_finite, 3)}")
    part = f" from {best[0]!r}" if best[0] else ""
    return weights, f"{len(weights)} tensors{part}{skipped}"


def _mismatches(state: State, expected: State) -> dict[str, str]:
    """Return the names of tensors that do not match, with the reason."""
    reasons = {}
    for name, own in expected.items():
        tensor = state.get(name)
        if tensor is None:
            if not name.endswith("num_batches_tracked"):
                reasons[name] = "is missing"
        elif tensor.shape != own.shape:
            reasons[name] = f"has shape {tuple(tensor.shape)}, expected {tuple(own.shape)}"
        elif own.is_floating_point() and not tensor.is_floating_point():
            reasons[name] = f"has dtype {tensor.dtype}, expected {own.dtype}"
    return reasons | {name: "is unexpected" for name in state if name not in expected}
