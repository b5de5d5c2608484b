"""A decode worker that cannot start."""

raise ImportError("no decoder here")
