"""The benchmark: regd beside the servers that one would take instead, in one run. `make bench` runs it."""
