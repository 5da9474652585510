"""Runs below a folder or object-store URI over HTTP: their list, their pages, downloads of their tables and plans.

A request passes `app` (routes), `tree` (a path becomes an open file), `files` (is it whole?) and `downloads` (sending
it). The list is made by `runs` (where runs are), `headline` (their numbers) and `summary` (one folder of the list).

A table or plan is listed with a reason, and its download fails with status 422 and that reason, if its footer or
schema cannot be read, if reading it for the list failed, or if this release cannot read the manifest of its run.
"""

from reports.service.app import make_service, run_service

__all__ = ["make_service", "run_service"]
