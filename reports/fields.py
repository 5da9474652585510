"""Every result table and column, documented: the Arrow schemas and TABLES.md are made from this."""

from collections.abc import Mapping
from typing import Final, NamedTuple


class Field(NamedTuple):
    """A column: its kind is an Arrow type's name, `scores` or `images`, with `?` where nulls are allowed."""

    name: str
    kind: str
    meaning: str


class TableDoc(NamedTuple):
    """A table: the file or files it lies in, what a row is, and its columns in order."""

    files: str
    row: str
    fields: tuple[Field, ...]


_SAMPLE = Field("sample_id", "string", "Id of the sample, distinct within a run or a task.")
_DATASET = Field("dataset", "string?", "Data set or lmms-eval task the sample comes from.")
_PROMPT = Field("prompt", "string", "Question; `<image>` markers place the images.")
_ANSWER = Field("answer", "string?", "Reference answer; a sweep does not read it.")
_LAYER = Field("layer", "int32", "Decoder layer, counted from 0.")
_CELL = Field("cell", "string", "Key of the cell, one model under one plan on one task.")
_MODEL = Field("model", "string", "Model as the campaign names it.")
_PLAN = Field("plan", "string", "Name of the plan; `full` is the unmodified model.")
_PLAN_DIGEST = Field("plan_digest", "string", "SHA-256 of the plan's architecture, modes and learned parts.")
_TASK = Field("task", "string", "lmms-eval task.")
_METRIC = Field("metric", "string", "Metric, as lmms-eval names it.")
_FLOPS = Field(
    "flops_ratio",
    "double?",
    "FLOPs of the prefill, as a share of the full model's: predicted at (t, v), or as the exit layers tell.",
)
_EXIT = (
    "Layer after which the visual tokens left, where the plan decides that for each sample (DyVTE); the number of "
    "layers is never."
)
_MODE = Field("mode", "string", "Mode of the ablation: freeze-visual, freeze-text, no-visual-queries, ...")

TABLES: Final[Mapping[str, TableDoc]] = {
    "samples": TableDoc(
        "samples.parquet",
        "One calibration sample that was used in a sweep.",
        (
            _SAMPLE,
            _DATASET,
            _PROMPT,
            _ANSWER,
            Field("n_text", "int32", "Text tokens of the prompt."),
            Field("n_visual", "int32", "Visual tokens of the prompt; 0 does not count for visual modes."),
        ),
    ),
    "lc_samples": TableDoc(
        "lc_samples/*.parquet",
        "What one ablation changed for one sample: sample x mode x layer.",
        (
            _SAMPLE,
            _MODE,
            _LAYER,
            Field("kl_full_ablated", "double", "KL(full ‖ ablated) of the next-token distributions, in nats."),
            Field("kl_ablated_full", "double", "KL(ablated ‖ full), in nats."),
            Field("top1_changed", "bool", "Whether the most likely next token is another one."),
        ),
    ),
    "lc_layers": TableDoc(
        "lc_layers.parquet",
        "Layer Contribution of one mode in one layer, over the samples that count for the mode.",
        (
            _MODE,
            _LAYER,
            Field("n", "int32", "Samples that count."),
            Field("kl_direction", "string", "KL direction that ranks: full-ablated or ablated-full."),
            Field("mean", "double", "LC: mean KL divergence in nats."),
            Field("ci_low", "double", "Lower end of its 95 % bootstrap interval."),
            Field("ci_high", "double", "Upper end of its 95 % bootstrap interval."),
            Field("rank", "int32", "Rank within the mode, 1 is the layer to replace first."),
            Field("rank_low", "int32", "Lower end of the rank's 95 % bootstrap interval."),
            Field("rank_high", "int32", "Upper end of the rank's 95 % bootstrap interval."),
        ),
    ),
    "errors": TableDoc(
        "errors.parquet",
        "One calibration or training sample that could not be used.",
        (
            _SAMPLE,
            Field("stage", "string", "Where it failed: decode, prompt, tokenise or measure."),
            Field("error", "string", "Kind of the error, for counting."),
            Field("message", "string", "What was found."),
        ),
    ),
    "training": TableDoc(
        "training.parquet",
        "One optimizer step of a training of learned parts.",
        (
            Field("step", "int32", "Step, counted from 1."),
            Field("samples", "int64", "Samples that were trained on so far, repetitions counted."),
            Field("loss", "double", "Mean loss of the step's batch, as the recipe defines it."),
            Field("learning_rate", "double?", "Learning rate of the step."),
            Field("samples_per_second", "double?", "Samples of the step by its duration, over all workers."),
            Field("seconds", "double", "How long the step took, without waiting for data."),
            Field("metrics", "scores", "Further metrics of the step, by name."),
        ),
    ),
    "calibration": TableDoc(
        "a file of the user's",
        "One calibration sample as input (`--calibration FILE.parquet`).",
        (
            _SAMPLE,
            Field("images", "images?", "Encoded images (PNG, JPEG, ...) in the order of the markers."),
            _PROMPT,
            _ANSWER,
            _DATASET,
        ),
    ),
    "cells": TableDoc(
        "cells.parquet",
        "One finished cell of a campaign: a model under a plan on a task.",
        (
            _CELL,
            _MODEL,
            Field("revision", "string?", "Revision of the model on the hub."),
            _PLAN,
            _PLAN_DIGEST,
            Field("same_as", "string?", "The plan with the same modes that ran, where this is another name for it."),
            _TASK,
            Field("task_digest", "string", "SHA-256 of the task's configuration, code and documents."),
            Field("limit", "double?", "Samples asked for; below 1 a share of the task."),
            Field("seed", "int64", "Seed of sampled answers and of the intervals."),
            Field("state", "string", "complete, partial (some samples failed) or failed (all did)."),
            Field("n", "int32", "Samples of the cell."),
            Field("errors", "int32", "Samples that failed; they are never scored."),
            Field("message", "string?", "Why the cell or its samples failed."),
            _FLOPS,
            Field("learned_parameters", "int64?", "Parameters of the plan's learned parts; null for a plan without."),
            Field("train_seconds", "double?", "How long their training took; null for a plan without."),
            Field("started", "string", "ISO 8601 in UTC."),
            Field("finished", "string", "ISO 8601 in UTC."),
            Field("wall_seconds", "double", "How long the cell took."),
        ),
    ),
    "answers": TableDoc(
        "answers/*.parquet",
        "One sample's answer in one cell.",
        (
            _CELL,
            _SAMPLE,
            _MODEL,
            # Another plan of the same modes finds its answers by the cell.
            Field("plan", "string", "Name under which the cell ran; a plan `same_as` it has no answers of its own."),
            _TASK,
            Field("prediction", "string?", "The model's answer as text; null after an error."),
            Field("target", "string?", "The task's reference."),
            Field("kind", "string?", "Kind of the question, where the task's documents have a `kind`."),
            Field("scores", "scores", "Per-sample scores, a list of metric and value; empty after an error."),
            Field("error", "string?", "Why the sample has no answer; null where it has one."),
            Field("latency_ms", "double?", "From the question to the whole answer."),
            Field("queue_ms", "double?", "Of that, waiting for a replica and a batch."),
            Field("prefill_ms", "double?", "Of that, the batch's prefill."),
            Field("decode_ms", "double?", "Of that, the batch's decoding."),
            Field("prompt_tokens", "int32?", "Tokens of the prompt, visual ones included."),
            Field("visual_tokens", "int32?", "Visual tokens of the prompt."),
            Field("completion_tokens", "int32?", "Tokens of the answer."),
            Field("exit_layer", "int32?", _EXIT),
        ),
    ),
    "metrics": TableDoc(
        "metrics.parquet",
        "One metric of one cell, under one filter, as lmms-eval aggregates it.",
        (
            _CELL,
            _MODEL,
            _PLAN,
            _PLAN_DIGEST,
            _TASK,
            _METRIC,
            Field("filter", "string", "lmms-eval's filter of the answers."),
            Field("value", "double?", "The metric; null where the task aggregates to something else than a number."),
            Field("stderr", "double?", "Its standard error."),
            Field("stderr_clt", "double?", "Standard error by the central limit theorem."),
            Field("stderr_clustered", "double?", "Standard error with clustered samples."),
            Field("n", "int32", "Documents that the metric counts."),
        ),
    ),
    "comparisons": TableDoc(
        "comparisons.parquet",
        "A plan against the full model, or against its random controls, on the samples that all of them have.",
        (
            _MODEL,
            _TASK,
            _METRIC,
            _PLAN,
            Field("against", "string", "`full`, or the mean of how many random controls."),
            Field("n", "int32", "Samples compared."),
            Field("value", "double", "Mean per-sample score of the plan."),
            Field("against_value", "double", "The same of the other side."),
            Field("difference", "double", "`value` less `against_value`."),
            Field("ci_low", "double", "Lower end of the difference's 95 % paired bootstrap interval."),
            Field("ci_high", "double", "Upper end of the difference's 95 % paired bootstrap interval."),
            Field("share_changed", "double", "Share of answers that differ as text."),
        ),
    ),
    "speed": TableDoc(
        "speed.parquet",
        "How fast one cell was answered; medians and means over the samples that were.",
        (
            _CELL,
            _MODEL,
            _PLAN,
            _TASK,
            Field("n", "int32", "Samples that were answered."),
            Field("prefill_ms_median", "double?", "Median time of the prefill."),
            Field("decode_ms_per_token_median", "double?", "Median decoding time per token of the answer."),
            Field("latency_ms_median", "double?", "Median time from the question to the whole answer."),
            Field("samples_per_second", "double?", "Throughput of the cell."),
            Field("t", "double?", "Mean text tokens of a prompt."),
            Field("v", "double?", "Mean visual tokens of a prompt."),
            _FLOPS,
            Field("replicas", "int32?", "Replicas that answered."),
        ),
    ),
}
