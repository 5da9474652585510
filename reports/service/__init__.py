"""Runs below a folder or object-store URI over HTTP: their list, their pages, downloads of their tables and plans.

A table or plan is listed with its reason, and asking for it gives 422 with the same reason, when its footer or schema
cannot be read, when it failed as the list read it, or when this release cannot read the manifest of its run.
"""

from reports.service.app import make_service

__all__ = ["make_service"]
