"""Training of EAS's adapters, and the search for the layers whose attention a task does not need."""

from shortv.learned.eas.recipe import EasRecipe
from shortv.learned.eas.search import Search, SearchSettings
from shortv.learned.eas.trainer import AdapterTrainer, make_trainer

__all__ = ["AdapterTrainer", "EasRecipe", "Search", "SearchSettings", "make_trainer"]
