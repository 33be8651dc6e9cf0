"""Trained networks as files: weights, and what builds the network that they fit."""

from __future__ import annotations

import argparse
import json
import pathlib
import re
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import numpy as np
import torch
from torch import Tensor, nn

from at_fused.train import checkpoints
from at_fused.train.data import Data
from at_fused.train.networks import build, last_layer, torchvision_models
from at_fused.train.rules import ConfigError, in_a_line, is_import

# Prefixes of nn.DataParallel and DistributedDataParallel, torch.compile, and Lightning's modules.
PREFIXES = ("module.", "_orig_mod.", "model.")
TORCHVISION = "torchvision"

# ---- this program's files ------------------------------------------------------------------------


# Options that a data set is opened by, as a network's file has them.
DATA_OPTIONS = ("data", "root", "image_size", "mean", "std", "evaluate", "skip_unreadable")


def save_network(path: Path, name: str, model: nn.Module, data: Data, **facts: Any) -> None:
    """Write weights, what builds the network that they fit, what its images are, and a few facts.

    ``torch.load(path, weights_only=True)["model"]`` is the plain state_dict. The network takes
    ``(pixels - mean) / std`` of pixels in [0, 1], and its classes are ``names``. ``images`` are
    the DATA_OPTIONS; a root is kept as an absolute path, unless it is a function's argument.
    """
    images = dict(facts.pop("images", {}))
    if images.get("root") and not data.own:
        images["root"] = str(Path(images["root"]).expanduser().absolute())
    network = {
        "network": name,
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

    Raises:
        CheckpointError: the file is damaged, or another.
    """
    state = checkpoints.load(path, "network")
    try:
        model = build(state["network"], state["classes"], state["channels"], str(path))
        model.load_state_dict(state["model"])
    except (KeyError, TypeError, RuntimeError, ConfigError) as error:
        reason = str(error).splitlines()[0]
        raise checkpoints.CheckpointError(f"{path}: no network of at-fused-train ({reason})") from (
            error
        )
    return model.eval(), state


def data_options(path: str | Path) -> dict[str, Any]:
    """Return the options of the data that a file's network was trained with; {} of other files.

    The mean and std are those that were in use, whichever gave them.

    Raises:
        CheckpointError: the file is damaged.
    """
    file = Path(path)
    if not file.is_file() or not _ours(file):
        return {}
    state = checkpoints.load(file, "network")
    options: dict[str, Any] = state.get("images", {})
    own = is_import(options.get("data"))
    return options | ({} if own else {n: tuple(state[n]) for n in ("mean", "std")})


def _first_difference(state: Mapping[str, Any], data: Data) -> str:
    """Return how the images that a file's network takes differ from the data's; "" of the same."""
    theirs, ours = state["channels"], data.channels
    if theirs != ours:
        return f"the network takes images of {theirs} channels, the data have {ours}"
    if state["classes"] == data.classes:
        for number, (name, own) in enumerate(zip(state["names"], data.names, strict=True)):
            if name != own:
                return (
                    f"class {number} of the network is {name!r}, of the data {own!r}; both must "
                    "have the same classes in the same order (classes of train name one's own)"
                )
    return ""


def same_images(state: Mapping[str, Any], data: Data) -> str:
    """Return words on what cannot be compared; ValueError where the images are known to differ."""
    if differs := _first_difference(state, data):
        raise ValueError(differs)
    (mean, std), own = (state["mean"], state["std"]), (data.mean, data.std)
    said = ""
    if is_import(state.get("images", {}).get("data")) or data.own:
        said += "; whether its images are normalised as these are is not known"
    elif max(abs(a - b) for a, b in zip(mean + std, own[0] + own[1], strict=True)) > 1e-6:
        theirs, ours = (
            " ".join(
                f"--{k} {','.join(f'{x:.7g}' for x in v)}" for k, v in (("mean", m), ("std", s))
            )
            for m, s in ((mean, std), own)
        )
        raise ValueError(
            f"its images are normalised as with {theirs}, these as with {ours}; give the former"
        )
    if state["image_size"] != data.image_size:
        said += (
            f"; it was trained at image size {state['image_size']}, here it is {data.image_size}"
        )
    return said


def open_network(
    path: str | Path, network: str = "", data: Data | None = None, option: str = "eval"
) -> tuple[nn.Module, dict[str, Any]]:
    """Return a network from any file of weights, in eval mode, and what is known of it.

    Args:
        path: a file of this program, which says what its network is, or one that ``load_weights``
            takes, for which the rest must be given.
        network, data: as in ``build``, and the images; where given, a file of this program must
            agree in its network's name, the channels and the classes.
        option: what errors call the path.

    Returns:
        The network, and the content of this program's file; of another ``network``, ``classes``,
        ``channels`` and ``loaded``, the line of ``load_weights``.

    Raises:
        CheckpointError, ConfigError: the file cannot be read, or does not agree.
    """
    source = str(path)
    try:
        file, key = _place(source, network)
    except (ValueError, OSError) as error:
        raise ConfigError(f"{option}: {source}: {error}") from error
    if not key and _ours(file):
        model, state = load_network(file)
        differs = _first_difference(state, data) if data else ""
        for name, value in {"network": network, "classes": data and data.classes}.items():
            if value and value != state[name] and not differs:
                differs = f"has {name} {state[name]!r}, wanted is {value!r}"
        if differs:
            raise ConfigError(f"{option}: {source}: {differs}")
        return model, state
    if not network or not data:
        raise ConfigError(
            f"{option}: {source} is no network of at-fused-train: name the network whose weights "
            "it has"
        )
    wanted = {"network": network, "classes": data.classes, "channels": data.channels}
    model = build(network, data.classes, data.channels, option)
    line = load_weights(model, source, option, network=network)
    return model.eval(), {**wanted, "loaded": line}


def compared_layers(folder: Path, side: str) -> list[str]:
    """The layers of a run's students, or of its teacher, that it compares."""
    pairs = json.loads((folder / "run.json").read_text(encoding="utf-8"))["layers"]
    return [pair[side == "teacher"] for pair in pairs]


# ---- anybody's weights ---------------------------------------------------------------------------


def load_weights(
    model: nn.Module,
    source: str,
    option: str,
    *,
    network: str,
    new_head: bool = False,
    data: Data | None = None,
) -> str:
    """Load weights from where people have them, or nothing.

    Args:
        model: what takes them.
        source: a file of ``torch.save`` or of safetensors: a state_dict, or a dictionary with one
            that fits; "FILE:KEY" says which of several. "torchvision": those that torchvision
            publishes for the network. A prefix of names, "module." or "student.", is taken off;
            where several fit, KEY is one of them. Files are read with ``weights_only=True``.
        option: what errors call the source.
        network: what errors call the model; a name of ``build``.
        new_head: leave the last layer as it is where the file's has another number of classes.
        data: the images; a file of this program must have the channels, classes and normalisation.

    Returns:
        A line that says what was loaded, and what was not.

    Raises:
        ConfigError: the source has no weights that fit, has several, has NaN, inf or a negative
            variance in them, or is of other images.
    """
    try:
        path, key = _place(source, network)
        found, said = _content(path), ""
        if data and _is_ours(found):
            said = same_images(found, data)
        loaded = _fit(model, _states(found, key), source, network, new_head)
        return f"{path if source == TORCHVISION else source}: {loaded}{said}"
    except checkpoints.CheckpointError as error:
        raise ConfigError(f"{option}: {error}") from error
    except (ValueError, OSError) as error:
        raise ConfigError(f"{option}: {source} has no weights of {network}: {error}") from error


def _place(source: str, network: str) -> tuple[Path, str]:
    """Return the file, and the key in it."""
    if source == TORCHVISION:
        return _published(network), ""
    file, _, key = source.rpartition(":")
    path, key = (Path(file), key) if file and not Path(source).is_file() else (Path(source), "")
    if not path.is_file():
        raise ValueError("no such file")
    return path, key


def _published(network: str) -> Path:
    """Return the file of the weights that torchvision publishes, fetched if it is not there."""
    models = torchvision_models(network, TORCHVISION)
    try:
        known = models.get_model_weights(network.replace("resnet-", "resnet"))
    except ValueError:
        raise ValueError("torchvision publishes none of this network") from None
    # The default may be another with another torchvision; the first stays.
    url: str = getattr(known, "IMAGENET1K_V1", known.DEFAULT).url
    path = Path(torch.hub.get_dir(), "checkpoints", url.rpartition("/")[2])
    if not path.is_file():
        digest = re.search(r"-([0-9a-f]{8})\.", path.name)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(
                url, str(path), digest[1] if digest else None, progress=sys.stderr.isatty()
            )
        except Exception as error:
            raise ValueError(
                f"{url} cannot be fetched ({in_a_line(error)}); put it at {path}"
            ) from error
    return path


def _content(path: Path) -> Any:
    """Return what a file holds: tensors in plain containers.

    Raises:
        CheckpointError: the file is damaged.
        ValueError: it is no file of torch.save or safetensors, or holds objects.
    """
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
    _check_records(path)
    with _plain_values(), path.open("rb") as file:  # by its name torch.load would go by the suffix
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # torch's text says to trust the file
            raise ValueError(_objects(path)) from error


def _check_records(path: Path) -> None:
    """Raise CheckpointError if an archive's records are not those that were written."""
    with path.open("rb") as file:
        if file.read(4) != b"PK\3\4":  # torch.load tells its older format by these, too
            return
    try:
        with ZipFile(path) as archive:
            bad = archive.testzip()
            # Torch takes a record with this bit for a folder, and what it holds for nothing.
            bad = bad or next((r.filename for r in archive.filelist if r.external_attr & 16), None)
            ours = len(archive.comment) == checkpoints.SHA256
    except Exception as error:  # of a damaged directory as many kinds as it has fields
        raise checkpoints.CheckpointError(
            f"{path}: truncated or damaged ({in_a_line(error)})"
        ) from error
    if bad:
        raise checkpoints.CheckpointError(f"{path}: damaged: the checksum of {bad} is not right")
    if ours:
        checkpoints.verify(path)


def _ours(path: Path) -> bool:
    try:
        found = _content(path)
    except (ValueError, OSError):
        return False
    return _is_ours(found)


def _is_ours(found: Any) -> bool:
    return isinstance(found, dict) and found.get("what") == "network"


@contextmanager
def _plain_values() -> Iterator[None]:
    """Let torch.load read what training programs keep beside weights: arguments, paths, numbers."""
    kinds = {type(np.dtype(code)) for code in np.typecodes["AllInteger"] + "?efd"}
    scalar = np.float64().__reduce__()[0]
    posix, windows = pathlib.PurePosixPath, pathlib.PureWindowsPath
    named: list[Any] = [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    # Pure, because a path of Windows cannot be made elsewhere; Python 3.13 has them in _local.
    for module in ("pathlib", "pathlib._local"):
        for kind, system in ((posix, "Posix"), (windows, "Windows")):
            named += [(kind, f"{module}.{pure}{system}Path") for pure in ("", "Pure")]
    named += [argparse.Namespace, np.dtype, torch.torch_version.TorchVersion, *kinds]
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


def _states(found: Any, key: str) -> dict[str, dict[str, Tensor]]:
    """Return the dictionaries of tensors in what a file holds, by key; "" is the whole.

    A key may also be a prefix of their names.
    """
    prefix = ""
    if key and isinstance(found, Mapping) and key in found:
        found = found[key]
    elif key:
        prefix = f"{key}."
    parts = {"": found, **(found if isinstance(found, Mapping) else {})}
    states = {}
    for name, part in parts.items():
        if isinstance(part, Mapping):
            # Torch's AveragedModel counts in it.
            part = {k: v for k, v in part.items() if k != "n_averaged"}
            if part and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in part.items()):
                states[name] = _under(part, prefix)
    if prefix and not any(states.values()):
        raise ValueError(f"it has no {key!r}, but {_keys(found)}")
    if not states:
        raise ValueError(f"it has no dictionary of tensors alone, but {_keys(found)}")
    return states


def _keys(found: Any) -> str:
    if not isinstance(found, Mapping):
        return f"a {type(found).__name__}"
    named = [
        f"{k} (empty)" if isinstance(v, Mapping) and not v else str(k) for k, v in found.items()
    ]
    return _few(named, 8) or "nothing"


def _under(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the part of a state_dict whose names have a prefix, without it."""
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def _few(names: list[str], count: int) -> str:
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more


def _bare(state: dict[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state_dict without the prefixes that all its names have, and not all of wanted."""
    for prefix in PREFIXES * 3:
        if all(k.startswith(prefix) for k in state) and not all(
            k.startswith(prefix) for k in wanted
        ):
            state = _under(state, prefix)
    return state


def _within(
    states: Mapping[str, dict[str, Tensor]], head: str, wanted: Mapping[str, Tensor], network: str
) -> dict[str, dict[str, Tensor]]:
    """Return the parts of state_dicts that fit once a prefix is taken off, by prefix or key."""
    found = {}
    first = f".{next(iter(wanted))}"
    for key, state in states.items():
        for name in [k.removesuffix(first) for k in state if k.endswith(first)]:
            part = _under(state, f"{name}.")
            if _only_the_head(head, _misfits(part, wanted, network), part, wanted):
                found[key if name in found else name] = part
    return found


def _fit(
    model: nn.Module,
    states: dict[str, dict[str, Tensor]],
    source: str,
    network: str,
    new_head: bool,
) -> str:
    """Load the one state_dict that fits; what that was."""
    own: Any = model.state_dict()
    wanted = {k: v for k, v in own.items() if isinstance(v, Tensor)}
    states = {key: _bare(state, wanted) for key, state in states.items()}
    head = last_layer(model)
    misfits = {key: _misfits(state, wanted, network) for key, state in states.items()}
    if not any(_only_the_head(head, bad, states[key], wanted) for key, bad in misfits.items()):
        states = _within(states, head, wanted, network) or states
        misfits = {key: _misfits(state, wanted, network) for key, state in states.items()}
    least = min(len(each) for each in misfits.values())
    best = [key for key, each in misfits.items() if len(each) == least]
    state, bad, left = states[best[0]], misfits[best[0]], ""
    if bad:
        if not _only_the_head(head, bad, state, wanted):
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
    loaded = {k: v.to(wanted[k].dtype) for k, v in state.items() if k not in bad}
    broken = {k: int((~v.isfinite()).sum()) for k, v in loaded.items()}
    broken = {k: count for k, count in broken.items() if count}
    if broken:
        name, count = next(iter(broken.items()))
        raise ValueError(
            f"NaN or inf in {len(broken)} of its {len(loaded)} tensors, first in {name} "
            f"({count} of {loaded[name].numel()} values)"
        )
    for name, value in loaded.items():
        if name.endswith("running_var") and value.min() < 0:
            raise ValueError(f"{name} has a negative variance, {value.min():g}")
    # Safetensors say no version: a file with the tensors of this one is of it.
    own.clear()
    own.update(loaded)
    model.load_state_dict(own, strict=False)
    part = f" of its {best[0]!r}" if best[0] else ""
    return f"{len(loaded)} tensors{part}{left}"


def _misfits(
    state: Mapping[str, Tensor], wanted: Mapping[str, Tensor], network: str
) -> dict[str, str]:
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
    found |= {name: f"is not in {network}" for name in state if name not in wanted}
    return found


def _only_the_head(
    head: str, bad: Mapping[str, str], state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]
) -> bool:
    """Tell a state_dict that fits, or would with another number of classes."""
    return all(
        name.rpartition(".")[0] == head
        and name in state
        and name in wanted
        and state[name].shape[1:] == wanted[name].shape[1:]
        and state[name].shape[:1] != wanted[name].shape[:1]
        for name in bad
    )
