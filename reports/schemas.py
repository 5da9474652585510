"""Every result table and column, documented once; the Arrow schemas and TABLES.md are made from this text."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import pyarrow as pa

from shortv.errors import ShortVError
from shortv.untrusted import open_parquet, read_parquet

SCHEMA_VERSION: Final = 1
DOCUMENTATION: Final = Path(__file__).with_name("TABLES.md")

_HEAD: Final = f"""# Result tables

Made from `reports/schemas.py` by `python -m reports.schemas`, as are the Arrow schemas.
Every file is Parquet with schema version {SCHEMA_VERSION} in its metadata (`schema_version`, `shortv_table`).
A type with `?` may be null. Only the table `thumbnails` contains images.
"""
# A table begins with its name, files and what a row is. A column is a name, a kind and a meaning. The kind is an Arrow
# type's name, or one of _NESTED, with `?` where nulls are allowed. A line of names alone stands for shared columns.
_SHARED = """
    sample_id string Id of the sample, distinct within a run or a task.
    dataset string? Data set or lmms-eval task the sample comes from.
    prompt string Question; `<image>` markers place the images.
    answer string? Reference answer; a sweep does not read it.
    mode string Mode of the ablation: freeze-visual, freeze-text, no-visual-queries, ...
    layer int32 Decoder layer, counted from 0.
    cell string Key of the cell, one model under one plan on one task.
    model string Model as the campaign names it.
    plan string Name of the plan; `full` is the unmodified model.
    plan_digest string SHA-256 of the plan's architecture, modes, learned parts and downsampling.
    task string lmms-eval task.
    flops_ratio double? FLOPs of the prefill, as a share of the full model's: predicted at (t, v), or as the exit \
        layers tell.
    metric string Metric, as lmms-eval names it.
    doc int32 Position of the document in the task, counted from 0.
    kind string? Kind of the question, where the task's documents have a `kind`.
    target string? The task's reference.
    question string? What the document asks.
    batch int32? Documents of the measured batch.
    rounds int32? Rounds in which every plan was measured once.
    batch_prefill_ms double? Median time of the language model's prefill of that batch.
    prefill_ratio double? Median over the rounds of that time as a share of the full model's in the same round.
    prefill_ratio_stderr double? Its standard error.
    step_ms double? Median time of a decoding step of that batch.
    ttft_ms double? Time to the first token of that batch: preprocessing, vision tower and prefill.
    kv_bytes double? KV cache of a document after its prefill.
    peak_bytes int64? Most memory allocated on the device, weights included; null on CPUs.
    idle_share double? Share of the time in which the model's thread had nothing to do while the task was answered.
    replicas int32? Replicas that answered the task.
"""

_TABLES = """
samples | samples.parquet | One calibration sample that was used in a sweep.
    sample_id dataset prompt answer
    n_text int32 Text tokens of the prompt.
    n_visual int32 Visual tokens of the prompt; 0 does not count for visual modes.
lc_samples | lc_samples/*.parquet | What one ablation changed for one sample: sample x mode x layer.
    sample_id mode layer
    kl_full_ablated double KL(full ‖ ablated) of the next-token distributions, in nats.
    kl_ablated_full double KL(ablated ‖ full), in nats.
    top1_changed bool Whether the most likely next token is another one.
lc_layers | lc_layers.parquet | Layer Contribution of one mode in one layer, over the samples that count for the mode.
    mode layer
    n int32 Samples that count.
    kl_direction string KL direction that ranks: full-ablated or ablated-full.
    mean double LC: mean KL divergence in nats.
    ci_low double Lower end of its 95 % bootstrap interval.
    ci_high double Upper end of its 95 % bootstrap interval.
    rank int32 Rank within the mode, 1 is the layer to replace first.
    rank_low int32 Lower end of the rank's 95 % bootstrap interval.
    rank_high int32 Upper end of the rank's 95 % bootstrap interval.
errors | errors.parquet | One calibration or training sample that could not be used.
    sample_id
    stage string Where it failed: decode, prompt, tokenise or measure.
    error string Kind of the error, for counting.
    message string What was found.
training | training.parquet | One optimizer step of a training of learned parts.
    step int32 Step, counted from 1.
    samples int64 Samples that were trained on so far, repetitions counted.
    loss double Mean loss of the step's batch, as the recipe defines it.
    learning_rate double? Learning rate of the step.
    samples_per_second double? Samples of the step by its duration, over all workers.
    seconds double How long the step took, without waiting for data.
    metrics scores Further metrics of the step, by name.
calibration | a file of the user's | One calibration sample as input (`--calibration FILE.parquet`).
    sample_id
    images images? Encoded images (PNG, JPEG, ...) in the order of the markers.
    prompt answer dataset
cells | cells.parquet | One finished cell of a campaign: a model under a plan on a task.
    cell model
    revision string? Revision of the model on the hub.
    plan plan_digest
    same_as string? The plan with the same modes that ran, where this is another name for it.
    task
    task_digest string SHA-256 of the task's configuration, code and documents.
    limit double? Samples asked for; below 1 a share of the task.
    seed int64 Seed of sampled answers and of the intervals.
    state string complete, partial (some samples failed or were not asked) or failed (no sample was scored).
    n int32 Samples that were answered or failed.
    errors int32 Samples that failed; they are never scored.
    message string? Why the cell or its samples failed.
    flops_ratio
    learned_parameters int64? Parameters of the plan's learned parts; null for a plan without.
    train_seconds double? How long their training took; null for a plan without.
    busy_seconds double Time of the models' threads that the answers took, over all replicas.
answers | answers/*.parquet | One document's answer in one cell; a later part's row replaces an earlier one of the \
    same cell and document.
    cell model
    plan string Name under which the cell ran; a plan `same_as` it has no answers of its own.
    task doc sample_id
    prediction string? The model's answer as text; null after an error.
    target kind
    scores scores Per-sample scores, a list of metric and value; empty after an error.
    error string? Why the sample has no answer; null where it has one.
    latency_ms double? From the question to the whole answer.
    queue_ms double? Of that, waiting for a replica and a batch.
    preprocess_ms double? Image processing and tokenisation, done once for all plans of the document.
    vision_ms double? Vision tower and projector, run once for all plans of the document.
    prefill_ms double? Of the latency, the language model's prefill of the batch that the prompt was part of.
    prefill_batch int32? Sequences in that batch.
    decode_ms double? Of the latency, the decoding after the first token.
    busy_ms double? Time of the model's thread that the answer took, its share of the batches that it was part of.
    prompt_tokens int32? Tokens of the prompt, visual ones included.
    visual_tokens int32? Visual tokens of the prompt.
    completion_tokens int32? Tokens of the answer.
    exit_layer int32? Layer after which the visual tokens left, where the plan decides that for each sample (DyVTE); \
        the number of layers is never.
    doc_digest int64? Digest of the document's content, which tells an edited task from the one that was answered.
    responses string? Where scoring failed, what the model returned to each request, as JSON, to be scored again.
    values string? What the task's own scoring returned, as JSON, for the task's aggregation; null after an error.
judge | judge/*.parquet | One reply of an LLM judge that a task's scoring called; the same call is not made again.
    digest string SHA-256 of the call's path and body, and of how often the document made the same call before.
    task
    doc int32? Position of the document in the task; null for a call of the task's aggregation.
    body string The reply as the judge sent it.
metrics | metrics.parquet | One metric of one cell, under one filter, as lmms-eval aggregates it.
    cell model plan plan_digest task metric
    filter string lmms-eval's filter of the answers.
    value double? The metric; null where the task aggregates to something else than a number.
    stderr double? Its standard error.
    stderr_clt double? Standard error by the central limit theorem.
    stderr_clustered double? Standard error with clustered samples.
    n int32 Documents that the metric counts.
comparisons | comparisons.parquet | A plan against the full model, or against its random controls, on the samples that \
    all of them have.
    model task metric plan
    against string `full`, or the mean of how many random controls.
    subset string `all`, or `hard`: the questions that the first downsampled control of the recipe gets wrong.
    n int32 Samples compared.
    value double Mean per-sample score of the plan.
    against_value double The same of the other side.
    difference double `value` less `against_value`.
    ci_low double Lower end of the difference's 95 % paired bootstrap interval.
    ci_high double Upper end of the difference's 95 % paired bootstrap interval.
    family string `main` for the main metric of a task, else the metric: what is corrected together, over all models, \
        plans and tasks, against one side and on one subset.
    p_value double Two-sided paired p-value: exact McNemar test for scores of 0 and 1, else paired t-test.
    p_holm double The p-value corrected for its family by Holm (1979): of all that are at most 0.05, one is false with \
        a probability of at most 5 %.
    q_bh double The p-value corrected for its family by Benjamini and Hochberg (1995): of all that are at most 0.05, \
        at most 5 % are expected to be false.
    sd double? Standard deviation of the paired differences; null for a single sample.
    discordant double Share of samples whose scores differ.
    share_changed double Share of answers that differ as text.
changes | changes.parquet | One question to which a plan gave another answer than the full model: some of each \
    plan, worse ones first.
    model task plan doc sample_id kind target
    question
    full_prediction string? The full model's answer as text.
    prediction string? The plan's answer as text.
    full_score double? The full model's score by the task's main metric.
    score double? The plan's score.
    change string worse or better by that score; other where both score the same or one has none.
    total int64 All answers of this plan on this task that changed in this way.
thumbnails | thumbnails.parquet | One document among the changes.
    task doc sample_id question
    image binary? Its images as one small JPEG picture; null for a document without an image.
measured | measured/*.parquet | The speed of one plan on a few documents of a task, measured by one replica beside all \
    other plans; a later part's row replaces an earlier one of the same cell.
    cell model plan task batch rounds batch_prefill_ms prefill_ratio prefill_ratio_stderr step_ms ttft_ms kv_bytes
    peak_bytes idle_share replicas
speed | speed.parquet | How fast one cell was answered: medians over the samples that were, and what was measured apart.
    cell model plan task
    n int32 Samples that were answered.
    queue_ms_median double? Median time in the queue.
    preprocess_ms_median double? Median time of image processing and tokenisation.
    vision_ms_median double? Median time of the vision tower.
    prefill_ms_median double? Median time of the prefill, of the whole batch.
    prefill_batch_median double? Median number of sequences in that batch.
    decode_ms_per_token_median double? Median decoding time per token of the answer.
    latency_ms_median double? Median time from the question to the whole answer.
    samples_per_second double? Samples by the time of the model's thread that they took: the rate of one busy replica.
    t double? Mean text tokens of a prompt.
    v double? Mean visual tokens of a prompt.
    flops_ratio batch rounds batch_prefill_ms prefill_ratio prefill_ratio_stderr step_ms ttft_ms kv_bytes peak_bytes
    idle_share replicas
"""

_NESTED: Final = {
    "scores": pa.list_(pa.struct([pa.field("metric", pa.string(), False), pa.field("value", pa.float64(), True)])),
    "images": pa.list_(pa.binary()),
}


class Column(NamedTuple):
    """A column as it is documented."""

    name: str
    kind: str
    meaning: str

    @property
    def field(self) -> pa.Field:
        """The column in an Arrow schema."""
        kind = self.kind.removesuffix("?")
        type_ = _NESTED[kind] if kind in _NESTED else pa.type_for_alias(kind)
        return pa.field(self.name, type_, nullable=self.kind.endswith("?"))


class Table(NamedTuple):
    """A table: the file or files it lies in, what a row is, and its columns in order."""

    files: str
    row: str
    columns: list[Column]


def _columns(lines: Iterable[str]) -> Iterator[Column]:
    for line in lines:
        name, kind, meaning = line.split(maxsplit=2)
        yield Column(name, kind, " ".join(meaning.split()))


def _parse(text: str, shared: Mapping[str, Column]) -> dict[str, Table]:
    tables: dict[str, Table] = {}
    for line in text.strip().splitlines():
        if not line.startswith(" "):
            name, files, row = line.split(" | ")
            tables[name] = table = Table(files, " ".join(row.split()), [])
        elif shared.keys() >= set(names := line.split()):
            table.columns.extend(shared[name] for name in names)
        else:
            table.columns.extend(_columns([line]))
    return tables


TABLES: Final = _parse(_TABLES, {column.name: column for column in _columns(_SHARED.strip().splitlines())})
SCHEMAS: Final[Mapping[str, pa.Schema]] = {
    name: pa.schema(
        [column.field for column in table.columns],
        metadata={"shortv_table": name, "schema_version": str(SCHEMA_VERSION)},
    )
    for name, table in TABLES.items()
}


def schema_of(name: str) -> pa.Schema:
    """Return the schema of a table or of one of its parts (`lc_samples/part-00000`).

    Raises:
        KeyError: no table of that name exists; a mistake of the caller, not of the user.
    """
    return SCHEMAS[name.split("/")[0].removesuffix(".parquet")]


def difference(found: pa.Schema, name: str) -> str | None:
    """Return what keeps a file of this schema from being read as a table, None where nothing does.

    An older release may have written fewer nullable columns.
    """
    wanted, metadata = schema_of(name), found.metadata or {}
    version = metadata.get(b"schema_version", b"none").decode(errors="replace")
    if version != str(SCHEMA_VERSION):
        return f"has schema version {version}, expected {SCHEMA_VERSION}; read it with the release that wrote it"
    table = metadata.get(b"shortv_table", wanted.metadata[b"shortv_table"])
    if table != wanted.metadata[b"shortv_table"]:
        return f"holds the table {table.decode(errors='replace')}; restore the file, or make it again"
    missing = [field.name for field in wanted if field.name not in found.names and not field.nullable]
    if missing:
        return f"lacks the columns {', '.join(missing)}; restore the file, or make it again"
    unknown = [column for column in found.names if column not in wanted.names]
    if unknown:
        return f"was written by a newer release of this project (columns {', '.join(unknown)}): update it"
    other = [f"{field.name} {field.type}" for field in found if field != wanted.field(field.name)]
    if other or found.names != [column for column in wanted.names if column in found.names]:
        return f"has columns of another type or order ({', '.join(other or found.names)}); make it again"
    return None


def read_result(source: Any, name: str, *, what: str, columns: Sequence[str] | None = None, **bounds: Any) -> pa.Table:
    """Read a file of a table; nullable columns that an older release did not write hold nulls.

    Args:
        source: a file object or pyarrow file.
        what: the file, for messages.
        columns: the columns to read, all of them by default; no others are decoded.
        bounds: `max_rows` and `max_bytes` of `read_parquet`.

    Raises:
        Refused: the file is not a whole Parquet file, or exceeds a bound.
        ShortVError: it has another schema.
    """
    file, schema = open_parquet(source, what=what), schema_of(name)
    there = file.schema_arrow
    reason = difference(there, name)
    if reason is not None:
        raise ShortVError(f"{what} {reason}")
    if columns is not None:
        schema = pa.schema([schema.field(column) for column in columns], metadata=schema.metadata)
    found = read_parquet(file, what=what, columns=[name for name in schema.names if name in there.names], **bounds)
    names = found.column_names
    arrays = [found[field.name] if field.name in names else pa.nulls(len(found), field.type) for field in schema]
    return pa.Table.from_arrays(arrays, schema=schema)


def table_of(name: str, rows: Iterable[Any]) -> pa.Table:
    """Build the Arrow table of records (dataclasses, named tuples or mappings) under its fixed schema.

    Raises:
        pyarrow.ArrowInvalid, pyarrow.ArrowTypeError: a value does not fit its column.
        ValueError: a null stands in a column that allows none.
    """
    schema, rows = schema_of(name), list(rows)
    columns = []
    for field in schema:
        values = [row[field.name] if isinstance(row, Mapping) else getattr(row, field.name) for row in rows]
        # Arrow takes exact strings only in some builds: an enumeration member becomes its value.
        exact = [str(value) if isinstance(value, str) else value for value in values]
        column = pa.array(exact, type=field.type)
        if column.null_count and not field.nullable:
            raise ValueError(f"column {field.name!r} of table {name!r} holds a null")
        columns.append(column)
    return pa.Table.from_arrays(columns, schema=schema)


def documentation() -> str:
    """Return the text of TABLES.md, which `python -m reports.schemas` writes."""
    lines = [_HEAD]
    for name, table in TABLES.items():
        files = f"`{table.files}`" if table.files.endswith(".parquet") else table.files
        lines += [f"## {name}", "", f"{table.row} File: {files}.", "", "| column | type | meaning |", "|---|---|---|"]
        lines += [f"| `{column.name}` | {column.kind} | {column.meaning} |" for column in table.columns]
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    DOCUMENTATION.write_text(documentation(), "utf-8")
