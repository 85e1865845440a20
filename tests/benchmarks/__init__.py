"""Benchmarks of regd and comparable servers, in one run. `make bench` runs them."""
