"""The table that says which parameter gets what."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import mlx.core as mx
import numpy as np
import pytest
import torch

import gradstep as gs

LIBRARIES: dict[str, Callable[[Any], Any]] = {
    "numpy": lambda shape: np.ones(shape, np.float32),
    "torch": torch.ones,
    "jax": jnp.ones,
    "mlx": mx.ones,
}
every_library = pytest.mark.parametrize("library", LIBRARIES)


def nested(library: str = "numpy") -> dict[str, Any]:
    ones = LIBRARIES[library]
    layers = [{"weight": ones((2, 3)), "bias": ones(2)} for _ in range(2)]
    return {"embed": ones((10, 2)), "layers": layers, "scale": ones(())}


def shown(opt: gs.Optimizer, params: Any, capsys: pytest.CaptureFixture[str]) -> list[str]:
    assert opt.describe(params) is None
    return capsys.readouterr().out.splitlines()


@every_library
def test_one_line_for_each_parameter_in_columns(library: str, capsys: Any) -> None:
    opt = gs.AdamW(
        {"embed*": 1e-4, "*": gs.cosine_decay(1e-3, 1000)},
        betas={"layers.0.*": (0.9, lambda step: 0.9), "*": (0.9, 0.999)},
        weight_decay={"*.bias": 0, "*": 0.1},
        frozen=["layers.1.*"],
    )
    cosine = "cosine_decay(init=0.001, decay_steps=1000, end=0.0)"
    assert shown(opt, nested(library), capsys) == [
        f"parameter        shape    dtype    {'learning_rate':51}  betas            eps    weight_decay  slots",
        f"embed            (10, 2)  float32  {'0.0001':51}  (0.9, 0.999)     1e-08  0.1           m v",
        f"layers.0.weight  (2, 3)   float32  {cosine}  (0.9, <lambda>)  1e-08  0.1           m v",
        f"layers.0.bias    (2,)     float32  {cosine}  (0.9, <lambda>)  1e-08  0.0           m v",
        "layers.1.weight  (2, 3)   float32  frozen",
        "layers.1.bias    (2,)     float32  frozen",
        f"scale            ()       float32  {cosine}  (0.9, 0.999)     1e-08  0.1           m v",
    ]


@every_library
def test_several_optimizers_are_named_by_their_places(library: str, capsys: Any) -> None:
    inner = gs.MultiOptimizer([gs.Muon(0.02, weight_decay={"*": 0.5}), gs.SGD(0.1)], ["*.weight"])
    opt = gs.MultiOptimizer([gs.Adafactor(), inner], ["embed"], frozen=["scale"])
    rows = [line.split("  ") for line in shown(opt, nested(library), capsys)]
    cells = [[cell.strip() for cell in row if cell] for row in rows]
    assert cells == [
        ["parameter", "shape", "dtype", "optimizer", "learning_rate", "eps", "clip_threshold", "decay_rate", "beta_1",
         "weight_decay", "momentum", "dampening", "slots"],
        ["embed", "(10, 2)", "float32", "[0] Adafactor", "None", "(1e-30, 0.001)", "1.0", "-0.8", "None",
         "0.0", "-", "-", "row col"],
        *(
            row
            for i in (0, 1)
            for row in (
                [f"layers.{i}.weight", "(2, 3)", "float32", "[1][0] Muon", "0.02", *"----", "0.5", "0.95", "-", "v"],
                [f"layers.{i}.bias", "(2,)", "float32", "[1][1] SGD", "0.1", *"----", "0.0", "0.0", "0.0", "-"],
            )
        ),
        ["scale", "()", "float32", "frozen"],
    ]  # fmt: skip


def test_columns_are_aligned(capsys: Any) -> None:
    header, *lines = shown(gs.SGD({"layers*": 0.125, "*": 1e-10}, momentum=0.5), nested(), capsys)
    for column, text in {"shape": "(", "dtype": "float32", "momentum": "0.5 ", "slots": "v"}.items():
        assert all(line[header.index(column) :].startswith(text) for line in lines)
    assert all(line == line.rstrip() for line in (header, *lines))


def test_slots_are_those_that_the_parameter_will_have(capsys: Any) -> None:
    opt = gs.SGD(0.1, momentum={"*bias": 0, "*": 0.9})
    lines = shown(opt, nested(), capsys)[1:]
    opt.init(nested())
    expected = {name: " ".join(slots) or "-" for name, slots in opt.state.items()}
    assert {line.split()[0]: line.split()[-1] for line in lines} == expected


@every_library
def test_nothing_is_changed(library: str, capsys: Any) -> None:
    def rows_first(name: str, parameter: Any) -> bool:
        return parameter.shape[0] == 2

    opts = [
        gs.AdamW({"embed*": 0.1, "*": gs.cosine_decay(0.1, 9)}),
        gs.MultiOptimizer([gs.SGD({"*": 0.1}), gs.Lion(0.1)], [rows_first]),
    ]
    params = {"w": LIBRARIES[library]((2, 2))}
    for opt, described in zip(opts, ({"w": params["w"]}, {"w": LIBRARIES[library]((3, 2))}), strict=True):
        twin = copy.deepcopy(opt)
        leaves = [(leaf.epoch, leaf.entries, leaf._ledger) for leaf in opt._leaves()]
        opt.describe(described)
        assert [(leaf.epoch, leaf.entries, leaf._ledger) for leaf in opt._leaves()] == leaves
        assert (opt.step, opt.steps, dict(opt.state), opt.report, repr(opt)) == (0, {}, {}, None, repr(twin))
        opt.apply_gradients({"w": LIBRARIES[library]((2, 2))}, dict(params))
        twin.apply_gradients({"w": LIBRARIES[library]((2, 2))}, dict(params))
        assert [list(leaf.entries) for leaf in opt._leaves()] == [list(leaf.entries) for leaf in twin._leaves()]


def test_no_schedule_is_called(capsys: Any) -> None:
    asked: list[int] = []
    opt = gs.SGD({"*": lambda step: asked.append(step) or 0.1})
    opt.apply_gradients({}, {})
    opt.describe(nested())
    assert asked == [0]


def test_every_sort_of_array_is_shown_as_it_is(capsys: Any) -> None:
    params = {"half": torch.ones(2, dtype=torch.bfloat16), "whole": torch.ones(3, dtype=torch.int64)}
    lines = shown(gs.SGD(0.1, frozen=["whole"]), params, capsys)
    assert [line.split()[:3] for line in lines[1:]] == [["half", "(2,)", "bfloat16"], ["whole", "(3,)", "int64"]]


def test_rules_of_ones_own_may_call_their_hyperparameters_as_they_like(capsys: Any) -> None:
    @gs.rule
    def Own(w, g, *, learning_rate, shape=2.0, slots=3.0, sort="plain"):
        return w - learning_rate * shape * slots * g

    lines = [line.split() for line in shown(Own(0.5), {"w": np.ones(2)}, capsys)]
    assert lines[0] == ["parameter", "shape", "dtype", "learning_rate", "shape", "slots", "slots"]
    assert lines[1] == ["w", "(2,)", "float64", "0.5", "2.0", "3.0", "-"]


def test_no_parameters_are_a_header(capsys: Any) -> None:
    assert shown(gs.SGD(0.1), {}, capsys) == ["parameter  shape  dtype  slots"]


def test_what_is_no_array_is_named(capsys: Any) -> None:
    with pytest.raises(gs.ArgumentTypeError, match=r"params\['w'\] is no array, got 'text' \(str\)"):
        gs.SGD(0.1).describe({"w": "text"})
    with pytest.raises(gs.ArgumentTypeError, match="params is a module"):
        gs.SGD(0.1).describe(torch.nn.Linear(2, 2))
    assert not capsys.readouterr().out


def test_a_copy_describes_alike(capsys: Any) -> None:
    opt = gs.AdamW({"embed*": 0.1, "*": 0.2}, frozen=["scale"])
    opt.describe(nested())
    first = capsys.readouterr().out
    pickle.loads(pickle.dumps(opt)).describe(nested())
    assert capsys.readouterr().out == first


def test_globs_that_do_nothing_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    params = {"layers.0.weight": np.ones(2), "bias": np.ones(2)}
    gs.AdamW({"layer.*": 1, "layers.*": 2, "*": 3}, weight_decay={"*.bias": 0, "*": 0.1}, frozen=["stem.*"]).describe(
        params
    )
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "no parameter takes anything from: frozen 'stem.*', learning_rate 'layer.*', weight_decay '*.bias'"
    gs.MultiOptimizer([gs.SGD({"a": 1, "*": 2}), gs.SGD({"bias": 1, "*": 2})], ["layers.*"]).describe(params)
    assert capsys.readouterr().out.splitlines()[-1] == "no parameter takes anything from: [0] SGD's learning_rate 'a'"
    gs.SGD({"layers.*": 1, "bias": 2, "*": 3}).describe(params)
    assert "no parameter" not in capsys.readouterr().out
