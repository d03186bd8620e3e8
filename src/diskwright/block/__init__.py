"""The engine: nodes, edges, requests, tables; names no driver, imports `system` and `errors`."""
