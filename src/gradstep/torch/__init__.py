"""Drop-in optimizers for PyTorch: torch's names, arguments, formulas and checkpoints, gradstep's steps.

Each class is a `torch.optim.Optimizer`; in a training loop only the import changes.
"""

try:
    import torch
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    raise ModuleNotFoundError(
        'gradstep.torch needs PyTorch, which is not installed: pip install "gradstep[torch]"', name="torch"
    ) from None

from gradstep.torch.adadelta import Adadelta
from gradstep.torch.adafactor import Adafactor
from gradstep.torch.adagrad import Adagrad
from gradstep.torch.adam import Adam, AdamW
from gradstep.torch.adamax import Adamax
from gradstep.torch.lion import Lion
from gradstep.torch.muon import Muon
from gradstep.torch.rmsprop import RMSprop
from gradstep.torch.sgd import SGD

del torch

__all__ = ["SGD", "Adadelta", "Adafactor", "Adagrad", "Adam", "AdamW", "Adamax", "Lion", "Muon", "RMSprop"]
