"""Submission ids of Ray jobs: the same command on the same folder, one id per attempt.

Ray refuses an id that was used before. An id is `lc-HASH-ATTEMPT` for a sweep and `campaign-HASH-ATTEMPT` for a
campaign. The hash is of the arguments that decide the result and of the output folder, because every folder counts its
attempts on its own; the attempt is one more than the folder's manifest has counted, so the first is 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from reports.campaign import CampaignManifest
from reports.manifest import MANIFEST_NAME, Manifest, arguments_digest
from reports.store import Folder
from shortv.workers.request import SweepRequest

if TYPE_CHECKING:
    from shortv.workers.campaign.spec import CampaignSpec

HASH_LENGTH: Final = 12
# How a campaign is run and where; its cells are the same with any of them.
_CAMPAIGN_NOT_DECIDING: Final = (
    "replicas",
    "gpus_per_replica",
    "batch_size",
    "num_concurrent",
    "device",
    "fail_on_error",
    "retry_failed",
    "output_path",
)


def sweep_submission_id(request: SweepRequest) -> str:
    """The id for the next attempt of a sweep. Raises Refused when its folder holds something else than a sweep."""
    return _submission_id("lc", arguments_digest(request.arguments()), request.output_path, Manifest.load)


def campaign_submission_id(recipe: CampaignSpec) -> str:
    """The id for the next attempt of a campaign. Raises Refused when its folder holds something else than one."""
    digest = arguments_digest(recipe.arguments(), ignore=_CAMPAIGN_NOT_DECIDING)
    return _submission_id("campaign", digest, recipe.output_path, CampaignManifest.load)


def _submission_id(
    prefix: str, arguments: str, output_path: str, load: Callable[[Folder], Manifest | CampaignManifest]
) -> str:
    folder = Folder(output_path)
    attempts = load(folder).attempts if folder.exists(MANIFEST_NAME) else 0
    place = str(folder.local_path or folder.shown)
    digest = arguments_digest({"arguments": arguments, "output-path": place})
    return f"{prefix}-{digest[:HASH_LENGTH]}-{attempts + 1}"
