"""The roof: the commands `regd` and `regctl`, one file each."""
