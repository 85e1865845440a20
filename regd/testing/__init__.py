"""A registry for other people's tests: a daemon in a thread of its own, and pytest's fixture around it."""
