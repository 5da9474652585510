"""The driver of a campaign: checks the spec, streams the units that are missing, commits each, and makes the tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.console import Console

from reports.manifest import CampaignManifest, State, plain, utc_now, versions
from reports.store import Folder
from shortv.evals.benchmark import Benchmark
from shortv.terminal import console as default_console
from shortv.terminal import say
from shortv.workers.campaign.cells import CellState, groups_of
from shortv.workers.campaign.folder import CampaignFolder
from shortv.workers.campaign.plans import ModelFacts, PlanEntry, resolve_plans
from shortv.workers.campaign.spec import CampaignSpec
from shortv.workers.campaign.stream import Stream, Tables, Work, look_at_changes
from shortv.workers.campaign.summary import print_summary
from shortv.workers.campaign.tables import Rows
from shortv.workers.progress import SampleProgress
from shortv.workers.run import (
    attempt,
    check_output,
    exit_status,
    find_manifest,
    one_driver,
    run_async,
    stop_on_signal,
    write_report,
)
from shortv.workers.shipping import folder_digest

if TYPE_CHECKING:
    from shortv.workers.campaign.workers import CampaignWorkers


def run_campaign(spec: CampaignSpec, *, workers: CampaignWorkers, console: Console | None = None) -> int:
    """Run, continue or repeat a campaign, print its tables, and return the exit status (0, or 3 with failures).

    Raises:
        Refused: the spec cannot be right; nothing was started.
        ShortVError: the work was stopped or results cannot be written; the same command continues it.
    """
    console = console or default_console()
    with stop_on_signal():
        check_output(spec.output_path)
        folder = Folder(spec.output_path)
        # A folder of another run is refused before models and tasks are read.
        find_manifest(folder, CampaignManifest)
        campaign = _Campaign(spec, workers, console)
        with one_driver(folder):
            worked = campaign.run(folder)
            write_report(folder, console, anew=worked)
            return campaign.exit_status()


class _Campaign:
    """The groups of a spec, what they lack, and the rows of their tables."""

    def __init__(self, spec: CampaignSpec, workers: CampaignWorkers, console: Console) -> None:
        """Read models, plans and tasks. Raises Refused where one cannot be right, ShortVError for a task's data."""
        self.spec, self.workers, self.console = spec, workers, console
        self.models = [self._model(name) for name in spec.models]
        self.entries, warnings = resolve_plans(spec.plans, self.models)
        self.tasks: list[Benchmark] = [workers.task(name, spec) for name in spec.tasks]
        for warning in warnings:
            say(console, f"Warning: {warning}")
        self.groups = groups_of(spec, self.models, self.entries, self.tasks)
        self.rows: Rows = {}

    def _model(self, name: str) -> ModelFacts:
        model = self.workers.loader.pin(self.spec.of_model(name))
        architecture = self.workers.loader.describe(model)
        return ModelFacts(name=name, revision=model.revision, digest=folder_digest(name), architecture=architecture)

    def run(self, store: Folder) -> bool:
        """Do what is missing and return True; a finished campaign of the same spec is not changed. Prints the tables.

        Raises ShortVError when results cannot be read or written.
        """
        before = find_manifest(store, CampaignManifest)
        folder = CampaignFolder(store)
        for line in folder.damaged.values():
            say(self.console, f"Warning: {line}; what it held is asked again")
        streams: list[Stream] = []
        for group in self.groups:
            # Models of the same content share their cells.
            claimed = {key for stream in streams for key in stream.missing}
            streams.append(Stream(group, folder, self.spec, claimed))
        cells = sum(len(stream.missing) for stream in streams)
        finished = sum(not lacking.any() for stream in streams for lacking in stream.missing.values())
        say(self.console, f"{cells} cells, {finished} finished")
        wanted = self._manifest(before)
        worked = any(stream.pairs for stream in streams) or not _is_repeated(before, wanted) or not folder.has_tables()
        if worked:
            store.check_writable()
            attempt(store, wanted, lambda running: self._work(running, folder, streams))
        self.rows = folder.read_tables()
        print_summary(self.rows, self.groups, self.console)
        say(self.console, f"results in {store.shown}")
        return worked

    def exit_status(self) -> int:
        """Return 0 when no cell lacks more than the tolerated share of its samples, else 3."""
        failed = [
            (1, 1) if row["state"] == CellState.FAILED else (row["errors"] + lacking, row["n"] + lacking)
            for row, lacking in zip(self.rows["cells"], self._lacking(), strict=True)
        ]
        return max(exit_status(errors, total, self.spec.fail_on_error) for errors, total in failed)

    def _lacking(self) -> list[int]:
        """Return how many documents of each cell were not asked."""
        counts = [group.task.num_docs for group in self.groups for _ in group.cells]
        return [count - row["n"] for count, row in zip(counts, self.rows["cells"], strict=True)]

    def _work(self, running: CampaignManifest, folder: CampaignFolder, streams: Sequence[Stream]) -> CampaignManifest:
        """Answer what is missing, make the tables, and return the final manifest."""
        folder.set_damaged_aside()
        total = sum(stream.group.task.num_docs * len(stream.missing) for stream in streams)
        left = sum(stream.pairs for stream in streams)
        tables = Tables(folder, streams, self.spec, self.console)
        if left or any(stream.unmeasured for stream in streams):
            with (
                self.workers.open(self.spec, self.tasks) as pool,
                SampleProgress(
                    total=total, done=total - left, console=self.console, label="campaign", brief=True
                ) as bar,
            ):
                run_async(Work(self.spec, folder, pool, bar, tables).run(streams))
        else:
            run_async(look_at_changes(folder, streams, None, tables))
        rows = tables.of_all()
        states = Counter(row["state"] for row in {row["cell"]: row for row in rows["cells"]}.values())
        distinct = {row["cell"]: row for row in rows["cells"]}.values()
        counts = {
            "cells": len(distinct),
            **{state.value: states[state] for state in CellState},
            "samples": sum(row["n"] for row in distinct),
            "errors": sum(row["errors"] for row in distinct),
        }
        whole = states[CellState.COMPLETE] == len(distinct)
        return running.updated(state=State.COMPLETE if whole else State.PARTIAL, counts=counts)

    def _manifest(self, before: CampaignManifest | None) -> CampaignManifest:
        """Return the manifest with which this run starts. It adds to the attempts and the time of an earlier run."""
        return CampaignManifest(
            state=State.RUNNING,
            arguments=self.spec.arguments(),
            versions=versions(),
            models=tuple({**asdict(model), "config_digest": model.architecture.config_digest} for model in self.models),
            plans=tuple(_plan_facts(model.name, entry) for model in self.models for entry in self.entries[model.name]),
            tasks=tuple(
                {"name": task.name, "digest": task.digest, "num_docs": task.num_docs, "main_metric": task.main_metric}
                for task in self.tasks
            ),
            seed=self.spec.seed,
            attempts=before.attempts if before else 0,
            started=before.started if before else utc_now(),
            wall_seconds=before.wall_seconds if before else None,
        )


def _is_repeated(before: CampaignManifest | None, wanted: CampaignManifest) -> bool:
    """Whether an earlier run with the same settings, models, plans, tasks and versions came to its end."""
    if before is None or before.state is State.RUNNING:
        return False
    return before == wanted.updated(state=before.state, counts=before.counts, finished=before.finished)


def _plan_facts(model: str, entry: PlanEntry) -> dict[str, Any]:
    plan = entry.plan
    facts = {
        "model": model,
        "name": plan.name,
        "kind": entry.kind,
        "same_as": entry.same_as,
        "digest": plan.digest,
        "modes": plan.modes,
        "parts": asdict(plan.parts) if plan.parts else None,
        "downsample": plan.downsample,
        "training": entry.training._asdict() if entry.training else None,
        "ranking": plan.ranking,
        "source": plan.source,
    }
    # The same values as after reading the file, so that manifests can be compared.
    return {name: plain(value) for name, value in facts.items()}
