"""Architectures: encoder, decoder, encoder-decoder, n-gram model; their conversion, speed and costs."""
