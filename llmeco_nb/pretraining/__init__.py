"""Stages that learn from text alone: masked, causal, denoising and next-sentence modelling, scaling."""
