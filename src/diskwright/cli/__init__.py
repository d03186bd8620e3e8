"""Commands: words in, text out; the only package that may import all others."""
