"""Training: pairs and towers in, better towers out. `run.train` is the whole of it; the rest are its parts."""
