"""Proves that what is kept in 16 bits or in 8-bit codes is what the documentation says, to the bit."""

import itertools
from collections.abc import Iterator
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

import gradstep as gs
from families import ELEMENTWISE_FAMILIES, assert_same_bits, configurations, slot_names
from stored import DTYPES, Choice, StoredReference, assert_same_state, held, seen, values

POOLED = 1 << 16  # elements from which a step uses several threads here


@pytest.fixture(autouse=True, scope="module")
def sooner_threads() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gradstep.program.threads.WORTH_THREADS", POOLED)
        yield


UNIFORM = [
    Choice(slot_dtype, rounding, seed=seed)
    for seed, (slot_dtype, rounding) in enumerate(
        itertools.product([None, "bfloat16", "float16", "int8"], ["nearest", "stochastic"])
    )
]
KINDS = ["float16", "int8", "bfloat16", "float32"]


def choices(cls: Any) -> list[Choice]:
    """Every storage option, and mappings with a dtype for each slot."""
    slots = slot_names(cls)
    return [
        *UNIFORM,
        Choice(None, master_weights=True),
        Choice("int8", "stochastic", True, 2**64 - 1),
        Choice(dict(zip(slots, KINDS, strict=False)), "stochastic", seed=9),
        Choice(dict(zip(slots, KINDS[1:], strict=False)), master_weights=True),
        Choice(dict(zip(slots[1:], KINDS[2:], strict=False))),
    ]


ROWS = configurations(*ELEMENTWISE_FAMILIES)
every_row = pytest.mark.parametrize(("cls", "kwargs"), ROWS)
PAIRS = list(itertools.product(DTYPES, DTYPES))  # of parameter and gradient
CHARACTERS = ("normal", "wide", "special", "small")
SIZES = (0, 1, 15, 16, 17, 255, 256, 257, 300)


def assert_steps_are_exact(
    opt: Any, choice: Choice, library: str, starts: dict[str, Any], steps: list[dict[str, Any]]
) -> None:
    """Take the steps and compare parameters and all state with the reference after each."""
    params = {name: held(library, w) for name, w in starts.items()}
    references = {name: StoredReference(opt, name, w, choice) for name, w in starts.items()}
    for step, grads in enumerate(steps):
        opt.apply_gradients({name: held(library, g) for name, g in grads.items()}, params)
        for name, g in grads.items():
            reference = references[name]
            reference.step(g, step)
            what = f"{choice} {name} after {step + 1}"
            assert_same_state(opt.state.get(name, {}), reference.state, what)
            assert_same_bits(seen(params[name]), reference.w, what)


class TestBits:
    @every_row
    def test_every_family_in_every_storage(self, cls, kwargs):
        at = [param.values for param in ROWS].index((cls, kwargs))
        for number, choice in enumerate(choices(cls)):
            if (at + number) % 2:  # the family's next row takes the others
                continue
            of_w, of_g = PAIRS[(at * 5 + number * 7) % 16]
            of_w = of_w if not choice.master_weights or of_w in ("bfloat16", "float16") else "bfloat16"
            kinds = {f"{size} {kind}": (size, kind) for size, kind in zip(SIZES, CHARACTERS * 3, strict=False)}
            starts = {name: values(at + i, size, of_w, kind) for i, (name, (size, kind)) in enumerate(kinds.items())}
            steps = [
                {name: values(7 * step + i, size, of_g, kind) for i, (name, (size, kind)) in enumerate(kinds.items())}
                for step in (1, 2, 3)
            ]
            library = "numpy" if number % 4 < 2 else "torch"
            assert_steps_are_exact(cls(**kwargs, **choice._asdict()), choice, library, starts, steps)

    @pytest.mark.parametrize(("of_w", "of_g"), PAIRS)
    def test_every_pair_of_dtypes(self, of_w, of_g):
        row, column = list(DTYPES).index(of_w), list(DTYPES).index(of_g)
        for number, choice in enumerate(choices(gs.AdamW)[:-3]):
            if (row + column + number) % 2:  # the neighbouring pairs take the others
                continue
            library = "numpy" if (row + number // 2) % 2 else "torch"
            opt = gs.AdamW(0.01, bias_correction=True, **choice._asdict())
            starts = {kind: values(1, 300, of_w, kind) for kind in CHARACTERS}
            steps = [{kind: values(seed, 300, of_g, kind) for kind in CHARACTERS} for seed in (2, 3)]
            assert_steps_are_exact(opt, choice, library, starts, steps)

    @pytest.mark.parametrize("choice", choices(gs.Adam), ids=str)
    @pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
    def test_long_arrays_in_several_chunks(self, choice, dtype):
        opt = gs.Adam(0.01, **choice._asdict())
        starts = {str(size): values(size, size, dtype) for size in (32767, 32768, 32769, 70000)}
        steps = [{name: values(seed, w.size, "bfloat16") for name, w in starts.items()} for seed in (1, 2)]
        assert_steps_are_exact(opt, choice, "numpy", starts, steps)

    @settings(max_examples=40)
    @given(
        choice=st.sampled_from(choices(gs.Adamax)), size=st.integers(0, 600),
        of_w=st.sampled_from(["float32", "float16"]),
        characters=st.tuples(*[st.sampled_from(CHARACTERS)] * 2), seed=st.integers(0, 2**32), count=st.integers(1, 4),
    )  # fmt: skip
    def test_any_size_and_any_values(self, choice, size, of_w, characters, seed, count):
        opt = gs.Adamax(0.01, **choice._asdict())
        starts = {"w": values(seed, size, of_w, characters[0])}
        steps = [{"w": values(seed + i, size, "float32", characters[1])} for i in range(count)]
        assert_steps_are_exact(opt, choice, "numpy", starts, steps)

    def test_a_float64_value_is_rounded_to_float32_on_its_way(self):
        @gs.rule
        def Kept(w, g, s, *, learning_rate):
            return w, +g

        between = 1 + 2.0**-8 + 2.0**-40  # above the tie of bfloat16, on it after rounding to float32
        opt = Kept(0.1, slot_dtype="bfloat16")
        opt.apply_gradients({"w": np.array([between, -between])}, {"w": np.zeros(2)})
        assert opt.state["w"]["s"].tolist() == [1, -1]
        assert np.float64(between) > 1 + 2.0**-8
