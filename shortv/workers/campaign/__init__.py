"""Campaigns: models x plans x lmms-eval tasks, cell by cell, in a folder in which the same command continues."""
