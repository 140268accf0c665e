"""The methods by which every optimizer is saved and loaded."""
# pyright: reportPrivateUsage=false

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, Self, TypeVar, cast

from gradstep.errors import ArgumentTypeError, ConfigurationError

if TYPE_CHECKING:
    from gradstep.checkpoint.differences import Difference
    from gradstep.checkpoint.matching import Whose
    from gradstep.checkpoint.nodes import Document
    from gradstep.checkpoint.tensors import Tensors
    from gradstep.checkpoint.values import Functions
    from gradstep.optimizer import Optimizer

Result = TypeVar("Result")


class Persistent(ABC):
    """Whoever can be saved and loaded. What does it, `gradstep.checkpoint`, knows all optimizers: imported late."""

    @abstractmethod
    def _exclusively(self, body: Callable[[], Result]) -> Result:
        """Call `body` while other threads are kept from stepping."""

    @property
    def _itself(self) -> "Optimizer":
        return cast("Optimizer", self)

    def save(self, path: str | os.PathLike[str], params: object = None, *, keep: int | None = None) -> None:
        """Save everything that the next steps depend on, all or nothing: in one safetensors file.

        (A `Sharded` optimizer's ranks write a file each, and an index at `path`.)

        The file is written beside `path`, synced, and renamed over it: whenever the process is killed, `path` is the
        old file or the new one, whole. Each array of state has the key `parameter.slot`, each parameter its name. The
        metadata hold the hyperparameters, schedules, counters, and a SHA-256 of every array.

        A function of yours that is a schedule, a filter or configuration cannot be saved: its name is, and `load`
        takes it from the optimizer or asks for it.

        Args:
            path: where; the folder must exist.
            params: parameters to be saved too, by name or nested like those of a step; other arrays may be among
                them, such as `model.state_dict()` has. Default: none.
            keep: how many files to keep: this one, and the ones before as `name.1.suffix`, `name.2.suffix` and so on,
                which overwrite what has these names. Default: this one.

        Raises:
            OSError: the file cannot be written; the old one is still there.
            DtypeError: a parameter has a dtype that safetensors does not know.

        Example:
            >>> import gradstep as gs, numpy as np, tempfile
            >>> folder = tempfile.mkdtemp()
            >>> opt, params = gs.Adam(0.1), {"w": np.zeros(2, np.float32)}
            >>> _ = opt.apply_gradients({"w": np.ones(2, np.float32)}, params)
            >>> opt.save(f"{folder}/run.safetensors", params)
            >>> other = gs.load(f"{folder}/run.safetensors", params)
            >>> other.step, other.state["w"]["m"]
            (1, array([0.1, 0.1], dtype=float32))
        """
        self._save_as(self._itself, path, params, keep)

    def load(
        self, path: str | os.PathLike[str], params: object = None, *, like: object = None, strict: bool = True,
        hyperparameters: "Whose" = "file", functions: "Functions | None" = None,
    ) -> "list[Difference]":  # fmt: skip
        """Go on from a file that `save` wrote, bit for bit; wholly or, on any error, not at all.

        Names, shapes, slots, dtypes, the tree of optimizers, their families and storage are compared with this
        optimizer, and with `params` or `like` where they are given; every array that is loaded is verified. Without
        parameters to compare with, the first step checks that it brings no others than the file has. (Parameters in
        memory are verified, then read again: only a disk that fails in between leaves some of them old.)

        Args:
            path: the file, or the index of a `Sharded` optimizer's.
            params: parameters to be overwritten with those of the file. Default: the file's are left alone, with a
                warning if `like` is not given either.
            like: parameters, of whose library and in whose layout and place the state is made. Default: `params`, or
                else those of the next step.
            strict: whether anything missing, unexpected or different is an error. If not, what fits is loaded: a
                parameter's state as a whole or not at all.
            hyperparameters: "file" for the hyperparameters, `clip_norm`, `nonfinite` and `frozen` of the file; "mine"
                to keep those of this optimizer, with schedules resolved at the step of the file.
            functions: functions that the file only names, by these names. Default: those that the optimizer has in
                their place.

        Returns:
            Everything that differs; empty where `strict`.

        Raises:
            MismatchError: the file does not fit; lists all differences.
            CheckpointError: the file is damaged, or no checkpoint.
            ConfigurationError: the file names a function that neither the optimizer nor `functions` has.
            ReadOnlyError, DtypeError: `params` cannot be written, or have a dtype that cannot be trained.
            OSError: the file cannot be read.

        Example:
            >>> import gradstep as gs, numpy as np, tempfile
            >>> path, params = tempfile.mkdtemp() + "/run.safetensors", {"w": np.zeros(2, np.float32)}
            >>> gs.Adam(0.1).save(path, params)
            >>> gs.SGD(0.1).load(path, params, strict=False)
            [Difference(kind='different', where='opt', file='Adam', here='SGD')]
        """
        loading = Loading(params, like, strict, hyperparameters, functions or {})
        return self._load_as(self._itself, path, loading, stacklevel=3)

    def state_dict(self) -> dict[str, Any]:
        """What `save` would put into a file, for checkpoints of your own: plain data, and arrays by key.

        Returns:
            A dict with `"gradstep"`, which is made of dicts, lists, texts, numbers and None, and `"tensors"`, the live
            arrays: the next step changes those of NumPy and PyTorch, and with `donate=True` it deletes those of JAX.
            `copy.deepcopy` makes a snapshot of it.

        Example:
            >>> import gradstep as gs, numpy as np
            >>> opt = gs.SGD(0.1, momentum=0.9)
            >>> opt.init({"w": np.zeros(2, np.float32)})
            >>> opt.state_dict()["tensors"]
            {'w.v': array([0., 0.], dtype=float32)}
        """
        from gradstep.checkpoint import snapshot

        return self._exclusively(lambda: snapshot.state_dict(self._itself))

    def load_state_dict(
        self, state_dict: Mapping[str, Any], *, like: object = None, strict: bool = True,
        hyperparameters: "Whose" = "file", functions: "Functions | None" = None,
    ) -> "list[Difference]":  # fmt: skip
        """Go on from what `state_dict` gave, or a bridge from another library; arrays are copied. See `load`.

        Example:
            >>> import gradstep as gs, numpy as np
            >>> opt, twin = gs.SGD(0.1, momentum=0.9), gs.SGD(0.2, momentum=0.8)
            >>> opt.init({"w": np.zeros(2, np.float32)})
            >>> twin.load_state_dict(opt.state_dict())
            []
            >>> twin.learning_rate
            0.1
        """
        loading = Loading(None, like, strict, hyperparameters, functions or {})
        return self._load_state_as(self._itself, state_dict, loading)

    # What a wrapper asks of the optimizer inside it, for `whole`, the outermost one

    def _save_as(self, whole: "Optimizer", path: str | os.PathLike[str], params: object, keep: int | None) -> None:
        from gradstep.checkpoint import checkpoint_file, snapshot

        named = snapshot.checked_arrays({} if params is None else params, "params")
        whole._exclusively(lambda: checkpoint_file.save(path, snapshot.snapshot(whole, named), keep))

    def _load_as(
        self, whole: "Optimizer", path: str | os.PathLike[str], loading: "Loading", stacklevel: int
    ) -> "list[Difference]":
        from gradstep.checkpoint import checkpoint_file

        with checkpoint_file.opened(path) as file:
            if loading.params is None and loading.like is None:
                file.warn_of_parameters(stacklevel)
            return _restore(whole, file.document, file.tensors, loading)

    def _load_state_as(
        self, whole: "Optimizer", state_dict: Mapping[str, Any], loading: "Loading"
    ) -> "list[Difference]":
        from gradstep.checkpoint import snapshot

        return _restore(whole, *snapshot.from_state_dict(state_dict), loading)


class Loading(NamedTuple):
    """How a checkpoint is loaded; see `Persistent.load`."""

    params: object
    like: object
    strict: bool
    whose: "Whose"
    functions: "Functions"

    def checked(self) -> Self:
        """This, if its arguments can be."""
        if not isinstance(self.strict, bool):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ArgumentTypeError(f"strict must be True or False, got {self.strict!r}")
        if self.whose not in ("file", "mine"):
            raise ConfigurationError(f'hyperparameters must be "file" or "mine", got {self.whose!r}')
        return self


def _restore(whole: "Optimizer", document: "Document", tensors: "Tensors", loading: Loading) -> "list[Difference]":
    from gradstep.checkpoint import restore, snapshot

    def body() -> "list[Difference]":
        mine = snapshot.snapshot(whole, {}).document.optimizer
        restoration = restore.prepare(whole, mine, document, tensors, loading)
        restoration.adopt()
        return restoration.differences

    return whole._exclusively(body)
