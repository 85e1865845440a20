"""`regctl bridge`: the registries of many machines, connected through etcd (the extra `etcd`)."""
