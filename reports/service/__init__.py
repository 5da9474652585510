"""Runs below a folder or object-store URI over HTTP: their list, their pages, downloads of their tables and plans.

A table or plan that is damaged, of another schema, or in a run whose manifest this release cannot read is listed with
its reason, and asking for it gives 422 with the same reason: nobody downloads what nobody could read.
"""

from reports.service.app import make_service

__all__ = ["make_service"]
