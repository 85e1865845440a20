"""A client of etcd v3: leases that are kept, watches that resume, transactions, and reads of a prefix."""
