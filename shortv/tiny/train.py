"""The training recipe of the bundled model: all parts together, from scratch, resumable.

`python -m shortv.tiny.train --output FOLDER` trains; the same command continues after a stop.
"""

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import click
import torch
from safetensors import safe_open
from safetensors.torch import save
from torch.nn.functional import cross_entropy, rms_norm
from transformers import LlavaForConditionalGeneration

from shortv.atomic import replace_file
from shortv.tiny.architecture import Architecture, build_model, build_processor, build_tokenizer
from shortv.tiny.batches import Batch, draw_batch, patch_places
from shortv.tiny.scenes import COLOURS, PLACES, SHAPES

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

    def rate(self, step: int) -> float:
        """Give the learning rate of a step: a linear warm-up, then a cosine down to a hundredth."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return self.learning_rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


class Trainee(torch.nn.Module):
    """The model with its patch heads, which are thrown away after the training.

    The heads read colour, shape and place off every visual token as the projector hands it to the decoder. Real LLaVA
    starts from a vision tower that can see; here this loss takes the place of the tower's own pre-training.
    """

    def __init__(self, model: LlavaForConditionalGeneration, seed: int) -> None:
        super().__init__()
        config: Any = model.config.text_config
        self.model = model
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.colour_head = torch.nn.Linear(config.hidden_size, 1 + len(COLOURS))
            self.shape_head = torch.nn.Linear(config.hidden_size, 1 + len(SHAPES))
            self.place_head = torch.nn.Linear(config.hidden_size, len(PLACES))

    def losses(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Give the loss per answer token and the heads' loss per visual token, in nats."""
        output = self.model(
            input_ids=batch.input_ids_BT,
            labels=batch.labels_BT,
            position_ids=batch.positions_BT,
            attention_mask=batch.sees_B1TT,
            pixel_values=batch.pixels_BCHW,
        )
        visual_ND = output.image_hidden_states.flatten(0, -2)
        # Normed as the decoder norms them: longer vectors would satisfy the heads without saying more.
        visual_ND = rms_norm(visual_ND, visual_ND.shape[-1:])
        places_BP = torch.tensor(patch_places(), device=visual_ND.device).expand_as(batch.colours_BP)
        colour = cross_entropy(self.colour_head(visual_ND), batch.colours_BP.flatten())
        shape = cross_entropy(self.shape_head(visual_ND), batch.shapes_BP.flatten())
        place = cross_entropy(self.place_head(visual_ND), places_BP.flatten())
        return output.loss, colour + shape + place


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
    optimizer = _optimizer(trainee, recipe)
    path, identity = output / CHECKPOINT, json.dumps(asdict(recipe), sort_keys=True)
    start = _load_checkpoint(path, trainee, optimizer, identity) if path.exists() else 0
    end = min(recipe.steps, stop_after or recipe.steps)
    started = time.monotonic()
    for step in range(start, end):
        drawn = draw_batch(
            tokenizer, seed=recipe.seed, step=step, size=recipe.batch_size, blank_share=recipe.blank_share
        )
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate(step)
        loss, patch_loss = trainee.losses(Batch(*(tensor.to(device) for tensor in drawn)))
        total: Any = loss + recipe.patch_weight * patch_loss
        optimizer.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(trainee.parameters(), recipe.gradient_norm)
        optimizer.step()
        if step % 25 == 0:
            seconds = time.monotonic() - started
            report(f"step {step:5d}  loss {loss.item():.4f}  patch loss {patch_loss.item():.4f}  {seconds:7.0f} s")
        if (step + 1) % checkpoint_every == 0 or step + 1 == end:
            _save_checkpoint(path, trainee, optimizer, step + 1, identity)
            model.save_pretrained(output / "model")
            build_processor(tokenizer).save_pretrained(output / "model")
    return model


def _optimizer(model: torch.nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """Set up AdamW; norms and biases do not decay."""
    matrices = {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": recipe.weight_decay}
    vectors = {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0}
    return torch.optim.AdamW([matrices, vectors], lr=recipe.learning_rate, betas=(0.9, 0.98), fused=True)


def _save_checkpoint(
    path: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, step: int, recipe: str
) -> None:
    """Write weights and the optimizer's state after `step` finished steps, nothing pickled."""
    tensors = {}
    for name, parameter in model.named_parameters():
        tensors[f"weight/{name}"] = parameter.detach().contiguous()
        # A parameter without a gradient so far has no state: its own count of steps starts later.
        for entry, tensor in optimizer.state.get(parameter, {}).items():
            tensors[f"{entry}/{name}"] = tensor.contiguous()
    replace_file(path, save(tensors, metadata={"step": str(step), "recipe": recipe}))


def _load_checkpoint(path: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, recipe: str) -> int:
    """Put the stored state back and give the number of finished steps.

    Raises ValueError where the file was written by another recipe: going on would mix two runs.
    """
    with safe_open(path, framework="pt") as stored:
        metadata = stored.metadata()
        if metadata["recipe"] != recipe:
            raise ValueError(
                f"{path} was written with the recipe {metadata['recipe']}, not {recipe}; "
                "give the same arguments or another output folder"
            )
        parameters = dict(model.named_parameters())
        for key in stored.keys():  # noqa: SIM118  # not a mapping
            entry, _, name = key.partition("/")
            parameter, tensor = parameters[name], stored.get_tensor(key)
            if entry == "weight":
                parameter.data.copy_(tensor)
            else:
                optimizer.state[parameter][entry] = tensor.to(parameter.device)
    return int(metadata["step"])


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
