"""From text to tokens: WordPiece, byte-pair encoding, unigram."""
