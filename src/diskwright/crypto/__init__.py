"""Ciphers and credentials: what is kept from others, and by what one knows them."""
