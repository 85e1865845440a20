"""The rules of the registry, as functions of values.

This package uses no clock, socket, file or logger. The caller passes the time in, so that tests can choose it.
"""
