"""Deterministic, resumable data: text to tokens, samples in an order that no layout changes.

`corpus` prepares and opens token shards, `order` and `stream` say which sample comes when, `loader`
feeds any map-style dataset the same way. Used by engine and train; only `loader` imports torch.
"""
