"""Measuring policies on a served model: what is asked, in which order, and what came of it.

A run is a `schedule`, played by `session` and `runner`; each answer becomes a record, all of them
one results file. What the numbers mean is the business of `report`.
"""
