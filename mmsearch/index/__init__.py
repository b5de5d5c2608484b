"""Unit rows to neighbours: numpy in, numpy out. Above this package there are only cosines."""
