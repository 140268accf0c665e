"""The same facts as JSON: what `--json` prints."""

import math
from typing import Any

from gradstep.checkpoint.matching import title_of
from gradstep.checkpoint.nodes import FORMAT, AccumulateNode, DiLoCoNode, RuleNode
from gradstep.cli.checkpoint.changes import Difference, Pair, has_codes
from gradstep.cli.checkpoint.contents import Array, Contents, Parameter, Part, changed_options, totals
from gradstep.cli.checkpoint.measuring import Measure
from gradstep.cli.checkpoint.schedules import Curve, Scheduled, schedules_of
from gradstep.cli.checkpoint.verification import Verification


def inspection(contents: Contents, verification: Verification | None) -> dict[str, Any]:
    """A checkpoint; values are encoded as in the file."""
    arrays = contents.arrays
    found: dict[str, Any] = {
        "file": str(contents.path),
        "bytes": contents.size,
        "shards": contents.shards,
        "gradstep": contents.version,
        "format": FORMAT,
        "optimizer": _part(contents.tree),
        "parameters": [_parameter(parameter) for parameter in contents.parameters],
        "totals": [
            {"role": total.role, "array": total.label, "tensors": total.tensors, "bytes": total.bytes}
            for total in totals(arrays)
        ],
        "tensors": len(arrays),
        "tensor_bytes": sum(array.bytes for array in arrays),
    }
    if verification is not None:
        found["verified"] = {
            "tensors": verification.tensors, "bytes": verification.bytes, "damaged": list(verification.damaged)
        }  # fmt: skip
    return found


def difference(found: Difference) -> dict[str, Any]:
    """What changed between two checkpoints."""
    sides = {"a": found.a, "b": found.b}
    return {
        **{side: {"file": str(one.path), "gradstep": one.version} for side, one in sides.items()},
        "equal": found.is_empty,
        "changes": [{"where": c.where, "a": c.a, "b": c.b, "parameters": list(c.parameters)} for c in found.changes],
        "tensors": [{**_pair(pair), **_measure(measure)} for pair, measure in found.changed],
        "equal_tensors": found.same,
    }


def _pair(pair: Pair) -> dict[str, Any]:
    return {"parameter": pair.parameter, "role": pair.a.role, "array": pair.a.label, "codes": has_codes(pair)}


def _measure(measure: Measure) -> dict[str, Any]:
    return {
        "largest": _number(measure.largest),
        "relative": _number(measure.relative),
        "differing": measure.differing,
        "elements": measure.elements,
    }


def _number(value: float) -> float | str:
    """A number, or the name of what JSON has no number for."""
    return value if math.isfinite(value) else repr(value)


def _part(part: Part) -> dict[str, Any]:
    node, found = part.node, {"where": part.where, "family": title_of(part.node)}
    if isinstance(node, AccumulateNode):
        counters = {"every": node.every, "micro_step": node.micro_step, "sums": list(node.sums)}
        return {**found, **counters, "optimizers": [_part(child) for child in part.children]}
    if isinstance(node, DiLoCoNode):
        counters = {"every": node.every, "wire": node.wire, "round": node.round, "taken": node.taken}
        return {**found, **counters, "optimizers": [_part(child) for child in part.children]}
    facts: dict[str, Any] = {**found, "filter": part.filter, "step": node.step, "options": changed_options(node)}
    if not isinstance(node, RuleNode):
        return {**facts, "optimizers": [_part(child) for child in part.children]}
    schedules = {one.label: _schedule(one, node.step) for one in schedules_of(node)}
    return {**facts, "hyperparameters": dict(node.hyperparameters), "schedules": schedules}


def _schedule(scheduled: Scheduled, step: int) -> dict[str, Any]:
    resolved, curve = scheduled.resolved, scheduled.curve(step)
    last = None if resolved is None else {"step": resolved.stamp, "value": _number(resolved.value)}
    pending = None
    if resolved is not None and resolved.pending is not None:
        pending = {"step": resolved.pending[0], "value": _number(resolved.pending[1])}
    return {"last": last, "pending": pending, "curve": None if curve is None else _curve(curve, step)}


def _curve(curve: Curve, step: int) -> dict[str, Any]:
    coming = {"step": step, "value": _number(curve.coming)}
    return {"coming": coming, "steps": list(curve.steps), "values": [_number(value) for value in curve.values]}


def _parameter(parameter: Parameter) -> dict[str, Any]:
    found: dict[str, Any] = {"name": parameter.name, "optimizer": parameter.optimizer, "steps": parameter.steps}
    by_role = {role: [array for array in parameter.arrays if array.role == role] for role in ("parameter", "sum")}
    return {
        **found,
        **{role: _array(arrays[0]) if arrays else None for role, arrays in by_role.items()},
        "slots": {array.label: _array(array) for array in parameter.arrays if array.role == "slot"},
        "outer": {array.label: _array(array) for array in parameter.arrays if array.role == "outer"},
    }


def _array(array: Array) -> dict[str, Any]:
    return {"key": array.key, "dtype": array.shape.dtype, "shape": list(array.shape.shape), "bytes": array.bytes}
