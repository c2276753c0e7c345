"""Runs notebooks as stages: identity, registry, kernel, store, pipeline, benchmarks, doctor."""
