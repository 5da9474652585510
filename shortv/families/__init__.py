"""Everything that knows a model's internals: supported families, loading, preprocessing, vision features."""

from shortv.families.decoder import Decoder, decoder_of
from shortv.families.loading import (
    LoadedModel,
    commit_of,
    load,
    load_architecture,
    load_preprocessor,
    quiet_transformers,
    wrap,
)
from shortv.families.preprocessing import Batch, Encoded, Preprocessor, encode, preprocess
from shortv.families.table import FAMILIES

__all__ = [
    "FAMILIES",
    "Batch",
    "Decoder",
    "Encoded",
    "LoadedModel",
    "Preprocessor",
    "commit_of",
    "decoder_of",
    "encode",
    "load",
    "load_architecture",
    "load_preprocessor",
    "preprocess",
    "quiet_transformers",
    "wrap",
]
