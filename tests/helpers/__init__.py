"""Code that tests share: small networks and runs, independent formulas, pictures."""
