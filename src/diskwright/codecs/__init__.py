"""Encoders and decoders of single units, pure; they import nothing of ours but `errors`."""
