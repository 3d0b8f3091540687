"""One trial: models, data, the training loop and what is measured. No Ray, no Optuna."""
