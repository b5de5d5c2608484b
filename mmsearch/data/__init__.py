"""Files become items and pairs here: PIL and numpy, never torch."""
