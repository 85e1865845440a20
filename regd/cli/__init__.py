"""The commands `regd` and `regctl`."""
