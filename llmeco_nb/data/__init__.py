"""Where text comes from and what becomes of it: sources, streams, the labelled corpus, filters, duplicates, leaks, mixtures."""
