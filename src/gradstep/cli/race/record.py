"""The files of a race: what `race.json` holds."""

from collections.abc import Mapping, Sequence

from gradstep.cli.files import made
from gradstep.cli.race.contest import Run
from gradstep.cli.race.ranking import Place

SCHEMA = 1


def document(
    options: Mapping[str, object], runs: Sequence[Run], places: Sequence[Place], planned: int
) -> dict[str, object]:
    """Everything about a race, as plain values; `complete` is false when it was cut short."""
    return {
        "schema": SCHEMA,
        "complete": len(runs) == planned,
        "planned_runs": planned,
        "made": made(),
        "options": dict(options),
        "ranking": [_place(number, place) for number, place in enumerate(places, 1)],
        "runs": [_run(run) for run in runs],
    }


def _place(number: int, place: Place) -> dict[str, object]:
    spread = dict(zip(("lowest", "highest"), place.range or (None, None), strict=True))
    return {
        "place": number,
        "optimizer": place.entrant.name,
        "configuration": place.best.runs[0].configuration,
        "best_rate": None if place.final_loss is None else place.best.rate,
        "edge": place.edge,
        "usual_rate": place.entrant.usual,
        "final_loss": {"median": place.final_loss, **spread},
        "metrics": place.metrics,
        "step_us": place.step_us,
        "state_bytes": place.state_bytes,
        "runs": len(place.runs),
        "diverged": place.diverged,
        "diverged_at": place.diverged_at,
    }


def _run(run: Run) -> dict[str, object]:
    return {
        "optimizer": run.entrant,
        "rate": run.rate,
        "seed": run.seed,
        "configuration": run.configuration,
        "first_loss": run.first_loss,
        "final_loss": run.final_loss,
        "metrics": run.metrics,
        "step_us": run.step_us,
        "state_bytes": run.state_bytes,
        "diverged_at": run.diverged_at,
        "diverged_how": run.diverged_how,
        # losses[i] is the mean over the steps i*window to (i+1)*window - 1
        "curve": {"window": run.curve.window, "losses": [float(f"{loss:.6g}") for loss in run.curve.losses]},
    }
