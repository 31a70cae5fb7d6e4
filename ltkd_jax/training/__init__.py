"""Training: the state, the one step, how it is spread over devices, the teacher's table, checkpoints."""
