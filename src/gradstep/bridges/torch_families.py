"""Which families torch and the core share, and by which keys a param group tells its class."""

from collections.abc import Mapping
from typing import Any, NamedTuple


class Shared(NamedTuple):
    """A family whose formula torch has too.

    Attributes:
        module: where torch's class is.
        name: what it is called.
        slots: the core's slots by the names in torch's state.
        hyperparameters: the core's hyperparameters by the names in torch's groups.
        fixed: hyperparameters of the core with the only value that torch's class has.
        absent: what the core does not have, by name, with the value that means as much.
        counts: whether torch counts the steps of every parameter.
    """

    module: str
    name: str
    slots: Mapping[str, str]
    hyperparameters: Mapping[str, str]
    fixed: Mapping[str, Any]
    absent: Mapping[str, Any]
    counts: bool = True


ADAM_SLOTS = {"exp_avg": "m", "exp_avg_sq": "v"}
ADAM = {"lr": "learning_rate", "betas": "betas", "eps": "eps"}
DECAYED = {**ADAM, "weight_decay": "weight_decay"}
CORRECTED = {"bias_correction": True}

SHARED: dict[str, Shared] = {
    "SGD": Shared(
        "torch.optim", "SGD", {"momentum_buffer": "v"},
        {
            "lr": "learning_rate", "momentum": "momentum", "weight_decay": "weight_decay",
            "dampening": "dampening", "nesterov": "nesterov",
        },
        {}, {"maximize": False}, counts=False,
    ),
    "RMSprop": Shared(
        "torch.optim", "RMSprop", {"square_avg": "v"}, {"lr": "learning_rate", "alpha": "alpha", "eps": "eps"},
        {}, {"centered": False, "momentum": 0, "weight_decay": 0, "maximize": False},
    ),
    "Adagrad": Shared(
        "torch.optim", "Adagrad", {"sum": "v"}, {"lr": "learning_rate", "eps": "eps"},
        {}, {"lr_decay": 0, "weight_decay": 0, "maximize": False},
    ),
    "AdaDelta": Shared(
        "torch.optim", "Adadelta", {"square_avg": "v", "acc_delta": "u"},
        {"lr": "learning_rate", "rho": "rho", "eps": "eps"}, {}, {"weight_decay": 0, "maximize": False},
    ),
    "Adam": Shared(
        "torch.optim", "Adam", ADAM_SLOTS, ADAM,
        CORRECTED, {"weight_decay": 0, "amsgrad": False, "maximize": False},
    ),
    "AdamW": Shared(
        "torch.optim", "AdamW", ADAM_SLOTS, DECAYED, CORRECTED, {"amsgrad": False, "maximize": False},
    ),
    "Lion": Shared(
        "gradstep.torch", "Lion", {"exp_avg": "m"},
        {"lr": "learning_rate", "betas": "betas", "weight_decay": "weight_decay"},
        {}, {"maximize": False}, counts=False,
    ),
}  # fmt: skip

OTHER_FORMULAS = {
    "Adamax": "torch corrects the bias of its mean and puts eps inside of the maximum; the core does neither",
    "Adafactor": "torch clamps the factored second moment and scales its rate in another way",
    "Muon": "torch decouples weight decay, sums gradients undamped and scales its rate in another way",
    "NAdam": "the core has no such family",
    "RAdam": "the core has no such family",
    "ASGD": "the core has no such family",
    "Rprop": "the core has no such family",
    "LBFGS": "the core has no such family",
    "SparseAdam": "it updates rows of sparse gradients only",
}
WITH_TORCH_FORMULA = ("Adamax", "Adafactor", "Muon")

# The keys by which a param group tells its class, the first that are all there; some of it must then be absent.
MARKS: tuple[tuple[str, frozenset[str], frozenset[str]], ...] = tuple(
    (name, frozenset(there.split()), frozenset(absent.split()))
    for name, there, absent in (
        ("Muon", "ns_steps", ""),
        ("Adafactor", "beta2_decay", ""),
        ("NAdam", "momentum_decay", ""),
        ("ASGD", "lambd", ""),
        ("Rprop", "etas", ""),
        ("LBFGS", "line_search_fn", ""),
        ("SGD", "dampening nesterov", ""),
        ("RMSprop", "alpha centered", ""),
        ("Adagrad", "lr_decay", ""),
        ("AdaDelta", "rho", ""),
        ("Adam", "betas amsgrad", ""),
        ("RAdam", "betas decoupled_weight_decay", ""),
        ("Lion", "betas weight_decay", "eps"),
        ("Adamax", "betas eps weight_decay", ""),
        ("SparseAdam", "betas eps", ""),
    )
)

ADVICE = {("Adam", "weight_decay"): "; torch.optim.AdamW decouples it as gradstep.AdamW does"}
