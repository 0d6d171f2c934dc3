"""Searching the knobs of a run: spaces, searchers, the judge that stops losers, the record, fronts, effects and laws.

Pure: imports neither ray nor torch. `nexus_ray.tune` runs the trials.
"""
