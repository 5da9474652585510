"""Everything that knows a model's internals: which families are supported, where their layers and visual tokens are."""

from shortv.families.decoder import Decoder, decoder_of
from shortv.families.encoding import Encoded, encode
from shortv.families.loading import LoadedModel, commit_of, load, load_architecture, load_processor, quiet_transformers
from shortv.families.prompts import Batch
from shortv.families.table import FAMILIES, supported

__all__ = [
    "FAMILIES",
    "Batch",
    "Decoder",
    "Encoded",
    "LoadedModel",
    "commit_of",
    "decoder_of",
    "encode",
    "load",
    "load_architecture",
    "load_processor",
    "quiet_transformers",
    "supported",
]
