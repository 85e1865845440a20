"""The version of the client, which is the daemon's: they are one distribution."""

__all__ = ["VERSION"]

VERSION = "0.1.0"
