"""Training checkpoints: weights and optimizer moments in one safetensors file, nothing pickled."""

import json
import os
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

STATE = ("step", "exp_avg", "exp_avg_sq")


def save_checkpoint(
    path: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, step: int, recipe: dict[str, object]
) -> None:
    """Write the state after `step` finished steps; the file appears only when it is whole."""
    tensors = {}
    for name, parameter in model.named_parameters():
        tensors[f"weight/{name}"] = parameter.detach().contiguous()
        # A parameter without a gradient so far has no state: its own count of steps starts later.
        for entry, tensor in optimizer.state.get(parameter, {}).items():
            tensors[f"{entry}/{name}"] = tensor.contiguous()
    partial = path.with_suffix(".partial")
    save_file(tensors, partial, metadata={"step": str(step), "recipe": json.dumps(recipe, sort_keys=True)})
    os.replace(partial, path)


def load_checkpoint(
    path: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, recipe: dict[str, object]
) -> int:
    """Put the stored state back and give the number of finished steps.

    Raises ValueError where the file was written by another recipe: going on would mix two runs.
    """
    with safe_open(path, framework="pt") as stored:
        metadata = stored.metadata()
        if metadata["recipe"] != json.dumps(recipe, sort_keys=True):
            raise ValueError(
                f"{path} was written with the recipe {metadata['recipe']}, not {json.dumps(recipe, sort_keys=True)}; "
                "give the same arguments or another output folder"
            )
        step = int(metadata["step"])
        names = set(stored.keys())
        for name, parameter in model.named_parameters():
            with torch.no_grad():
                parameter.copy_(stored.get_tensor(f"weight/{name}"))
            if f"{STATE[0]}/{name}" in names:
                optimizer.state[parameter] = {
                    entry: stored.get_tensor(f"{entry}/{name}").to(parameter.device) for entry in STATE
                }
    return step
