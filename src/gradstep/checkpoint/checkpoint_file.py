"""A checkpoint by the path of its file, or of its index, and finding the newest of a folder."""

import contextlib
import functools
import hashlib
import json
import os
import warnings
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gradstep.arrays.stored import Bits, bits_of, dtype_of
from gradstep.checkpoint import tensors as reading
from gradstep.checkpoint.container import CODES, Container, Tensor, write
from gradstep.checkpoint.files import replacing
from gradstep.checkpoint.making import make
from gradstep.checkpoint.nodes import Document, from_json, keys_of, step_of
from gradstep.checkpoint.restore import prepare
from gradstep.checkpoint.sharded_file import (
    DIGEST,
    DOCUMENT,
    INDEX,
    PART,
    Index,
    ReplacedError,
    ShardTensors,
    digest_of,
)
from gradstep.checkpoint.shards import cleaning
from gradstep.checkpoint.snapshot import Snapshot
from gradstep.checkpoint.tensors import FileTensors, SavedTensors
from gradstep.checkpoint.values import Functions
from gradstep.errors import ArgumentTypeError, CheckpointError, ConfigurationError, OutOfRangeError, listing
from gradstep.optimizer import Optimizer
from gradstep.persistence import Loading
from gradstep.rules.base import RuleOptimizer

Path_ = str | os.PathLike[str]

HASHES = "gradstep.sha256"
ATTEMPTS = 10  # to find a checkpoint that is not saved anew while it is read
NOT_SAVED = "its header is not what was saved"


def save(path: Path_, content: Snapshot, keep: int | None) -> None:
    """Write a checkpoint and put it in the place of `path`; see `Optimizer.save`."""
    tensors = [
        Tensor(key, dtype_of(array), tuple(array.shape), functools.partial(bits_of, array, repr(key)))
        for key, array in content.arrays.items()
    ]
    _write_whole(path, content.document, tensors, checked_keep(keep))


def _write_whole(path: Path_, document: Document, tensors: Sequence[Tensor], keep: int) -> None:
    text = _text_of(document)
    forms = {tensor.key: (tensor.dtype, tensor.shape) for tensor in tensors}

    def metadata(hashes: Mapping[str, str]) -> dict[str, str]:
        found = {DOCUMENT: text, HASHES: json.dumps(hashes, separators=(",", ":"))}
        return {**found, DIGEST: _digest(found, forms)}

    with replacing(path, keep, cleaning(path)) as file:
        write(file, tensors, metadata)


def save_index(path: Path_, document: Document, index: Index, keep: int) -> None:
    """Write the index of shards that are there already, and put it in the place of `path`.

    Shards that no index in the folder names any more are removed.
    """
    found = {DOCUMENT: _text_of(document), INDEX: index.to_json()}
    with replacing(path, keep, cleaning(path)) as file:
        write(file, [], lambda _: {**found, DIGEST: digest_of(found)})


def merge(index: Path_, path: Path_, progress: Callable[[int], object] = lambda _: None) -> None:
    """Write what an index and its shards hold as one file, with one tensor at a time in memory.

    `progress` is told the bytes of each tensor.
    """
    with opened(index) as file:

        def bits(key: str) -> Bits:
            stored = reading.read(file.tensors, key)
            progress(stored.bits.nbytes)
            return stored.bits

        shapes = {key: file.tensors.shape(key) for key in file.tensors.all_keys()}
        tensors = [Tensor(key, *shape, functools.partial(bits, key)) for key, shape in shapes.items()]
        _write_whole(path, file.document, tensors, keep=1)


def _text_of(document: Document) -> str:
    return json.dumps(document.to_json(), allow_nan=False, separators=(",", ":"))


def checked_keep(keep: int | None) -> int:
    """How many files to keep."""
    if keep is None:
        return 1
    if isinstance(keep, bool) or not hasattr(keep, "__index__"):
        raise ArgumentTypeError(f"keep must be a whole number of files, the new one included, got {keep!r}")
    if keep < 1:
        raise OutOfRangeError(f"keep must be at least 1, the new file, got {keep}")
    return int(keep)


def _digest(metadata: Mapping[str, str], forms: Mapping[str, tuple[str, tuple[int, ...]]]) -> str:
    """The SHA-256 of all that a header says, whatever the order of its entries."""
    tensors = sorted([key, CODES[dtype], list(shape)] for key, (dtype, shape) in forms.items())
    content: list[Any] = [metadata[DOCUMENT], metadata[HASHES], tensors]
    return hashlib.sha256(json.dumps(content, separators=(",", ":")).encode()).hexdigest()


def load(
    path: Path_, params: object = None, *, like: object = None, rules: Iterable[type[RuleOptimizer]] = (),
    functions: Functions | None = None,
) -> Optimizer:  # fmt: skip
    """Make the optimizer that a file was saved from, and go on where it stood, bit for bit.

    Args:
        path: the file, or the index that a `Sharded` optimizer wrote.
        params: parameters to be overwritten with those of the file. Default: the file's are left alone.
        like: parameters, of whose library and in whose layout and place the state is made. Default: `params`, or else
            those of the next step.
        rules: classes that `@gs.rule` made, where the file is of such optimizers; the rest is gradstep's.
        functions: schedules, filters and configuration of yours that the file only names, by these names.

    Returns:
        A new optimizer.

    Raises:
        CheckpointError: the file is damaged, or no checkpoint.
        MismatchError: the file does not fit `params` or `like`; lists all differences.
        ConfigurationError: the file names rules or functions that are not given.
        OSError: the file cannot be read.

    Example:
        >>> import gradstep as gs, numpy as np, tempfile
        >>> path = tempfile.mkdtemp() + "/run.safetensors"
        >>> gs.Lion(gs.cosine_decay(1e-4, 100), weight_decay=0.1).save(path)
        >>> gs.load(path)
        Lion(learning_rate=cosine_decay(init=0.0001, decay_steps=100, end=0.0), betas=(0.9, 0.99), weight_decay=0.1)
    """
    with opened(path) as file:
        if params is None and like is None:
            file.warn_of_parameters(stacklevel=2)
        node = file.document.optimizer
        optimizer = make(node, _checked_rules(rules), functions or {}, file.tensors.name)
        loading = Loading(params, like, strict=True, whose="file", functions=functions or {})
        prepare(optimizer, node, file.document, file.tensors, loading).adopt()
        return optimizer


class NoCheckpointError(CheckpointError):
    """A whole file that holds something else."""


class CheckpointFile(NamedTuple):
    """A checkpoint opened for reading. Its header is what was saved; tensors are verified when they are read."""

    document: Document
    tensors: SavedTensors
    digest: str

    def warn_of_parameters(self, stacklevel: int) -> None:
        """Warn that parameters are left where they are."""
        if self.document.parameters:
            warnings.warn(
                f"{self.tensors.name} holds the parameters too, and they are not loaded: pass params to overwrite "
                "yours with them, or like=params if yours are right already",
                stacklevel=stacklevel + 1,
            )


def _checked_rules(rules: Iterable[type[RuleOptimizer]]) -> dict[str, type[RuleOptimizer]]:
    if isinstance(rules, type):
        raise ArgumentTypeError(f"rules must be a list of classes: write [{rules.__name__}]")
    known: dict[str, type[RuleOptimizer]] = {}
    for rule in rules:
        if not isinstance(rule, type):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ArgumentTypeError(f"rules must hold the classes that @gs.rule made, got {rule!r}")
        if known.setdefault(rule.__name__, rule) is not rule:
            raise ConfigurationError(f"rules has two classes named {rule.__name__}; pass the one that the file is of")
    return known


@contextlib.contextmanager
def opened(path: Path_) -> Generator[CheckpointFile]:
    """Open a checkpoint.

    Raises:
        CheckpointError: the file is damaged, or no checkpoint of gradstep's.
        OSError: it cannot be read.
    """
    with Container(path) as container:
        metadata = container.metadata
        if PART in metadata:
            raise NoCheckpointError(f"{path} is {metadata[PART]}; pass the path of that")
        if DOCUMENT not in metadata:
            raise NoCheckpointError(
                f"{path} is a safetensors file, but no checkpoint of gradstep's: its metadata lacks {DOCUMENT!r}"
            )
        if INDEX in metadata:
            with _opened_index(container) as file:
                yield file
            return
        absent = [name for name in (HASHES, DIGEST) if name not in metadata]
        forms = {key: (extent.dtype, extent.shape) for key, extent in container.tensors.items()}
        if absent or _digest(metadata, forms) != metadata[DIGEST]:
            raise container.damaged(NOT_SAVED)
        hashes = container.parsed(metadata[HASHES], "its list of hashes")
        if hashes.keys() != forms.keys():
            raise container.damaged("it describes other tensors than it holds: hashes")
        yield _checked(container, FileTensors(container, hashes))


@contextlib.contextmanager
def _opened_index(container: Container) -> Generator[CheckpointFile]:
    if container.tensors or container.metadata.get(DIGEST) != digest_of(container.metadata):
        raise container.damaged(NOT_SAVED)
    with ShardTensors(container) as tensors:
        yield _checked(container, tensors)


def _checked(container: Container, tensors: SavedTensors) -> CheckpointFile:
    document = from_json(container.parsed(container.metadata[DOCUMENT], "its description of the optimizer"))
    lacking = (keys_of(document.optimizer) | set(document.parameters.values())) - set(tensors.all_keys())
    if lacking:
        raise container.damaged(f"it describes other tensors than it holds: {sorted(lacking)[:8]}")
    return CheckpointFile(document, tensors, container.metadata[DIGEST])


def verify(path: Path_) -> None:
    """Read the whole file, and raise if anything about it is not what was saved."""
    with opened(path) as file:
        for key in file.tensors.all_keys():
            file.tensors.verify(key)


def latest(folder: Path_) -> Path | None:
    """The newest whole checkpoint of a folder; damaged ones are left out, with a warning.

    Files that hold something else are left alone. The newest is the one that was written last; of several of one
    moment, the one with the most steps. Every byte of it is read and compared with its SHA-256; if it is damaged, the
    next one is tried.

    Args:
        folder: where to look; not in folders below it.

    Returns:
        Its path, or None when there is none, as before the first save.

    Raises:
        CheckpointError: there are checkpoints, and none is whole.
        OSError: there is no such folder.

    Example:
        >>> import gradstep as gs, numpy as np, tempfile
        >>> folder = tempfile.mkdtemp()
        >>> opt, params = gs.SGD(0.1), {"w": np.zeros(2, np.float32)}
        >>> if (path := gs.latest(folder)) is not None:
        ...     opt.load(path, params)
        >>> _ = opt.apply_gradients({"w": np.ones(2, np.float32)}, params)
        >>> opt.save(f"{folder}/run.safetensors", params, keep=3)
        >>> gs.latest(folder).name
        'run.safetensors'
    """
    for _ in range(ATTEMPTS):
        with contextlib.suppress(ReplacedError):
            return _latest(folder)
    raise CheckpointError(f"the checkpoints of {folder} are saved anew faster than they can be read; try again later")


def _latest(folder: Path_) -> Path | None:
    candidates: list[tuple[int, int, str]] = []
    damaged: list[Path] = []
    for path in Path(os.fsdecode(folder)).iterdir():
        if not path.name.startswith(".") and path.is_file():
            with _left_out(path, damaged), opened(path) as file:
                candidates.append((path.stat().st_mtime_ns, step_of(file.document.optimizer), str(path)))
    for *_, name in sorted(candidates, reverse=True):
        with _left_out(Path(name), damaged):
            verify(name)
            return Path(name)
    if damaged:
        names = listing([path.name for path in damaged])
        raise CheckpointError(
            f"{folder} has no whole checkpoint: {names} cannot be read, as warnings told; move them away to begin anew"
        )
    return None


@contextlib.contextmanager
def _left_out(path: Path, damaged: list[Path]) -> Generator[None]:
    """Warn of a checkpoint that cannot be read, and note it.

    Somebody else may be renaming it: that is no damage. Files with other names may be anything.
    """
    try:
        yield
    except ReplacedError:
        raise
    except (FileNotFoundError, NoCheckpointError):
        return
    except (CheckpointError, OSError) as error:
        if path.suffix == ".safetensors":
            damaged.append(path)
            warnings.warn(f"{path.name} was left out: {error}", stacklevel=5)
