"""What is trained: the model, and two heads that read each visual token and are thrown away afterwards."""

from typing import Any

import torch
from torch.nn.functional import cross_entropy, rms_norm
from transformers import LlavaForConditionalGeneration

from shortv.tiny.batches import Batch, patch_places
from shortv.tiny.scenes import COLOURS, PLACES, SHAPES


class Trainee(torch.nn.Module):
    """The model with its patch heads.

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
