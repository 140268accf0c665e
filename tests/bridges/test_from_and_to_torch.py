"""Proves that torch's optimizers go on in the core and back, where formulas are shared, and that nothing else does."""

import copy
import re
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

import torch
from bridging import AFTER, BEFORE, SHAPES, Named, assert_close, continued, grads, params

import gradstep as gs
import gradstep.torch

ADAM = {"bias_correction": True}
SHARED: list[Any] = [
    (torch.optim.SGD, {"lr": 0.1}, gs.SGD, {}),
    (torch.optim.SGD, {"lr": 0.1, "weight_decay": 0.2}, gs.SGD, {}),
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}, gs.SGD, {"momentum": 0.5}),
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.2}, gs.SGD, {"momentum": 0.5}),
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}, gs.SGD, {"momentum": 0.5, "nesterov": True}),
    (torch.optim.RMSprop, {"lr": 0.01, "alpha": 0.8, "eps": 1e-3}, gs.RMSprop, {}),
    (torch.optim.Adagrad, {"lr": 0.1}, gs.Adagrad, {}),
    (torch.optim.Adagrad, {"lr": 0.1, "initial_accumulator_value": 0.5, "eps": 1e-3}, gs.Adagrad, {}),
    (torch.optim.Adadelta, {"lr": 0.7, "rho": 0.8, "eps": 1e-3}, gs.AdaDelta, {}),
    (torch.optim.Adam, {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-3}, gs.Adam, ADAM),
    (torch.optim.AdamW, {"lr": 0.01}, gs.AdamW, ADAM),
    (torch.optim.AdamW, {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.3}, gs.AdamW, ADAM),
    (gradstep.torch.AdamW, {"lr": 0.01, "weight_decay": 0.3}, gs.AdamW, ADAM),
    (gradstep.torch.SGD, {"lr": 0.1, "momentum": 0.9}, gs.SGD, {}),
    (gradstep.torch.Lion, {"lr": 0.01, "betas": (0.8, 0.95), "weight_decay": 0.3}, gs.Lion, {}),
]
IDS = [f"{cls.__module__.split('.')[0]}.{cls.__name__}-{i}" for i, (cls, *_) in enumerate(SHARED)]
every_shared_family = pytest.mark.parametrize(("torch_class", "arguments", "family", "own"), SHARED, ids=IDS)


def parameters(weights: Named) -> dict[str, Any]:
    return {name: torch.nn.Parameter(torch.tensor(weight)) for name, weight in weights.items()}


def taken(optimizer: Any, weights: dict[str, Any], first: int, last: int) -> Named:
    for step in range(first, last):
        for name, gradient in grads(step).items():
            weights[name].grad = torch.tensor(gradient)
        optimizer.step()
    return values(weights)


def values(weights: dict[str, Any]) -> Named:
    return {name: weight.detach().numpy().copy() for name, weight in weights.items()}


def assert_same_state_dict(found: Any, expected: Any) -> None:
    assert found["param_groups"] == expected["param_groups"]
    assert found["state"].keys() == expected["state"].keys()
    for key, entries in expected["state"].items():
        assert found["state"][key].keys() == entries.keys()
        for entry, tensor in entries.items():
            other = found["state"][key][entry]
            assert (other.dtype, other.shape) == (tensor.dtype, tensor.shape)
            assert torch.equal(other, tensor)


@pytest.mark.parametrize("array", [np.array, torch.tensor], ids=["numpy", "torch"])
@every_shared_family
def test_the_core_goes_on_where_torch_left_off(torch_class: Any, arguments: Any, family: Any, own: Any, array: Any):
    weights = parameters(params())
    theirs = torch_class(weights.values(), **arguments)
    middle = taken(theirs, weights, 0, BEFORE)
    state_dict = copy.deepcopy(theirs.state_dict())
    expected = taken(theirs, weights, BEFORE, BEFORE + AFTER)

    opt = family(0.5, **own)
    assert (
        opt.load_state_dict(gs.from_torch(state_dict, list(SHAPES)), like={n: array(w) for n, w in middle.items()})
        == []
    )
    assert_close(continued(opt, middle, BEFORE, BEFORE + AFTER, array), expected)


@every_shared_family
def test_torch_goes_on_where_the_core_left_off(torch_class: Any, arguments: Any, family: Any, own: Any):
    weights = parameters(params())
    theirs = torch_class(weights.values(), **arguments)
    start = taken(theirs, weights, 0, 1)
    opt = family(0.5, **own)
    opt.load_state_dict(gs.from_torch(copy.deepcopy(theirs.state_dict()), SHAPES))
    expected = taken(theirs, weights, 1, BEFORE + AFTER)

    middle = parameters(continued(opt, start, 1, BEFORE))
    new = torch_class(middle.values(), lr=0.5)
    new.load_state_dict(gs.to_torch(opt, SHAPES))
    assert_close(taken(new, middle, BEFORE, BEFORE + AFTER), expected)


@every_shared_family
def test_there_and_back_changes_no_bit(torch_class: Any, arguments: Any, family: Any, own: Any):
    weights = parameters(params())
    theirs = torch_class(weights.values(), **arguments)
    taken(theirs, weights, 0, BEFORE)
    opt = family(0.5, **own)
    opt.load_state_dict(gs.from_torch(theirs.state_dict(), SHAPES))
    expected = theirs.state_dict()
    for group in expected["param_groups"]:  # with state for everybody, nothing begins there any more
        group.update({"initial_accumulator_value": 0} if "initial_accumulator_value" in group else {})
    assert_same_state_dict(gs.to_torch(opt, SHAPES), expected)


def adamw(**options: Any) -> tuple[Any, dict[str, Any]]:
    weights = parameters(params())
    theirs = torch.optim.AdamW(weights.values(), **options)
    taken(theirs, weights, 0, BEFORE)
    return theirs, weights


def loaded(family: Any, state_dict: Any, names: Any = tuple(SHAPES), **own: Any) -> Any:
    opt = family(0.5, **own)
    opt.load_state_dict(gs.from_torch(state_dict, names))
    return opt


def test_hyperparameters_and_counts_come_along():
    theirs, _ = adamw(lr=torch.tensor(0.25), betas=(0.5, 0.75), eps=1e-3, weight_decay=0.125)
    opt = loaded(gs.AdamW, theirs.state_dict())
    assert opt.hyperparameters == {
        "learning_rate": 0.25, "betas": (0.5, 0.75), "eps": 1e-3, "weight_decay": 0.125, "bias_correction": True,
    }  # fmt: skip
    assert type(opt.learning_rate) is float
    assert opt.step == BEFORE and opt.steps == dict.fromkeys(SHAPES, BEFORE)


def test_the_optimizer_may_keep_its_own_hyperparameters_and_schedules_go_on_from_the_step():
    theirs, _ = adamw(lr=0.25)
    opt = gs.AdamW(lambda step: 1.0 + step, bias_correction=True)
    opt.load_state_dict(gs.from_torch(theirs.state_dict(), SHAPES), hyperparameters="mine")
    assert opt.learning_rate == 1.0 + BEFORE
    assert gs.to_torch(opt)["param_groups"][0]["lr"] == 1.0 + BEFORE


@pytest.mark.parametrize(
    "names", [list(SHAPES), tuple(SHAPES), dict.fromkeys(SHAPES), iter([(n, 0) for n in SHAPES]), None],
    ids=["list", "tuple", "dict", "pairs", "none"],
)  # fmt: skip
def test_names_may_be_given_in_many_ways(names: Any):
    weights = parameters(params())
    theirs = torch.optim.AdamW(weights.items() if names is None else weights.values())
    taken(theirs, weights, 0, 1)
    assert list(loaded(gs.AdamW, theirs.state_dict(), names, bias_correction=True).state) == list(SHAPES)


def test_named_parameters_of_a_module_are_names():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    theirs = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.ones(3)).sum().backward()
    theirs.step()
    opt = loaded(gs.SGD, theirs.state_dict(), model.named_parameters(), momentum=0.5)
    assert list(opt.state) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    new = torch.optim.SGD(model.parameters(), lr=0.1)
    new.load_state_dict(gs.to_torch(opt, model.named_parameters()))
    assert_same_state_dict(new.state_dict(), theirs.state_dict())


def test_groups_that_differ_become_mappings_and_groups_again():
    weights = parameters(params())
    first, second, third, fourth = weights.values()
    theirs = torch.optim.AdamW(
        [{"params": [first, second], "lr": 0.1}, {"params": [third], "betas": (0.5, 0.75)}, {"params": [fourth]}],
        lr=0.02, weight_decay=0.5,
    )  # fmt: skip
    theirs.param_groups[2]["weight_decay"] = 0.25
    middle = taken(theirs, weights, 0, BEFORE)
    opt = loaded(gs.AdamW, theirs.state_dict(), bias_correction=True)
    assert opt.hyperparameters["betas"] == {"layers.1.weight": (0.5, 0.75), "*": (0.9, 0.999)}
    assert opt.hyperparameters["weight_decay"] == {"scale": 0.25, "*": 0.5}
    assert opt.learning_rate in ({"layers.0.weight": 0.1, "layers.0.bias": 0.1, "*": 0.02},
                                 {"layers.1.weight": 0.02, "scale": 0.02, "*": 0.1})  # fmt: skip
    assert_same_state_dict(gs.to_torch(opt, SHAPES), theirs.state_dict())
    expected = taken(theirs, weights, BEFORE, BEFORE + AFTER)
    assert_close(continued(opt, middle, BEFORE, BEFORE + AFTER), expected)


def test_names_are_globs_that_match_themselves_alone():
    rates = {"a[0]": 0.1, "a0": 0.5, "b*": 0.1, "bb": 0.5, "c?": 0.1, "cc": 0.5, "d": 0.5}
    theirs = torch.optim.SGD([{"params": [torch.nn.Parameter(torch.ones(2))], "lr": rate} for rate in rates.values()])
    opt = loaded(gs.SGD, theirs.state_dict(), rates)
    assert opt.learning_rate == {"a[[]0]": 0.1, "b[*]": 0.1, "c[?]": 0.1, "*": 0.5}
    held = {name: np.zeros(2, np.float32) for name in rates}
    opt.apply_gradients({name: np.ones(2, np.float32) for name in rates}, held)
    assert [float(-weight[0]) for weight in held.values()] == pytest.approx(list(rates.values()))


def test_groups_that_are_interleaved_come_in_the_order_of_their_first_parameters():
    opt = gs.SGD({"*.bias": 0.5, "*": 0.1}, momentum=0.9)
    held = {"a.weight": np.ones(1), "a.bias": np.ones(2), "b.weight": np.ones(3), "b.bias": np.ones(4)}
    opt.apply_gradients({name: np.ones_like(weight) for name, weight in held.items()}, held)
    state_dict = gs.to_torch(opt)
    assert [(group["lr"], group["params"]) for group in state_dict["param_groups"]] == [(0.1, [0, 1]), (0.5, [2, 3])]
    assert [len(state_dict["state"][i]["momentum_buffer"]) for i in range(4)] == [1, 3, 2, 4]


def test_parameters_without_state_stay_without():
    weights = parameters(params())
    theirs = torch.optim.Adam(weights.values(), lr=0.01)
    weights["scale"].grad = torch.tensor(1.0)
    theirs.step()
    middle = values(weights)
    opt = loaded(gs.Adam, theirs.state_dict(), bias_correction=True)
    assert list(opt.state) == ["scale"] and opt.steps == {"scale": 1}
    assert_same_state_dict(gs.to_torch(opt, SHAPES), theirs.state_dict())
    assert_close(continued(opt, middle, 1, 4), taken(theirs, weights, 1, 4))


def test_strangers_are_refused_after_loading():
    theirs, _ = adamw(lr=0.1)
    opt = loaded(gs.AdamW, theirs.state_dict())
    with pytest.raises(gs.MismatchError, match="'other'"):
        opt.apply_gradients({"other": np.ones(2, np.float32)}, {"other": np.ones(2, np.float32)})


def test_momentum_that_torch_has_switched_off_is_left_behind():
    weights = parameters(params())
    theirs = torch.optim.SGD(weights.values(), lr=0.1, momentum=0.9)
    middle = taken(theirs, weights, 0, 2)
    theirs.param_groups[0]["momentum"] = 0
    opt = gs.SGD(0.5)
    like = {name: np.array(weight) for name, weight in middle.items()}
    assert opt.load_state_dict(gs.from_torch(theirs.state_dict(), SHAPES), like=like) == []
    assert_close(continued(opt, middle, 2, 4), taken(theirs, weights, 2, 4))


def test_sgd_counts_one_step_for_what_has_a_buffer():
    weights = parameters(params())
    theirs = torch.optim.SGD(weights.values(), lr=0.1, momentum=0.9)
    taken(theirs, weights, 0, 3)
    opt = loaded(gs.SGD, theirs.state_dict())
    assert opt.step == 1 and opt.steps == dict.fromkeys(SHAPES, 1)
    assert loaded(gs.SGD, torch.optim.SGD(weights.values(), lr=0.1).state_dict()).step == 0


def test_tensors_are_copies_and_whole_optimizers_can_be_saved():
    opt = gs.SGD(0.1, momentum=0.9)
    held = {"w": np.ones(3, np.float32)}
    opt.apply_gradients({"w": np.ones(3, np.float32)}, held)
    state_dict = gs.to_torch(opt)
    opt.apply_gradients({"w": np.ones(3, np.float32)}, held)
    assert state_dict["state"][0]["momentum_buffer"].tolist() == [1, 1, 1]


def test_state_that_has_been_loaded_and_not_used_yet_can_be_converted():
    theirs, _ = adamw(lr=0.1)
    fresh = gs.AdamW(0.5, bias_correction=True)
    fresh.load_state_dict(gs.from_torch(theirs.state_dict(), SHAPES))
    assert_same_state_dict(gs.to_torch(gs.Accumulate(fresh, every=2)), theirs.state_dict())


def test_bfloat16_slots_pass_as_they_are():
    w = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    theirs = torch.optim.AdamW([w], lr=0.1)
    w.grad = torch.full((3,), 0.3, dtype=torch.bfloat16)
    theirs.step()
    opt = gs.AdamW(0.1, bias_correction=True, slot_dtype="bfloat16")
    like = {"w": w.detach()}
    assert opt.load_state_dict(gs.from_torch(theirs.state_dict(), ["w"]), like=like) == []
    assert_same_state_dict(gs.to_torch(opt), theirs.state_dict())


def test_the_groups_have_every_key_of_torchs_class():
    for torch_class, arguments, family, own in SHARED:
        opt = family(0.5, **own)
        opt.init(params())
        w = torch.nn.Parameter(torch.ones(()))
        fresh = torch_class([w], **arguments).state_dict()["param_groups"][0]
        assert gs.to_torch(opt)["param_groups"][0].keys() == fresh.keys()


# Refusals


@pytest.mark.parametrize(
    ("torch_class", "arguments", "what"),
    [
        (torch.optim.Adamax, {}, r"Adamax cannot go on in the core: .*gradstep\.torch\.Adamax"),
        (torch.optim.Adafactor, {}, r"Adafactor cannot.*gradstep\.torch\.Adafactor"),
        (torch.optim.NAdam, {}, "NAdam cannot go on"),
        (torch.optim.RAdam, {}, "RAdam cannot go on"),
        (torch.optim.ASGD, {}, "ASGD cannot go on"),
        (torch.optim.Rprop, {}, "Rprop cannot go on"),
        (torch.optim.LBFGS, {}, "LBFGS cannot go on"),
        (torch.optim.SparseAdam, {}, "SparseAdam cannot go on"),
        (torch.optim.Adam, {"weight_decay": 0.1}, r"Adam with weight_decay=0\.1 .*AdamW"),
        (torch.optim.Adam, {"amsgrad": True}, "amsgrad=True"),
        (torch.optim.AdamW, {"amsgrad": True}, "amsgrad=True"),
        (torch.optim.RMSprop, {"centered": True}, "centered=True"),
        (torch.optim.RMSprop, {"momentum": 0.9}, r"momentum=0\.9"),
        (torch.optim.RMSprop, {"weight_decay": 0.9}, r"weight_decay=0\.9"),
        (torch.optim.Adagrad, {"lr_decay": 0.1}, r"lr_decay=0\.1"),
        (torch.optim.Adagrad, {"weight_decay": 0.1}, r"weight_decay=0\.1"),
        (torch.optim.Adadelta, {"weight_decay": 0.1}, r"weight_decay=0\.1"),
        *((cls, {"maximize": True}, "maximize=True") for cls in dict.fromkeys(row[0] for row in SHARED)),
        (torch.optim.SGD, {"momentum": 0.9, "dampening": 0.5}, "dampening above 0 begins otherwise.*'w'"),
    ],
)  # fmt: skip
def test_other_formulas_are_refused(torch_class: Any, arguments: Any, what: str):
    theirs = torch_class([torch.nn.Parameter(torch.ones(2, 2))], **arguments)
    with pytest.raises(gs.ConfigurationError, match=what):
        gs.from_torch(theirs.state_dict(), ["w"])


def test_muon_is_refused_both_ways():
    with pytest.raises(gs.ConfigurationError, match=r"Muon cannot.*gradstep\.torch\.Muon"):
        gs.from_torch(torch.optim.Muon([torch.nn.Parameter(torch.ones(2, 2))]).state_dict(), ["w"])
    for family in (gs.Muon, gs.Adafactor, gs.Adamax):
        with pytest.raises(gs.ConfigurationError, match=rf"{family.__name__} cannot go on in torch.*gradstep\.torch"):
            gs.to_torch(family(0.1))


def test_configuration_in_which_groups_differ_is_refused():
    weights = list(parameters(params()).values())
    theirs = torch.optim.SGD([{"params": weights[:1], "nesterov": True}, {"params": weights[1:]}], lr=0.1, momentum=0.9)
    with pytest.raises(gs.ConfigurationError, match=r"differ in nesterov.*MultiOptimizer"):
        gs.from_torch(theirs.state_dict(), SHAPES)


@pytest.mark.parametrize(
    ("names", "error", "what"),
    [
        (["a", "b"], gs.ConfigurationError, "names has 2 names, 'a', 'b', but the state dict has 4 parameters"),
        ([*SHAPES, "more"], gs.ConfigurationError, "names has 5 names"),
        (None, gs.ConfigurationError, "has 4 parameters and 0 names.*named_parameters"),
        (["a", "b", "c", "a"], gs.DuplicateNameError, "'a' more than once"),
        (["a", "b", "c", 3], gs.ArgumentTypeError, r"names\[3\] must be a name, got 3"),
        ("abcd", gs.ArgumentTypeError, "must be a list of names"),
        (4, gs.ArgumentTypeError, "must be a list of names"),
        (torch.nn.Linear(2, 2), gs.ArgumentTypeError, r"pass model\.named_parameters\(\)"),
    ],
)  # fmt: skip
def test_names_that_do_not_fit_are_refused(names: Any, error: Any, what: str):
    theirs, _ = adamw(lr=0.1)
    with pytest.raises(error, match=what):
        gs.from_torch(theirs.state_dict(), names)


def test_what_is_no_state_dict_of_torch_is_refused():
    theirs, _ = adamw(lr=0.1)
    with pytest.raises(gs.ArgumentTypeError, match=r"got AdamW; pass opt\.state_dict"):
        gs.from_torch(theirs, SHAPES)  # pyright: ignore
    for wrong in ({"w": 1}, [], None):
        with pytest.raises(gs.ArgumentTypeError, match="'state' and 'param_groups'"):
            gs.from_torch(wrong, SHAPES)  # pyright: ignore
    with pytest.raises(gs.ConfigurationError, match="no param groups"):
        gs.from_torch({"state": {}, "param_groups": []}, [])
    with pytest.raises(gs.ConfigurationError, match=r"no class of torch\.optim: they have 'lr', 'params'"):
        gs.from_torch({"state": {}, "param_groups": [{"lr": 1, "params": [0]}]}, ["w"])


def test_an_adam_of_an_old_torch_is_refused_because_it_may_be_adamw():
    theirs, _ = adamw(lr=0.1)
    state_dict = theirs.state_dict()
    del state_dict["param_groups"][0]["decoupled_weight_decay"]
    with pytest.raises(gs.ConfigurationError, match=r"lack 'decoupled_weight_decay'.*torch.optim.AdamW"):
        gs.from_torch(state_dict, SHAPES)


@pytest.mark.parametrize("change", ["missing", "strange", "no step", "half a step"])
def test_damaged_state_is_refused(change: str):
    theirs, _ = adamw(lr=0.1)
    state_dict = theirs.state_dict()
    entry = state_dict["state"][2]
    if change == "missing":
        del entry["exp_avg"]
    elif change == "strange":
        entry["other"] = entry["exp_avg"]
    elif change == "no step":
        del entry["step"]
    else:
        entry["step"] = torch.tensor(1.5)
    with pytest.raises(gs.ConfigurationError, match=r"layers\.1\.weight"):
        gs.from_torch(state_dict, SHAPES)


def test_the_wrong_family_does_not_load():
    theirs, _ = adamw(lr=0.1)
    with pytest.raises(gs.MismatchError, match="AdamW in the checkpoint, Adam here"):
        loaded(gs.Adam, theirs.state_dict())


def stepped(opt: Any) -> Any:
    opt.apply_gradients({"w": np.ones(300, np.float32)}, {"w": np.ones(300, np.float32)})
    return opt


def test_optimizers_that_torch_does_not_have_are_refused():
    @gs.rule
    def Mine(w: Any, g: Any, *, learning_rate: Any):
        return w - learning_rate * g

    half = gs.Accumulate(gs.SGD(0.1), every=2)
    half.apply_gradients({"w": np.ones(2)}, {"w": np.ones(2)})
    bfloat16 = torch.ones(3, dtype=torch.bfloat16)
    masters = gs.SGD(0.1, momentum=0.9, master_weights=True)
    masters.apply_gradients({"w": bfloat16.clone()}, {"w": bfloat16})
    multi = gs.MultiOptimizer([gs.SGD(0.1), gs.SGD(0.2)], ["b"])
    for opt, error, what in (
        (stepped(Mine(0.1)), gs.ConfigurationError, "a rule of your own"),
        (multi, gs.ConfigurationError, r"convert each of opt\.optimizers"),
        (gs.Accumulate(multi, every=1), gs.ConfigurationError, r"convert each of opt\.optimizers"),
        (half, gs.ConfigurationError, r"micro_step is 1.*discard"),
        (stepped(gs.Adam(0.1)), gs.ConfigurationError, "always has bias_correction=True, but Adam has"),
        (stepped(gs.SGD(0.1, momentum=0.9, slot_dtype="int8")), gs.ConfigurationError, r"'v\.codes', 'v\.scales'"),
        (masters, gs.ConfigurationError, r"'w\.master'"),
        (torch.optim.SGD([bfloat16], lr=0.1), gs.ArgumentTypeError, "of gradstep's core"),
        (gs.SGD(0.1), gs.ConfigurationError, "no parameters yet"),
    ):
        with pytest.raises(error, match=what):
            gs.to_torch(opt)


def test_names_for_torch_must_cover_the_state():
    opt = stepped(gs.Adagrad(0.1))
    with pytest.raises(gs.MismatchError, match="names lacks 'w'"):
        gs.to_torch(opt, ["v"])
    with pytest.raises(gs.ConfigurationError, match=r"Adagrad needs state for every parameter.*'v'"):
        gs.to_torch(opt, ["w", "v"])
    opt = stepped(gs.SGD(0.1, momentum=0.9, dampening=0.5))
    with pytest.raises(gs.ConfigurationError, match=r"SGD with dampening begins otherwise.*'v'"):
        gs.to_torch(opt, ["w", "v"])
    assert len(gs.to_torch(stepped(gs.SGD(0.1)), ["w", "v"])["param_groups"][0]["params"]) == 2


def test_a_state_dict_of_torch_loaded_as_it_is_leads_to_the_bridge():
    theirs, _ = adamw(lr=0.1)
    with pytest.raises(gs.CheckpointError, match=re.escape("from_torch")):
        gs.AdamW(0.1).load_state_dict(theirs.state_dict())
