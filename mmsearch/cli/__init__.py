"""The command line: one file a verb; parse, call one library function, print."""
