"""One run: teacher, student, loop, evaluation."""
