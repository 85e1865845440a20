"""regd, the service registry for Python programs on one machine: the daemon and its commands.

The floors, from the ground up: `core` decides, `protocol` and `storage` translate, `server` runs, `cli` is
for people. Imports go down only. DESIGN.md beside this file is the floor plan, PROTOCOL.md the wire.
"""

__version__ = "0.1.0"
