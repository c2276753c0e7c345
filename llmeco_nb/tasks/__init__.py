"""The light half of every task: what its rows need, what its outputs mean, how it is scored and answered; no torch."""
