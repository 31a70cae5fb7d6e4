"""What tests share: small networks and runs, independent formulas, pictures, a browser."""
