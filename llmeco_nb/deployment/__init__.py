"""What answers: the bundle, the engine that batches, the ledger of what was asked, the server."""
