"""Training of DyVTE's routers: may the visual tokens of a sample leave after a layer?"""

from shortv.learned.dyvte.recipe import Recipe
from shortv.learned.dyvte.trainer import make_trainer

__all__ = ["Recipe", "make_trainer"]
