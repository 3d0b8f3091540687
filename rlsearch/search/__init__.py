"""Searches many trials: the only part that knows Ray and Optuna."""
