"""Micro-batches: gradients are summed over several calls, and the last call takes the step."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, ClassVar, TypeVar

from gradstep.arrays.library import OTHER, Library, Watch, owner, recognise
from gradstep.arrays.memory import axis_order
from gradstep.arrays.stored import Stored
from gradstep.errors import ArgumentTypeError, ConfigurationError
from gradstep.interrupts import InterruptsHeld
from gradstep.optimizer import Optimizer, StepArguments, checked_scale, pick
from gradstep.options import thawed
from gradstep.program.formats import compute_dtype
from gradstep.report import Report
from gradstep.rules.base import RuleOptimizer
from gradstep.step.bill import MemoryBill, sums_bill
from gradstep.step.forms import describe_floats, refuse_tracing
from gradstep.step.functional import FormWatch
from gradstep.step.intake import Intake, check_stored_sum, check_sum
from gradstep.step.match import check_parameter
from gradstep.step.scalars import Scales
from gradstep.tree import named_arrays
from gradstep.wrapper import Wrapper, checked_every

Params = TypeVar("Params")


class Accumulate(Wrapper):
    """Gradient accumulation: `every` micro-batches of one size make the step of one big batch.

    ```
    sum = sum + grad_scale * g                          calls 1 to every - 1
    g = (sum + grad_scale * g) / every                  call every: the optimizer's own step, with this g
    ```

    The gradient of the step is the mean, which is that of the big batch for a loss that is a mean. Between the
    steps nothing but the sums changes: no parameter, slot, counter or schedule. Sums are float32, or float64 for
    float64 parameters, and added in the order of the calls; the last micro-batch joins them in the pass of the
    step. A gradient that is absent in some micro-batches counts as zero there; a parameter absent in all of them
    is left alone.

    Everything else is the wrapped optimizer's: hyperparameters, options, state, counters and `report`, which tells
    of its last step. Clipping looks at the mean. `nonfinite="raise"` refuses a micro-batch when it comes;
    `"skip"` leaves out the step of a round in which anything is not finite, and the next round begins.

    Args:
        optimizer: whose steps are taken, a `MultiOptimizer` too.
        every: how many micro-batches make a step, at least 1.

    Raises:
        ArgumentTypeError: `optimizer` is no optimizer, or `every` no integer.
        OutOfRangeError: `every` is below 1.
        ConfigurationError: the optimizer accumulates already.

    Example:
        >>> import gradstep as gs, numpy as np
        >>> opt = gs.Accumulate(gs.SGD(0.5), every=2)
        >>> params = {"w": np.zeros(2, np.float32)}
        >>> for g in ([1, 2], [3, 6]):
        ...     _ = opt.apply_gradients({"w": np.array(g, np.float32)}, params)
        >>> params["w"], opt.step
        (array([-1., -2.], dtype=float32), 1)
    """

    _uncopied: ClassVar[frozenset[str]] = Optimizer._uncopied | {"_seen"}
    _mine: ClassVar[frozenset[str]] = Wrapper._mine | {"_every", "_round", "_adders", "_seen"}
    _every: int
    _round: "Round"
    _adders: "tuple[Adder, Adder]"
    _seen: "Seen | None"

    def __init__(self, optimizer: Optimizer, *, every: int) -> None:
        if not isinstance(optimizer, Optimizer):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ArgumentTypeError(f"Accumulate takes an optimizer of gradstep, got {optimizer!r}")
        if isinstance(optimizer, Accumulate):
            raise ConfigurationError(
                f"{optimizer!r} accumulates already; multiply the numbers instead: "
                f"Accumulate(…, every={optimizer.every} * {every!r})"
            )
        optimizer._check_inside("Accumulate")
        self._inner, self._round = optimizer, Round()
        self._every = checked_every(every, "micro-batches in a step")
        self._adders = Adder(), Adder()  # each keeps one plan: for the first call of a round, and for the others
        self._register()

    @property
    def every(self) -> int:
        """How many micro-batches make a step."""
        return self._every

    @property
    def micro_step(self) -> int:
        """How many micro-batches the sums hold: 0 right after a step, `every - 1` before the next."""
        return self._round.count

    @property
    def sums(self) -> Mapping[str, Any]:
        """The live sums of this round by parameter name, a read-only mapping; empty after a step."""
        loaded = {name: total.shown() for name, total in self._round.loaded.items()}
        return MappingProxyType(self._round.sums | loaded if loaded else self._round.sums)

    def apply_gradients(self, grads: object, params: Params, *, grad_scale: float = 1.0) -> Params:
        """Add a micro-batch to the sums or, every `every` calls, take the step; wholly or, on any error, not at all.

        Args:
            grads: gradients of the micro-batch by name, nested like `params` or flat; a subset of `params` is
                enough, and `None` stands for an absent gradient. Never written.
            params: arrays by name: a mapping, or a nested dict, list or tuple. Written by the step alone.
            grad_scale: multiplies the gradients of this micro-batch; finite, 0 and negative allowed. Default: 1.

        Returns:
            `params`, the same object.

        Raises:
            NonFiniteScalarError, OutOfRangeError: `grad_scale` is not finite, or not in the dtype of the computation.
            GradstepError: sums and `micro_step`, parameters, slots, counters and resolved rates are then what they
                were, so that the same call can be made again.
        """
        self._exclusively(lambda: self._scaled_step(grads, params, grad_scale))
        return params

    def _check_inside(self, outer: str) -> None:
        raise ConfigurationError(
            f"{self!r} cannot be inside of a {outer}; wrap the {outer} instead: "
            f"Accumulate({outer}({'[…]' if outer == 'MultiOptimizer' else '…'}), every={self.every})"
        )

    def _scaled_step(self, grads: object, params: object, grad_scale: float) -> None:
        self._check_options()
        if self._round.loaded:
            self._land_and_call(grads, params, grad_scale)
        else:
            self._scaled_call(grads, params, grad_scale)

    def _land_and_call(self, grads: object, params: object, grad_scale: float) -> None:
        """A call with sums that have been loaded and belong to no library yet; if it fails they still do not."""
        before = self._round.count
        try:
            self._land(named_arrays(params, "params"))
            self._scaled_call(grads, params, grad_scale)
        except BaseException:
            if self._round.count == before:
                self._round.sums.update(self._round.loaded)
            raise
        finally:
            self._round.note_landed()

    def _scaled_call(self, grads: object, params: object, grad_scale: float) -> None:
        count = self._round.count + 1
        if self._every == 1:
            self._inner._scaled_step(grads, params, grad_scale)
        elif count < self._every:
            self._inner._together(lambda: self._adding(grads, params, grad_scale), f"add micro-batch {count}")
        else:
            self._inner._take_late(lambda: self._ending(grads, params, grad_scale))

    def _adding(self, grads: object, params: object, grad_scale: float) -> Callable[[], None]:
        """Add a micro-batch to the sums: a step of their own, in which they are the parameters."""
        scale, wanted, named = checked_scale(grad_scale), self._name_grads(grads), self._name_params(params)
        _ = pick(named, list(wanted))  # a gradient without parameter is an error, also where that would be frozen
        wanted = thawed(wanted, self._inner.frozen)
        wanted, here = self._inner._parts(wanted, named)
        sums, seen = self._sums_for(wanted, named, here)
        adder = self._adders[self._round.count > 0]
        adder.nonfinite = "raise" if self._inner._nonfinite_of_parts == "raise" else "allow"

        def done() -> None:
            self._round.take(sums)
            self._seen = seen

        intake = Intake(scaled=True, sums=self._round.sums, done=done)
        return adder._begin_step(StepArguments(wanted, sums, Scales(micro=scale), intake))

    def _ending(self, grads: object, params: object, grad_scale: float) -> StepArguments:
        """The step with the sums and the last micro-batch."""
        scale, named = checked_scale(grad_scale), self._name_params(params)
        wanted, _ = self._inner._parts(self._name_grads(grads), named)
        sums = thawed(self._round.sums, self._inner.frozen)
        lacking = frozenset(sums.keys() - wanted.keys())
        intake = Intake(scaled=True, sums=sums, lacking=lacking, done=self._round.close)
        stand_ins = {name: array for name, array in sums.items() if name in lacking}
        return StepArguments({**wanted, **stand_ins}, params, Scales(1 / self._every, scale), intake)

    def _sums_for(
        self, wanted: Mapping[str, Any], named: Mapping[str, Any], here: Mapping[str, Any]
    ) -> "tuple[dict[str, Any], Seen]":
        """An array for the sum of each gradient: the one there is, one of an earlier round, or a new one.

        `here` are the parts of parameters that are on this rank.
        """
        chosen, held = pick(here, list(wanted)), self._round.spare | self._round.sums
        seen = self._seen
        if seen is None or not seen.shows(list(wanted), chosen):
            parameters = dict(zip(wanted, chosen, strict=True))
            library = recognise(params=parameters, grads=wanted)
            # What the step would refuse for its name belongs here.
            self._inner._assign_known({name: named[name] for name in wanted})
            self._inner._known_names |= named.keys()
            if library.in_place is False:
                refuse_tracing(library, chosen)
            held = {name: self._sum_for(library, name, parameter) for name, parameter in parameters.items()}
            seen = Seen(list(wanted), library, chosen)
        return {name: held[name] for name in wanted}, seen

    def _sum_for(self, library: Library, name: str, parameter: Any) -> Any:
        """The array for one sum, checked against the parameter as it is now."""
        if name in self._round.sums:
            check_sum(library, name, self._round.sums[name], parameter)
            return self._round.sums[name]
        spare = self._round.spare.get(name)
        spare = spare if owner(spare) is library else None
        if library.in_place is True:
            memory = check_parameter(library, name, parameter)
            wanted, order = (memory.shape, compute_dtype(memory.dtype)), axis_order(memory)
            there = None if spare is None else library.describe(spare, f"sums[{name!r}]")
            fits = there is not None and (there.shape, there.dtype) == wanted and axis_order(there) == order
            return spare if fits else library.zeros(wanted[0], order, wanted[1])
        form = describe_floats(library, parameter, f"params[{name!r}]")
        form = form._replace(dtype=compute_dtype(form.dtype))
        fits = spare is not None and library.describe(spare, f"sums[{name!r}]") == form
        return spare if fits else library.zeros(form)

    def discard(self) -> None:
        """Drop the micro-batches of this round: the next call begins a new one. Nothing else changes.

        Example:
            >>> import gradstep as gs, numpy as np
            >>> opt = gs.Accumulate(gs.SGD(0.5), every=2)
            >>> _ = opt.apply_gradients({"w": np.ones(2, np.float32)}, {"w": np.zeros(2, np.float32)})
            >>> opt.discard()
            >>> opt.micro_step
            0
        """
        self._exclusively(self._discard)

    def _resume(self, count: int, sums: Mapping[str, Any]) -> None:
        """Go on with a round that has been loaded."""
        self._discard()
        self._round.resume(count, sums)

    def _land(self, named: Mapping[str, Any]) -> None:
        """Give sums that have been loaded to the array library of their parameters."""
        landing = {name: total for name, total in self._round.loaded.items() if name in named}
        library = recognise(params={name: named[name] for name in landing})
        for name, total in landing.items():
            check_stored_sum(library, name, total, named[name])
            if library.in_place is True:
                order = axis_order(check_parameter(library, name, named[name]))
                self._round.sums[name] = total.in_memory(library, order)
            else:
                form = describe_floats(library, named[name], f"params[{name!r}]")
                self._round.sums[name] = total.in_place_of(library, form._replace(dtype=total.dtype))

    def _discard(self) -> None:
        with InterruptsHeld():
            self._round.forget()
            self._seen = None

    def memory(self, params: object) -> MemoryBill:
        """What the wrapped optimizer needs, and the sums; see `Optimizer.memory`."""
        own = self._inner.memory(params)
        if self._every == 1:
            return own
        named = thawed(named_arrays(params, "params"), self._inner.frozen)
        return own + self._exclusively(
            lambda: sums_bill(self._inner._parts({}, named)[1], self._inner._assign(named, remember=False), self._every)
        )

    def init(self, params: object) -> None:
        """Begin anew: zero slots for every parameter, `steps` at 0, and no sums. `step` and schedules stay.

        Args:
            params: a mapping from name to array, or a nested dict, list or tuple of them.

        Raises:
            GradstepError: a parameter cannot be trained; then nothing has changed.
        """
        super().init(params)

    def _init(self, params: object) -> None:
        with InterruptsHeld():
            self._inner._init(params)
            self._round.forget()
            self._seen = None

    @property
    def report(self) -> Report | None:
        """What the last step of the wrapped optimizer did; None before the first. A micro-batch that was only added
        leaves it; `micro_step` tells of that."""
        return self._inner.report

    def _family(self) -> list[Optimizer]:
        return [self, *self._adders, *self._inner._family()]

    def _register(self) -> None:
        super()._register()
        self._seen = None

    def __repr__(self) -> str:
        return f"Accumulate({self._inner!r}, every={self._every})"


class Adder(RuleOptimizer):
    """Adds micro-batches to sums: what a step reads as its gradient becomes the new sum."""

    @staticmethod
    def rule(w: Any, g: Any) -> Any:
        return g


class Round:
    """The micro-batches since the last step: how many, and the sums of their gradients by parameter name.

    `spare` holds the sums of earlier rounds, whose memory the next ones take; `loaded` those of the sums that come from
    a checkpoint and belong to no array library yet.
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Begin anew, without any memory."""
        self.count = 0
        self.sums: dict[str, Any] = {}
        self.spare: dict[str, Any] = {}
        self.loaded: dict[str, Stored] = {}

    def resume(self, count: int, sums: Mapping[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.count = count
        self.sums.update(sums)
        self.loaded = {name: total for name, total in sums.items() if isinstance(total, Stored)}

    def note_landed(self) -> None:
        """Forget which sums were loaded, of those that are arrays of a library now."""
        self.loaded = {name: total for name, total in self.loaded.items() if self.sums.get(name) is total}

    def take(self, sums: Mapping[str, Any]) -> None:
        """A micro-batch has been added, and these sums are new."""
        self.sums.update(sums)
        self.count += 1

    def close(self) -> None:
        """The step has been taken, or skipped."""
        self.spare.update(self.sums)
        self.sums.clear()
        self.count = 0


class Seen:
    """The parameters for whose gradients there are sums that fit."""

    def __init__(self, names: list[str], library: Library, parameters: list[Any]) -> None:
        self._names = names
        self._watch: Watch = library.watch(parameters) if library.in_place is True else FormWatch(library, parameters)

    def shows(self, names: list[str], parameters: list[Any]) -> bool:
        """Whether these are such parameters."""
        return names == self._names and self._watch.locate(parameters) != OTHER
