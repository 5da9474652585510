"""SAISA: how the projectors of single layers are trained, and the language model with them."""

from shortv.learned.saisa.recipe import SaisaRecipe
from shortv.learned.saisa.trainer import ProjectorTrainer, make_trainer

__all__ = ["ProjectorTrainer", "SaisaRecipe", "make_trainer"]
