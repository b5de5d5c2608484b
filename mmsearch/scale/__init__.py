"""Past one machine: encoding on a cluster, and other engines as the index."""
