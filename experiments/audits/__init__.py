"""What `python -m experiments.audit` is made of."""
