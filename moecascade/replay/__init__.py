"""Policies on recorded requests, without an engine: `player` plays, `ngram` drafts as vLLM does.

The policies are those of `core`, untouched; what is simulated is the engine around them.
"""
