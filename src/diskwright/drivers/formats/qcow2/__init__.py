"""qcow2, versions 2 and 3: header, tables, refcounts, snapshots, check, create, driver."""
