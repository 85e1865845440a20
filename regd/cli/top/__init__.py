"""`regctl top`: a live view of the registry in a terminal. Nothing of it is imported for other commands."""
