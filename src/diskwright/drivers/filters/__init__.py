"""Filters: they change how their child behaves; see the package above for what they import."""
