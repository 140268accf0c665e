"""What is common to optimizers of several processes."""

from typing import Any, NoReturn

from gradstep.errors import ConfigurationError
from gradstep.wrapper import Wrapper


class Grouped(Wrapper):
    """A wrapper whose steps are those of a group, of which there is no copy."""

    def _snapshot(self, memo: dict[int, Any]) -> NoReturn:
        raise ConfigurationError(
            f"{self!r} cannot be copied, as its group cannot; make another one, and load what this one has saved"
        )
