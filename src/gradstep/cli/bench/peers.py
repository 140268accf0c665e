"""The peers: other packages' optimizers, each a small adapter that makes their step."""

import importlib
import importlib.util
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from gradstep.cli.bench.case import CLIP
from gradstep.cli.bench.families import BY_NAME
from gradstep.cli.bench.sides import Action, LeftOut, Ring, Side, Stage, by_name


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


def _torch(
    peer: Peer, kind: Any, arguments: dict[str, Any], stage: Stage, compiled: bool = False, **group: bool
) -> Action:
    """An optimizer with torch's interface, and what its parameter group needs to say."""
    torch: Any = importlib.import_module("torch")
    if peer.option == "fused" and not _moves(kind, arguments, stage.params[0].dtype):
        raise LeftOut(f"its step leaves {stage.case.dtype} parameters as they are (pytorch/pytorch issue 191763)")
    parameters = [torch.nn.Parameter(array) for array in stage.params]
    optimizer = kind([{"params": parameters, **group}], **arguments)
    advance: Callable[[], object] = torch.compile(optimizer.step) if compiled else optimizer.step
    grads = Ring(stage.rings)

    def prepare() -> None:
        grads.turn()
        for parameter, grad in zip(parameters, grads.now, strict=True):
            parameter.grad = grad

    def clip_and_step() -> None:
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        advance()

    return Action(prepare, clip_and_step if stage.case.clip else advance, lambda: stage.params)


def _moves(kind: Any, arguments: dict[str, Any], dtype: Any) -> bool:
    """Whether a step changes parameters of this dtype; fused SGD of PyTorch 2.13 fails at narrow ones."""
    torch: Any = importlib.import_module("torch")
    parameter = torch.nn.Parameter(torch.ones(64, dtype=dtype))
    parameter.grad = torch.ones_like(parameter)
    kind([parameter], **{**arguments, "lr": 1.0}).step()
    return bool((parameter != 1).all())


def _torchao(peer: Peer, kind: Any, arguments: dict[str, Any], stage: Stage) -> Action:
    """An optimizer with 8-bit slots, on those tensors for which it makes them."""
    elements = math.prod(stage.case.shape)
    if elements < 4096 or elements % 256:
        raise LeftOut(
            "has 8-bit slots only for tensors of 4096 elements or more, in multiples of 256; --sizes 1024000 would do"
        )
    return _torch(peer, kind, arguments, stage)


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

    return Action(grads.turn, step, lambda: params)


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

    return Action(grads.turn, step, lambda: params.values())


def _named(rate: str, names: str, **more: dict[str, Any]) -> dict[str, tuple[str, dict[str, Any]]]:
    """What they have for our families, as `ours=theirs` where they call it otherwise.

    Each gets our rate, by their name for it, and the arguments that turn their defaults into ours.
    """
    table: dict[str, tuple[str, dict[str, Any]]] = {}
    for name in names.split():
        ours, _, theirs = name.partition("=")
        built: Any = BY_NAME[ours.lower()].build()
        table[ours] = (theirs or ours, {rate: built.learning_rate, **more.get(ours, {})})
    return table


_MOMENTUM = {"momentum": 0.9}
_TORCH = _named(
    "lr", "SGD RMSprop Adagrad AdaDelta=Adadelta Adam AdamW Adamax Adafactor Muon",
    SGD=_MOMENTUM, Adagrad={"eps": 1e-8}, Muon={"weight_decay": 0.01},
)  # fmt: skip
_COMPILED = {family: named for family, named in _TORCH.items() if family != "Adafactor"}  # it cannot be compiled
_OPTAX = _named(
    "learning_rate",
    "SGD=sgd RMSprop=rmsprop Adagrad=adagrad AdaDelta=adadelta Adam=adam AdamW=adamw Adamax=adamax Lion=lion "
    "Adafactor=adafactor Muon=contrib.muon",
    SGD=_MOMENTUM,
    RMSprop={"decay": 0.99, "eps_in_sqrt": False},
    Adagrad={"initial_accumulator_value": 0.0, "eps": 1e-16},  # which it adds below the root
    AdamW={"weight_decay": 0.01},
    Lion={"weight_decay": 0.0},
    Adafactor={"min_dim_size_to_factor": 1},
    Muon={"weight_decay": 0.01},
)
_CORRECTED = {"bias_correction": True}
_MLX = _named(
    "learning_rate", "SGD RMSprop Adagrad AdaDelta Adam AdamW Adamax Lion Adafactor Muon",
    SGD=_MOMENTUM, Adam=_CORRECTED, AdamW=_CORRECTED, Adafactor={"relative_step": False},
)  # fmt: skip
_BITSANDBYTES = _named("lr", "SGD RMSprop Adagrad Adam AdamW Lion", SGD=_MOMENTUM, Adagrad={"eps": 1e-8})
_TORCHAO = _named("lr", "Adam=Adam8bit AdamW=AdamW8bit")
_PYTORCH_OPTIMIZER = _named(
    "lr", "AdaDelta Adamax=AdaMax Lion Adafactor=AdaFactor Muon",
    Adafactor={"betas": (None, 0.999), "relative_step": False},
    Muon={"weight_decay": 0.01, "weight_decouple": False},
)  # fmt: skip
_DEEPSPEED = _named(
    "lr",
    "Adagrad=adagrad.DeepSpeedCPUAdagrad Adam=adam.DeepSpeedCPUAdam AdamW=adam.DeepSpeedCPUAdam "
    "Lion=lion.DeepSpeedCPULion",
    Adagrad={"eps": 1e-8},
    Adam={"adamw_mode": False},
    AdamW={"weight_decay": 0.01},
    Lion={"betas": (0.9, 0.99)},
)

PEERS = (
    Peer("torch-fused", "torch", "torch", _TORCH, "torch.optim", _torch, option="fused"),
    Peer("torch-foreach", "torch", "torch", _TORCH, "torch.optim", _torch, option="foreach"),
    Peer("torch-default", "torch", "torch", _TORCH, "torch.optim", _torch),
    Peer("torch-compile", "torch", "torch", _COMPILED, "torch.optim", partial(_torch, compiled=True), asked=True),
    Peer("bitsandbytes", "torch", "bitsandbytes", _BITSANDBYTES, "bitsandbytes.optim", _torch),
    Peer("torchao-8bit", "torch", "torchao", _TORCHAO, "torchao.optim", _torchao),
    Peer(
        "pytorch-optimizer",
        "torch",
        "pytorch-optimizer",
        _PYTORCH_OPTIMIZER,
        "pytorch_optimizer",
        partial(_torch, use_muon=True),
    ),
    Peer("deepspeed", "torch", "deepspeed", _DEEPSPEED, "deepspeed.ops", _torch),
    Peer("optax", "jax", "optax", _OPTAX, "optax", _optax),
    Peer("mlx", "mlx", "mlx", _MLX, "mlx.optimizers", _mlx),
)
