"""Train the learned parts of an acceleration system for a model, whose own weights stay as they are.

    python jobs/train.py dyvte --output-path runs/dyvte
    python jobs/train.py saisa --language-model attention --output-path runs/saisa
    python jobs/train.py eas --skip 3 --output-path runs/eas
    python jobs/train.py saisa-checkpoint saisa-vicuna --model llava-hf/llava-1.5-7b-hf --output-path runs/saisa-7b
    python jobs/train.py dyvte --model llava-hf/llava-1.5-7b-hf --data train.parquet --workers 4 \\
        --dtype bfloat16 --output-path /data/llava-dyvte
    ray job submit --working-dir . -- python jobs/train.py saisa ... --output-path /shared/saisa

The output folder gets parts/ (safetensors and a header), plans/ that name them, training.parquet and a manifest.
The same command on the same folder continues a training that was stopped, and repeats the result of a finished one.
Exit status: 0 complete, 1 failed while working, 2 refused before work started, 3 finished but some samples failed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

if not __package__:  # run as a script, perhaps in a Ray working directory where nothing is installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import click

from jobs.common import bundled, option, run
from shortv.errors import Refused
from shortv.plan import PartsKind
from shortv.spec import ModelSpec, Spec, WorkerRange, read_chat_template, validate

_COMMON = (
    option("--model", help="Hub id, or a folder with config.json and safetensors. [default: the bundled model]"),
    option("--revision", help="Branch, tag or commit on the hub."),
    option(
        "--data",
        multiple=True,
        help="FILE.parquet in the calibration format, or an lmms-eval TASK:NUMBER; may be repeated. "
        "[default, for the bundled model: generated]",
    ),
    option("--samples", type=int, default=4096, show_default=True, help="Samples to generate."),
    option("--kinds", default="", help="Kinds of generated question, by commas. [default: those of the system]"),
    option("--output-path", required=True, help="Folder or URI (s3://...) for the results."),
    option("--limit", type=float, help="Samples per source; below 1 a share of each file."),
    option("--include-path", help="Folder with your own lmms-eval tasks."),
    option("--steps", type=int, help="Optimizer steps. [default: the recipe's]"),
    option("--batch-size", "-b", type=int, help="Samples per step, over all workers. [default: the recipe's]"),
    option("--learning-rate", type=float, help="Highest learning rate. [default: the recipe's]"),
    option("--seed", type=int, default=0, show_default=True, help="Of weights, order and generated samples."),
    option("--checkpoint-every", type=int, default=100, show_default=True, help="Steps between checkpoints."),
    option("--dtype", type=click.Choice(["auto", "float32", "bfloat16", "float16"]), default="auto", show_default=True),
    option(
        "--parts-dtype",
        type=click.Choice(["float32", "bfloat16", "float16"]),
        default="float32",
        show_default=True,
        help="What the parts are saved in.",
    ),
    option("--attn-implementation", type=click.Choice(["sdpa", "eager"]), default="sdpa", show_default=True),
    option("--trust-remote-code", is_flag=True, help="Run code that comes with the model."),
    option("--chat-template", type=click.Path(), help="Jinja file, for a model without a chat template."),
    option("--workers", help="N or MIN:MAX. [default: one per free GPU, or one on CPUs]"),
    option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True),
    option("--timeout", type=float, default=1800, show_default=True, help="Seconds without a step until giving up."),
    option(
        "--fail-on-error",
        type=float,
        default=0.0,
        show_default=True,
        help="Share of unusable samples that counts as 0.",
    ),
)
_SHARED = ("steps", "batch_size", "learning_rate")
_SEARCH = ("search_steps", "probability", "grows", "held_out", "candidates", "every", "eta")
_EAS = ("skip", "kept_rank", "pia_rank", "start", *_SEARCH)


def common(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the options that every system has."""
    for decorate in reversed(_COMMON):
        command = decorate(command)
    return command


@click.group(help=(__doc__ or "").replace("\n\n", "\n\n\b\n"))
def main() -> None:
    """Hold the systems."""


@main.command("saisa")
@option(
    "--language-model",
    type=click.Choice(["none", "attention", "layers", "all"]),
    help="What the second stage trains of it. [default: all, as the paper]",
)
@option("--stage-1-steps", type=int, help="Steps for the projectors alone; --steps counts both stages.")
@option("--stage-1-learning-rate", type=float, help="Learning rate of those steps. [default: the recipe's]")
@option(
    "--first-stage",
    type=click.Choice(["separate", "shared"]),
    help="Stage 1 trains a projector for each layer, or one for all (so the reviews; that code is not released). "
    "[default: separate: all start as copies of a trained one, and may part at once]",
)
@common
def saisa(**flags: Any) -> int:
    """Projectors that give each layer its own visual tokens."""
    from shortv.learned.saisa.recipe import SaisaRecipe

    base = SaisaRecipe()
    steps, first = flags.pop("steps"), flags.pop("stage_1_steps")
    steps = base.steps if steps is None else steps
    first = round(steps * base.projector_steps / base.steps) if first is None else first
    recipe = {
        "projector_steps": first,
        "joint_steps": steps - first,
        "projector_rate": flags.pop("stage_1_learning_rate"),
        "joint_rate": flags.pop("learning_rate"),
        "language_model": flags.pop("language_model"),
        "first_stage": flags.pop("first_stage"),
        "batch_size": flags.pop("batch_size"),
    }
    return _train(PartsKind.SAISA, SaisaRecipe, recipe, flags)


@main.command("dyvte")
@option("--width", type=int, help="Width of the routers. [default: the recipe's]")
@option(
    "--threshold", multiple=True, type=float, default=(0.5,), show_default=True, help="Exit probability; a plan each."
)
@option(
    "--targets",
    type=click.Choice(["answers", "model"]),
    help="Whose answers must not change: those of the samples (code), or the model's own, for samples that have none. "
    "[default: answers]",
)
@option(
    "--mean-over",
    type=click.Choice(["after-image", "all-text"]),
    help="Text that routers average: after the image (code), or all of the prompt (paper). [default: after-image: text "
    "before an image cannot have read it]",
)
@option(
    "--rule",
    type=click.Choice(["tokens", "exact"]),
    help="An exit is safe where over 99 % of the answer's tokens stay and its cross-entropy below 1.03 times the full "
    "model's (code), or where the answer stays (paper, whose bound on the cross-entropy has no number). [default: "
    "tokens, which also sees answers get less sure]",
)
@option(
    "--ce-slack",
    type=float,
    help="Nats per token that --rule tokens allows beyond the 1.03: where the model is sure, a ratio is noise. "
    "[default: 0; neither paper nor code has it]",
)
@common
def dyvte(threshold: tuple[float, ...], **flags: Any) -> int:
    """Routers that let visual tokens leave when the text has seen enough."""
    from shortv.learned.dyvte.recipe import DyvteRecipe

    recipe = {name: flags.pop(name) for name in ("width", "targets", "mean_over", "rule", "ce_slack", *_SHARED)}
    return _train(PartsKind.DYVTE, DyvteRecipe, recipe, flags, thresholds=threshold)


@main.command("eas")
@option("--skip", type=int, help="Layers whose attention is skipped. [default: a third]")
@option("--layers", help="These layers instead of a search: 2,5,6; random; or none, for adapters of full attention.")
@option("--search-steps", type=int, help="Of the steps, those of the search. [default: a third]")
@option("--kept-rank", type=int, help="Rank of the adapters in kept layers. [default: the recipe's]")
@option("--pia-rank", type=int, help="Rank of the adapters in skipped layers. [default: the recipe's]")
@option(
    "--start",
    type=click.Choice(["identity", "xavier"]),
    help="Up-projections in skipped layers: zero (LaVIN-EAS), or Xavier (LLaVA-EAS). [default: identity: an untrained "
    "adapter changes nothing]",
)
@option(
    "--probability",
    type=click.Choice(["sigmoid", "softmax"]),
    help="Of a layer in the search, from its score s: sigmoid(s) (LLaVA-EAS), or softmax(10 s) (LaVIN-EAS). [default: "
    "sigmoid: the update's p (1 - p) is its derivative]",
)
@click.option(
    "--grows/--no-grows",
    " /--no_grows",
    default=None,
    help="Begin the search with one skipped layer (LLaVA-EAS), or with all (LaVIN-EAS). [default: grows]",
)
@option(
    "--held-out",
    type=float,
    help="Share of samples that only reward the search (LaVIN-EAS: a validation set); 0 rewards on those of the step "
    "(LLaVA-EAS). [default: 0.25: a reward on samples not learned from]",
)
@option("--candidates", type=int, help="Sets of layers in a round: LLaVA-EAS 5, LaVIN-EAS 3. [default: 5]")
@option("--every", type=int, help="Steps from round to round: LLaVA-EAS 3, LaVIN-EAS 10. [default: 3]")
@option("--eta", type=float, help="Step of the scores: LLaVA-EAS 1, LaVIN-EAS 2. [default: 1]")
@common
def eas(layers: str | None, **flags: Any) -> int:
    """Adapters, and a search for the layers whose attention a task does not need."""
    from shortv.learned.eas.recipe import EasRecipe

    recipe = {name: flags.pop(name) for name in (*_EAS, *_SHARED)}
    searched = [name for name in _SEARCH if recipe[name] is not None]
    if layers is not None and searched:
        raise Refused(f"--{searched[0].replace('_', '-')} is of the search, which --layers replaces; give one of them")
    if layers == "random":
        recipe["choice"] = "random"
    elif layers is not None:
        recipe |= {"choice": "given", "layers": _layers(layers)}
    return _train(PartsKind.EAS, EasRecipe, recipe, flags)


@main.command("saisa-checkpoint")
@click.argument("checkpoint")
@option("--model", required=True, help="The LLaVA-1.5 model that the checkpoint was trained from: hub id, or a folder.")
@option("--revision", help="Branch, tag or commit on the hub.")
@option("--output-path", required=True, help="New folder or URI (s3://...) for parts/ and plans/.")
@option(
    "--language-model",
    type=click.Choice(["none", "attention", "layers", "all"]),
    default="all",
    show_default=True,
    help="What is taken of the checkpoint's language model.",
)
@option(
    "--parts-dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    default="bfloat16",
    show_default=True,
    help="What the parts are saved in.",
)
@option("--trust-remote-code", is_flag=True, help="Run code that comes with the model.")
@option("--chat-template", type=click.Path(), help="Jinja file, for a model without a chat template.")
def saisa_checkpoint(
    checkpoint: str, model: str, output_path: str, language_model: Any, parts_dtype: str, **flags: Any
) -> int:
    """Parts and a plan from a published SAISA checkpoint; nothing is trained."""
    from shortv.workers.training.result import convert_published

    spec = ModelSpec(name=model, **flags | {"chat_template": read_chat_template(flags["chat_template"])})
    plan = convert_published(checkpoint, spec, output_path, language_model=language_model, parts_dtype=parts_dtype)
    click.echo(f"written; use the plan {plan}")
    return 0


def _workers(text: str) -> WorkerRange:
    try:
        return WorkerRange.parse(text)
    except ValueError as error:
        raise Refused(f"--workers is {text!r}; {error}") from None


def _layers(text: str) -> tuple[int, ...]:
    try:
        return () if text == "none" else tuple(sorted({int(layer) for layer in text.split(",")}))
    except ValueError:
        raise Refused(f"--layers is {text!r}; give numbers by commas (2,5,6), random, or none") from None


def _train(kind: PartsKind, recipe: type[Spec], given: dict[str, Any], flags: dict[str, Any], **more: Any) -> int:
    """Make the request; what was not given keeps the recipe's default."""
    # Torch and Ray take seconds to import, and --help needs neither.
    from shortv.workers.training.driver import run_training
    from shortv.workers.training.request import TrainRequest

    model, data, workers = flags.pop("model"), flags.pop("data"), flags.pop("workers")
    if model and not data:
        raise Refused(f"no training samples for {model}; give --data FILE.parquet or TASK:NUMBER")
    names = ("revision", "dtype", "attn_implementation", "trust_remote_code")
    spec = ModelSpec(
        name=model or bundled("model"),
        chat_template=read_chat_template(flags.pop("chat_template")),
        **{name: flags.pop(name) for name in names},
    )
    made = {name: value for name, value in given.items() if value is not None}
    request = TrainRequest(
        model=spec,
        kind=kind,
        recipe=validate(recipe, made | {"seed": flags.pop("seed")}),
        data=data,
        generated_samples=flags.pop("samples"),
        questions=tuple(name.strip() for name in flags.pop("kinds").split(",") if name.strip()),
        workers=_workers(workers) if workers else None,
        **more,
        **flags,
    )
    return run_training(request)


if __name__ == "__main__":
    run(main)
