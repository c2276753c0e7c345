"""What a model is worth: comparison beside baselines, tests of behaviour."""
