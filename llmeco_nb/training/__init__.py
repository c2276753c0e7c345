"""One loop for every model: optimiser, checkpoints, parallel processes, forecast, plan."""
