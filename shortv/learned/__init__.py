"""Learned acceleration systems: parts that are trained for a model and run under a plan of it.

A folder for each system, with the same files: `recipe` (settings and recipe, without torch), `parts` (the modules),
`run` (how they run under a plan, fast and as reference) and `train` (one training step). Beside the folders stands what
the systems share: the registry of systems, the files and the cache of parts, and the base of all trainers.
"""
