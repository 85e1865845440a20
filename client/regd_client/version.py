"""The version of the client, which is the daemon's: they are one distribution."""

VERSION = "0.1.0"
