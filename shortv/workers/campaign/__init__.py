"""Campaigns: models x plans x lmms-eval tasks, one cell after the other, in a folder that can be continued."""
