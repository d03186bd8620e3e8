"""The engine: nodes, edges, requests, tables. It names no driver; it imports `system` and `errors`."""
