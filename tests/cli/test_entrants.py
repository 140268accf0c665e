"""Who races, at which rates, and what is said about names, rules and rates that cannot serve."""

from pathlib import Path

import numpy as np
import pytest
from racing import Bowl

import gradstep as gs
from gradstep.cli.complaint import Complaint
from gradstep.cli.race.entrants import FAMILIES, choose, read_rates, try_entrants
from gradstep.cli.race.task import Problem, try_task

RULES = """
import gradstep as gs

@gs.rule
def Signum(w, g, m, *, learning_rate, momentum=0.9):
    m = momentum * m + (1 - momentum) * g
    return w - learning_rate * gs.sign(m), m

@gs.rule
def Small(w, g, *, learning_rate=1e-5):
    return w - learning_rate * g

@gs.rule
def Lion(w, g, *, learning_rate):
    return w - learning_rate * g

def decaying(rate):
    return gs.AdamW(gs.cosine_decay(rate, 100))

def number(rate):
    return rate

def picky(rate):
    raise RuntimeError("not today")

def branching(rate):
    @gs.rule
    def Branching(w, g, *, learning_rate):
        return w if g > 0 else w - g
    return Branching(rate)

table = {"a": 1}
"""


@pytest.fixture
def rules(tmp_path: Path) -> Path:
    path = tmp_path / "rules.py"
    path.write_text(RULES)
    return path


def test_every_public_family_races():
    public = {
        name
        for name in gs.__all__
        if isinstance(getattr(gs, name), type) and issubclass(getattr(gs, name), gs.Optimizer)
    }
    public -= {"Optimizer", "MultiOptimizer", "Accumulate", "DiLoCo", "Sharded"}
    assert {family.spec for family in FAMILIES} == {name.lower() for name in public}
    assert choose(None) == list(FAMILIES)


def test_names_are_read_in_any_case_and_in_order():
    assert [entrant.name for entrant in choose("LION, adamw,Muon,lion")] == ["Lion", "AdamW", "Muon+AdamW"]


def test_rules_of_ones_own_race_beside_the_families(rules: Path):
    chosen = choose(f"lion,{rules}:Signum,{rules}:Small,{rules}:Lion,{rules}:decaying")
    assert [entrant.name for entrant in chosen] == ["Lion", "Signum", "Small", f"{rules}:Lion", "decaying"]
    assert [entrant.usual for entrant in chosen[1:3]] == [1e-3, 1e-5]
    assert [type(entrant.build(0.1)).__name__ for entrant in chosen] == ["Lion", "Signum", "Small", "Lion", "AdamW"]


def test_rates_lie_around_the_usual_one_unless_chosen():
    (adam,) = choose("adam")
    assert adam.rates(None) == [1e-4, 3e-4, 1e-3, 3e-3, 1e-2]
    assert adam.rates(read_rates("0.5, 1e-3,0.5")) == [1e-3, 0.5]
    assert read_rates(None) is None


def test_muon_takes_the_matrices_and_adamw_the_rest():
    (muon,) = choose("muon")
    optimizer = muon.build(0.04)
    params = {"matrix": np.ones((2, 3)), "vector": np.ones(3), "kernel": np.ones((2, 2, 2, 2))}
    optimizer.apply_gradients({name: np.ones_like(array) for name, array in params.items()}, params)
    assert set(optimizer.state["matrix"]) == set(optimizer.state["kernel"]) == {"v"}
    assert set(optimizer.state["vector"]) == {"m", "v"}
    assert params["vector"] == pytest.approx((1 - 0.002 * 0.01) - 0.002, rel=1e-6)
    assert repr(muon.build(0.04)) == repr(optimizer)
    assert "0x" not in repr(optimizer)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("adamv", "there is no 'adamv'. Did you mean adam"),
        ("quickprop", "Choose from sgd, rmsprop"),
        (" , ", "names nobody"),
        ("{rules}:Nobody", "defines no 'Nobody'"),
        ("{rules}:table", "is a dict, which builds no optimizer"),
        ("nowhere.py:Rule", "there is no file nowhere.py"),
    ],
)
def test_unknown_names_are_explained(rules: Path, names: str, expected: str):
    with pytest.raises(Complaint) as complaint:
        choose(names.format(rules=rules))
    assert expected in str(complaint.value)


@pytest.mark.parametrize("text", ["fast", "1e-3,-1", "0", "nan", "inf", "", ","])
def test_rates_that_cannot_serve_are_explained(text: str):
    with pytest.raises(Complaint, match="--rates"):
        read_rates(text)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("number", "gave a float, which is no optimizer"),
        ("picky", "raised RuntimeError:\nRuntimeError: not today"),
        ("branching", "branching cannot race: "),
    ],
)
def test_what_cannot_step_is_found_before_the_race(rules: Path, name: str, expected: str):
    problem = Problem("bowl", Bowl())
    with pytest.raises(Complaint) as complaint:
        try_entrants(choose(f"sgd,{rules}:{name}"), None, lambda: problem.init(0), try_task(problem))
    assert expected in str(complaint.value)
