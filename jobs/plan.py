"""Make a plan from a sweep folder.

    python jobs/plan.py runs/demo --layers 5
    python jobs/plan.py runs/demo --flops-ratio 0.55 --mode no-visual-queries
    python jobs/plan.py runs/demo --max-lc 0.003 --mode drop-visual
    python jobs/plan.py runs/demo --layers 5 --random 0

Exit status: 0 the plan is there, 1 it could not be written, 2 refused.
"""

import contextlib
import sys
from pathlib import Path
from typing import Annotated, Any, Self

import click
from pydantic import Field, model_validator

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from jobs.common import options_of, place_of, run
from reports.store import Folder
from shortv.errors import Refused, ShortVError
from shortv.plan import PLAN_FILE, Mode, Plan
from shortv.records import KlDirection
from shortv.spec import Seed, Spec, flag_of, load_spec
from shortv.sweep.planning import Choice, Control, Request, choose_layers
from shortv.sweep.ranking import set_stability
from shortv.workers.run import check_output
from shortv.workers.sweep.result import SweepResult, make_plan, read_sweep

_MODES = ", ".join(mode for mode in Mode if mode is not Mode.FULL)


class PlanSpec(Spec):
    """Which layers of a swept model get which mode, and where the plan is written."""

    layers: int | None = Field(None, description="Replace this many layers. [default: 0.6 of them]")
    flops_ratio: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None, description="Replace the fewest layers that get the FLOPs down to this share."
    )
    max_lc: float | None = Field(None, description="Replace the layers whose LC, in nats, is at most this.")
    mode: Mode = Field(Mode.FREEZE_VISUAL, description=f"One of {_MODES}.")
    random: Seed | None = Field(None, description="Control: layers drawn with this seed.")
    first: bool = Field(False, description="Control: the first layers.")
    last: bool = Field(False, description="Control: the last layers.")
    name: str | None = Field(None, description="Name of the plan. [default: mode and number of layers]")
    output: str | None = Field(
        None,
        description="Plan file. [default: SWEEP_FOLDER/plans/NAME.json]",
        json_schema_extra={"flag": "--output-path", "short": "--output"},
    )
    kl_direction: KlDirection | None = Field(
        None, description=f"Rank by this, {', '.join(KlDirection)}. [default: the sweep's]"
    )

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.mode is Mode.FULL:
            raise ValueError(f"--mode full replaces nothing; give one of {_MODES}")
        for names in (("layers", "flops_ratio", "max_lc"), ("random", "first", "last")):
            given = [flag_of(name) for name in names if getattr(self, name) not in (None, False)]
            if len(given) > 1:
                raise ValueError(f"{' and '.join(given)} exclude each other; give one of them")
        return self

    @property
    def request(self) -> Request:
        """How many layers, and in which order."""
        controls = {Control.RANDOM: self.random is not None, Control.FIRST: self.first, Control.LAST: self.last}
        return Request(
            layers=self.layers,
            flops_ratio=self.flops_ratio,
            max_lc=self.max_lc,
            control=next((control for control, given in controls.items() if given), None),
            control_seed=self.random or 0,
        )


@click.command(help="Make a plan from the results of a sweep.")
@click.argument("sweep_folder")
@options_of(PlanSpec)
def main(sweep_folder: str, **flags: Any) -> int:
    """Check the flags, choose the layers and write the plan. Raises ShortVError."""
    spec = load_spec(PlanSpec, flags=flags)
    if "\0" in sweep_folder:
        raise Refused("SWEEP_FOLDER holds a NUL character; give the output folder of a sweep")
    check_output(spec.output or sweep_folder, "--output" if spec.output else "SWEEP_FOLDER")
    folder = Folder(sweep_folder)
    try:
        result = read_sweep(folder, spec.mode, spec.kl_direction)
    except ShortVError as error:
        # No work has started: a folder that cannot be read is refused, whatever the reason.
        raise Refused(str(error)) from error
    choice = choose_layers(result.evidence, spec.request)
    plan = make_plan(result, spec.request, choice, spec.name)
    target, file = place_of(spec.output, PLAN_FILE) if spec.output else (folder, f"plans/{plan.name}.json")
    outcome = write_once(plan, target, file)
    click.echo(f"{describe(plan, result, spec.request, choice)}\n{outcome}")
    return 0


def describe(plan: Plan, result: SweepResult, request: Request, choice: Choice) -> str:
    """Return what a user wants to know of a plan: its layers, its price, how sure the choice is."""
    evidence = result.evidence
    lines = [
        f"{plan.name}: {evidence.mode} in {len(choice.layers)} of {plan.num_layers} layers, "
        f"the first to replace first: {', '.join(map(str, choice.layers))}",
        f"FLOPs ratio: {plan.flops_ratio:.4f} at {evidence.t:.1f} text and {evidence.v:.1f} visual tokens "
        f"(means of {len(result.kl_SL)} samples)",
    ]
    if request.control or evidence.mode is Mode.DROP_VISUAL:
        return "\n".join([*lines, "stability: the layers follow from their number, not from a ranking by LC"])
    stability = set_stability(
        result.kl_SL, len(choice.layers), noise_floor=result.noise_floor, seed=result.manifest.seed
    )
    shares = [f"{same:.0%} with {share:.0%} of the samples" for share, same in stability.items()]
    return "\n".join([*lines, f"stability: bootstrap resamples choose the same layers in {', '.join(shares)}"])


def write_once(plan: Plan, folder: Folder, file: str) -> str:
    """Write the plan unless it is there already, and return what happened; refuses to replace another one."""
    shown = f"{folder.shown}/{file}"
    if not folder.exists(file):
        folder.write_bytes(file, plan.to_json().encode())
        return f"written to {shown}"
    with contextlib.suppress(Refused):
        if Plan.from_json(folder.read_bytes(file)) == plan:
            return f"{shown} holds this plan already; nothing to do"
    raise Refused(f"{shown} holds something else than this plan; give another --name or --output")


if __name__ == "__main__":
    run(main)
