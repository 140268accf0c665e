"""What is common to optimizers of several processes: there are no checkpoints of them."""

from abc import abstractmethod
from typing import Any, NoReturn

from gradstep.wrapper import Wrapper


class Unsaved(Wrapper):
    """A wrapper that is neither saved nor copied."""

    @abstractmethod
    def _refuse(self, what: str) -> NoReturn:
        """Raise `ConfigurationError`, which says why that is not possible."""
        raise NotImplementedError

    def save(self, *_: Any, **__: Any) -> NoReturn:
        """Raises `ConfigurationError`: there are no checkpoints of what is spread over processes."""
        self._refuse("save")

    def load(self, *_: Any, **__: Any) -> NoReturn:
        """Raises `ConfigurationError`, like `save`."""
        self._refuse("load")

    def state_dict(self, *_: Any, **__: Any) -> NoReturn:
        """Raises `ConfigurationError`, like `save`."""
        self._refuse("state_dict")

    def load_state_dict(self, *_: Any, **__: Any) -> NoReturn:
        """Raises `ConfigurationError`, like `save`."""
        self._refuse("load_state_dict")

    def _snapshot(self, memo: dict[int, Any]) -> NoReturn:
        self._refuse("copying")
