"""The models: an encoder-decoder, a decoder only, small ones of the next word; their layers and settings."""
