"""Runs below a folder or object-store URI over HTTP: their list, their pages, downloads of their tables and plans.

A request passes `app` (routes), `tree` (a path becomes an open file), `files` (is it whole?) and `downloads` (sending
it). The list is made by `runs` (where runs are, what they contain) and `summary` (one folder of the list).
"""

from reports.service.app import make_service, run_service

__all__ = ["make_service", "run_service"]
