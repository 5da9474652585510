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
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, get_args

if not __package__:  # run as a script, perhaps in a Ray working directory where nothing is installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import click

from jobs.common import bundled, option, options_of, run
from shortv.errors import Refused
from shortv.learned.dyvte.recipe import DyvteRecipe
from shortv.learned.eas.recipe import EasRecipe
from shortv.learned.saisa.recipe import LanguageModel, SaisaRecipe
from shortv.plan import PartsKind
from shortv.spec import ModelSpec, Spec, load_spec, read_chat_template, validate
from shortv.terminal import printable
from shortv.workers.training.spec import PartsDtype, TrainSpec

_SEARCH = ("search_steps", "probability", "grows", "held_out", "candidates", "every", "eta")
_TUNING = {"warmup_share", "warmup_steps", "weight_decay", "gradient_norm", "search_learning_rate", "search_warmup"}
"""Settings of recipes that have no option: published values that nothing asked to change."""
_SHAPE = {"groups", "scale", "temperature", "agreement", "ce_ratio", "answer_tokens"}


@click.group(help=(__doc__ or "").replace("\n\n", "\n\n\b\n"))
def main() -> None:
    """Hold the systems."""


def training(recipe: type[Spec], *own: str) -> Callable[[Any], Any]:
    """Give a command the options of a training and those of its recipe, apart from the command's own."""
    hidden: Collection[str] = {*_TUNING, *_SHAPE, *own}

    def decorate(command: Any) -> Any:
        return options_of(recipe, leave_out=hidden)(options_of(TrainSpec, leave_out=hidden)(command))

    return decorate


@main.command("saisa")
@option("--steps", metavar="INTEGER", help="Optimizer steps of both stages. [default: the recipe's]")
@training(SaisaRecipe, "joint_steps", "layers", "threshold")
def saisa(steps: str | None, **flags: Any) -> int:
    """Projectors that give each layer its own visual tokens."""
    base = SaisaRecipe()
    # A whole number, checked as one.
    total = base.steps if steps is None else validate(DyvteRecipe, {"steps": steps}).steps
    if flags["projector_steps"] is None:
        flags["projector_steps"] = round(total * base.projector_steps / base.steps)
    first = validate(SaisaRecipe, {"projector_steps": flags["projector_steps"], "joint_steps": 1}).projector_steps
    if first > total:
        raise Refused(f"--steps is {total}, of which --stage-1-steps are {first}; give no more than --steps")
    return _train(PartsKind.SAISA, SaisaRecipe, flags, joint_steps=total - first)


@main.command("dyvte")
@training(DyvteRecipe)
def dyvte(**flags: Any) -> int:
    """Routers that let visual tokens leave when the text has seen enough."""
    return _train(PartsKind.DYVTE, DyvteRecipe, {**flags, "threshold": flags["threshold"] or (0.5,)})


@main.command("eas")
@option("--layers", help="These layers instead of a search: 2,5,6; random; or none, for adapters of full attention.")
@click.option(
    "--grows/--no-grows",
    " /--no_grows",
    default=None,
    help=f"{EasRecipe.model_fields['grows'].description} [default: grows]",
)
@training(EasRecipe, "layers", "choice", "grows", "threshold")
def eas(layers: str | None, **flags: Any) -> int:
    """Adapters, and a search for the layers whose attention a task does not need."""
    searched = [name for name in _SEARCH if flags[name] is not None]
    if layers is not None and searched:
        raise Refused(f"--{searched[0].replace('_', '-')} is of the search, which --layers replaces; give one of them")
    more: dict[str, Any] = {}
    if layers == "random":
        more = {"choice": "random"}
    elif layers is not None:
        more = {"choice": "given", "layers": _layers(layers)}
    return _train(PartsKind.EAS, EasRecipe, flags, **more)


@main.command("saisa-checkpoint")
@click.argument("checkpoint")
@option("--model", required=True, help="The LLaVA-1.5 model that the checkpoint was trained from: hub id, or a folder.")
@option("--revision", help="Branch, tag or commit on the hub.")
@option("--output-path", required=True, help="New folder or URI (s3://...) for parts/ and plans/.")
@option(
    "--language-model",
    type=click.Choice(get_args(LanguageModel)),
    default="all",
    show_default=True,
    help="What is taken of the checkpoint's language model.",
)
@option(
    "--parts-dtype",
    type=click.Choice(get_args(PartsDtype)),
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

    loading = flags | {"name": model, "chat_template": read_chat_template(flags["chat_template"])}
    spec = validate(ModelSpec, loading)
    plan = convert_published(checkpoint, spec, output_path, language_model=language_model, parts_dtype=parts_dtype)
    click.echo(f"written; use the plan {printable(plan)}")
    return 0


def _layers(text: str) -> tuple[int, ...]:
    try:
        return () if text == "none" else tuple(sorted({int(layer) for layer in text.split(",")}))
    except ValueError:
        shown = printable(repr(text), limit=80)
        raise Refused(f"--layers is {shown}; give numbers by commas (2,5,6), random, or none") from None


def _train(kind: PartsKind, recipe: type[Spec], flags: dict[str, Any], **more: Any) -> int:
    """Train with the flags that were given; a flag belongs to the recipe, or else to the training."""
    # Torch and Ray take seconds to import, and --help needs neither.
    from shortv.learned.registry import SYSTEMS
    from shortv.workers.training.driver import run_training

    if flags["model"] and not flags["data"]:
        raise Refused(f"no training samples for {flags['model']}; give --data FILE.parquet or TASK:NUMBER")
    of_recipe = {name: value for name, value in flags.items() if name in recipe.model_fields}
    others = {name: value for name, value in flags.items() if name not in of_recipe}
    spec = load_spec(TrainSpec, flags=others, defaults={"model": bundled("model")})
    return run_training(spec, load_spec(recipe, flags=of_recipe | more), SYSTEMS[kind])


if __name__ == "__main__":
    run(main)
