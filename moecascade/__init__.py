"""Cascade: utility-driven speculative decoding for mixture-of-experts models."""
