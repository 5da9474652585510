"""The training recipe of the bundled model: all parts together, from scratch, resumable.

`python -m shortv.tiny.train --output FOLDER` trains; the same command continues after a stop.
"""

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import click
import torch
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

from shortv.tiny.architecture import Architecture, build_model, build_processor, build_tokenizer
from shortv.tiny.batches import Batch, draw_batch
from shortv.tiny.checkpoint import load_checkpoint, save_checkpoint
from shortv.tiny.trainee import Trainee

CHECKPOINT = "checkpoint.safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Everything the trained weights depend on."""

    seed: int = 0
    steps: int = 3500
    batch_size: int = 16
    learning_rate: float = 1e-3
    warmup_steps: int = 150
    weight_decay: float = 0.05
    gradient_norm: float = 1.0
    patch_weight: float = 0.5
    blank_share: float = 0.04
    architecture: Architecture = field(default_factory=Architecture)


def learning_rate(recipe: Recipe, step: int) -> float:
    """Give the rate of a step: a linear warm-up, then a cosine down to a hundredth."""
    if step < recipe.warmup_steps:
        return recipe.learning_rate * (step + 1) / recipe.warmup_steps
    progress = (step - recipe.warmup_steps) / max(1, recipe.steps - recipe.warmup_steps)
    return recipe.learning_rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


def train(
    recipe: Recipe,
    output: Path,
    *,
    device: str = "cpu",
    stop_after: int | None = None,
    checkpoint_every: int = 250,
    report: Callable[[str], None] = print,
) -> LlavaForConditionalGeneration:
    """Train to the recipe's last step, or to `stop_after`, continuing from the folder's checkpoint.

    `output/model` holds the model in the layout of the hub, rewritten at every checkpoint.
    """
    tokenizer = build_tokenizer(recipe.seed)
    model = build_model(recipe.architecture, tokenizer, recipe.seed)
    trainee = Trainee(model, recipe.seed).to(device).train()
    optimizer = build_optimizer(trainee, recipe)
    output.mkdir(parents=True, exist_ok=True)
    path, identity = output / CHECKPOINT, asdict(recipe)
    start = load_checkpoint(path, trainee, optimizer, identity) if path.exists() else 0
    end = min(recipe.steps, stop_after or recipe.steps)
    started = time.monotonic()
    for step in range(start, end):
        batch = draw_batch(
            tokenizer,
            seed=recipe.seed,
            step=step,
            size=recipe.batch_size,
            blank_share=recipe.blank_share,
        )
        loss, patch_loss = train_step(trainee, optimizer, Batch(*(tensor.to(device) for tensor in batch)), recipe, step)
        if step % 25 == 0:
            seconds = time.monotonic() - started
            report(f"step {step:5d}  loss {loss:.4f}  patch loss {patch_loss:.4f}  {seconds:7.0f} s")
        if (step + 1) % checkpoint_every == 0 or step + 1 == end:
            save_checkpoint(path, trainee, optimizer, step + 1, identity)
            export(model, tokenizer, output / "model")
    return model


def train_step(
    trainee: Trainee, optimizer: torch.optim.Optimizer, batch: Batch, recipe: Recipe, step: int
) -> tuple[float, float]:
    """Take one optimizer step and give its losses in nats per answer token and per visual token."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(recipe, step)
    loss, patch_loss = trainee.losses(batch)
    total: Any = loss + recipe.patch_weight * patch_loss
    optimizer.zero_grad()
    total.backward()
    torch.nn.utils.clip_grad_norm_(trainee.parameters(), recipe.gradient_norm)
    optimizer.step()
    return float(loss.detach()), float(patch_loss.detach())


def build_optimizer(model: torch.nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """Set up AdamW; norms and biases do not decay."""

    def group(parameters: Iterable[torch.nn.Parameter], weight_decay: float) -> dict[str, object]:
        return {"params": list(parameters), "weight_decay": weight_decay}

    matrices = group((p for p in model.parameters() if p.ndim >= 2), recipe.weight_decay)
    vectors = group((p for p in model.parameters() if p.ndim < 2), 0.0)
    return torch.optim.AdamW([matrices, vectors], lr=recipe.learning_rate, betas=(0.9, 0.98), fused=True)


def export(model: LlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the model, its tokenizer and its processor as `from_pretrained` reads them."""
    model.save_pretrained(folder)
    build_processor(tokenizer).save_pretrained(folder)


@click.command()
@click.option("--output", required=True, type=click.Path(path_type=Path), help="Folder for checkpoint and model.")
@click.option("--steps", default=Recipe().steps, show_default=True, help="Optimizer steps.")
@click.option("--seed", default=0, show_default=True, help="Seed of weights, tokenizer and data.")
@click.option("--device", default="cpu", show_default=True, help="Where to train.")
@click.option("--threads", type=int, default=None, help="CPU threads; default: all.")
@click.option("--stop-after", type=int, default=None, help="Stop after this many steps; the same command goes on.")
def main(output: Path, steps: int, seed: int, device: str, threads: int | None, stop_after: int | None) -> None:
    """Train the bundled model, or go on with the training in the output folder."""
    if threads is not None:
        torch.set_num_threads(threads)
    recipe = Recipe(steps=steps, seed=seed)
    train(recipe, output, device=device, stop_after=stop_after, report=lambda line: print(line, flush=True))


if __name__ == "__main__":
    main()
