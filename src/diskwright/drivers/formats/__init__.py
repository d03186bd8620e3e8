"""Image formats: they give the bytes of their file child a meaning."""
