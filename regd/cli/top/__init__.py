"""`regctl top`: a live view of the registry in a terminal. Other commands import nothing from this package."""
