"""The second stage: words and patches read together, a calibrated probability for every pair."""
