"""What the project is fast for, measured as ratios: `python -m experiments.benchmark` runs these."""
