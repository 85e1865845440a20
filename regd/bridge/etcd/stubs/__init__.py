"""The messages of etcd's API, generated from its proto files: see README.md in this folder."""
