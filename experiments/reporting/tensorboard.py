"""Writes logged metrics as TensorBoard event files."""


def write(run, folder):
    """Writes the metrics of a run into a folder and returns the number of records.

    The event files of an earlier call are replaced. `run` is what `load.load` returns.
    """
    # Imported here, because tensorboardX is an optional dependency.
    from tensorboardX import SummaryWriter

    for old_file in folder.glob("events.out.tfevents.*"):
        old_file.unlink()
    with SummaryWriter(str(folder)) as writer:
        for record in run["metrics"]:
            for name, value in scalars(record):
                writer.add_scalar(name, value, record["step"])
    return len(run["metrics"])


def scalars(record, prefix=""):
    """Yields (name, value) of every number; slashes join the names of nested ones."""
    for name, value in record.items():
        if isinstance(value, dict):
            yield from scalars(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)) and name != "step":
            yield f"{prefix}{name}", value
