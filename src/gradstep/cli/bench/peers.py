"""The peers: other packages' optimizers, each a small adapter that makes their step."""

import importlib
import importlib.util
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from gradstep.cli.bench.case import CLIP
from gradstep.cli.bench.sides import Action, Ring, Side, Stage, by_name

RATE = 1e-3


@dataclass(frozen=True)
class Peer:
    """Somebody else's optimizers.

    Attributes:
        name: how `--peers` names it.
        library: whose arrays it takes.
        package: what to install.
        families: the name and arguments of its optimizer for each of our families; those that it lacks are left out.
        module: where its optimizers live.
        make: makes the step.
        option: a keyword argument that chooses this variant; families that do not take it are left out.
        asked: whether it takes part only when it is asked for.
    """

    name: str
    library: str
    package: str
    families: Mapping[str, tuple[str, dict[str, Any]]]
    module: str
    make: Callable[["Peer", Any, dict[str, Any], Stage], Action]
    option: str | None = None
    asked: bool = False

    @property
    def installed(self) -> bool:
        """Whether it can be imported; nothing is."""
        return importlib.util.find_spec(self.package.replace("-", "_")) is not None

    def side(self, family: str) -> Side | None:
        """Its side for a family of ours, if it has such an optimizer."""
        name, arguments = self.families.get(family, ("", {}))
        if not name:
            return None
        if self.option is not None:
            if self.option not in inspect.signature(self._find(name)).parameters:
                return None
            arguments = {**arguments, self.option: True}
        return Side(self.name, "peer", lambda stage: self.make(self, self._find(name), arguments, stage))

    def _find(self, name: str) -> Any:
        place, _, attribute = f"{self.module}.{name}".rpartition(".")
        return getattr(importlib.import_module(place), attribute)


def _torch(peer: Peer, kind: Any, arguments: dict[str, Any], stage: Stage, compiled: bool = False) -> Action:
    """An optimizer with torch's interface."""
    torch: Any = importlib.import_module("torch")
    parameters = [torch.nn.Parameter(array) for array in stage.params]
    optimizer = kind(parameters, **arguments)
    advance: Callable[[], object] = torch.compile(optimizer.step) if compiled else optimizer.step
    grads = Ring(stage.rings)

    def prepare() -> None:
        grads.turn()
        for parameter, grad in zip(parameters, grads.now, strict=True):
            parameter.grad = grad

    def clip_and_step() -> None:
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        advance()

    return Action(prepare, clip_and_step if stage.case.clip else advance)


def _optax(peer: Peer, kind: Any, arguments: dict[str, Any], stage: Stage) -> Action:
    """A transformation under `jax.jit`, which may reuse the memory of old parameters and states."""
    jax: Any = importlib.import_module("jax")
    optax: Any = importlib.import_module("optax")
    transformation = kind(**arguments)
    if stage.case.clip:
        transformation = optax.chain(optax.clip_by_global_norm(CLIP), transformation)
    params, grads = stage.params, Ring(stage.rings)
    state = transformation.init(params)

    @partial(jax.jit, donate_argnums=(0, 1))
    def advance(params: Any, state: Any, grads: Any) -> Any:
        updates, state = transformation.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    def step() -> None:
        nonlocal params, state
        params, state = jax.block_until_ready(advance(params, state, grads.now))

    return Action(grads.turn, step)


def _mlx(peer: Peer, kind: Any, arguments: dict[str, Any], stage: Stage) -> Action:
    """One of `mlx.optimizers`."""
    mx: Any = importlib.import_module("mlx.core")
    optimizers: Any = importlib.import_module("mlx.optimizers")
    optimizer = kind(**arguments)
    params: Any = by_name(stage.params)
    grads = Ring([by_name(ring) for ring in stage.rings])

    def step() -> None:
        nonlocal params
        taken = optimizers.clip_grad_norm(grads.now, CLIP)[0] if stage.case.clip else grads.now
        params = optimizer.apply_gradients(taken, params)
        mx.eval(params, optimizer.state)

    return Action(grads.turn, step)


def _same(names: str, **rate: float) -> dict[str, tuple[str, dict[str, Any]]]:
    """Families by our name, or as `ours=theirs`, that take nothing but a rate."""
    pairs = (name.partition("=") for name in names.split())
    return {ours: (theirs or ours, dict(rate)) for ours, _, theirs in pairs}


_TORCH = {
    **_same("RMSprop Adagrad AdaDelta=Adadelta Adam AdamW Adamax Adafactor Muon", lr=RATE),
    "SGD": ("SGD", {"lr": RATE, "momentum": 0.9}),
}
_OPTAX = {
    **_same("RMSprop=rmsprop Adagrad=adagrad AdaDelta=adadelta Adam=adam AdamW=adamw", learning_rate=RATE),
    **_same("Adamax=adamax Lion=lion Adafactor=adafactor Muon=contrib.muon", learning_rate=RATE),
    "SGD": ("sgd", {"learning_rate": RATE, "momentum": 0.9}),
}
_MLX = {
    **_same("RMSprop Adagrad AdaDelta Adam AdamW Adamax Lion Adafactor Muon", learning_rate=RATE),
    "SGD": ("SGD", {"learning_rate": RATE, "momentum": 0.9}),
}
_BITSANDBYTES = {**_same("RMSprop Adagrad Adam AdamW Lion", lr=RATE), "SGD": ("SGD", {"lr": RATE, "momentum": 0.9})}
_PYTORCH_OPTIMIZER = _same("Lion AdaDelta=AdaDelta Adamax=AdaMax Adafactor=AdaFactor Muon", lr=RATE)
_DEEPSPEED = {
    "Adam": ("adam.DeepSpeedCPUAdam", {"lr": RATE, "adamw_mode": False}),
    "AdamW": ("adam.DeepSpeedCPUAdam", {"lr": RATE, "adamw_mode": True}),
    "Adagrad": ("adagrad.DeepSpeedCPUAdagrad", {"lr": RATE}),
    "Lion": ("lion.DeepSpeedCPULion", {"lr": RATE}),
}

PEERS = (
    Peer("torch-fused", "torch", "torch", _TORCH, "torch.optim", _torch, option="fused"),
    Peer("torch-foreach", "torch", "torch", _TORCH, "torch.optim", _torch, option="foreach"),
    Peer("torch-default", "torch", "torch", _TORCH, "torch.optim", _torch),
    Peer("torch-compile", "torch", "torch", _TORCH, "torch.optim", partial(_torch, compiled=True), asked=True),
    Peer("bitsandbytes", "torch", "bitsandbytes", _BITSANDBYTES, "bitsandbytes.optim", _torch),
    Peer("torchao-8bit", "torch", "torchao", _same("Adam=Adam8bit AdamW=AdamW8bit", lr=RATE), "torchao.optim", _torch),
    Peer("pytorch-optimizer", "torch", "pytorch-optimizer", _PYTORCH_OPTIMIZER, "pytorch_optimizer", _torch),
    Peer("deepspeed", "torch", "deepspeed", _DEEPSPEED, "deepspeed.ops", _torch),
    Peer("optax", "jax", "optax", _OPTAX, "optax", _optax),
    Peer("mlx", "mlx", "mlx", _MLX, "mlx.optimizers", _mlx),
)
